"""What docs/clusters.md tells people to run and write is what the programs it is for accept."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
from torch.distributed.run import get_args_parser

from benthic.cli import app
from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.parallel.fits import refuse_misfit

yaml = pytest.importorskip("yaml")
PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "exclusive", "time", "signal",
          "requeue", "output"}  # fmt: skip
"""Options of Slurm's sbatch, which is not here to be asked."""


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, language
    return found


def commands(text: str) -> list[list[str]]:
    """Command lines, split into words; a line that ends with a backslash goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("#")]


def parsed(arguments: list[str]) -> dict[str, object]:
    """What the command line makes of ``benthic ARGUMENTS``; it is not run."""
    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]
    return command.make_context(name, rest).params


def launched(words: list[str]) -> tuple[dict[str, object], dict[str, object]]:
    """Of a torchrun command: what torchrun understands, and what benthic does."""
    launcher = get_args_parser().parse_args([word.replace("$SLURM_NNODES", "8") for word in words])
    assert (launcher.module, launcher.training_script) == (True, "benthic")
    return vars(launcher), parsed(launcher.training_script_args)


@pytest.fixture
def recipe(tmp_path) -> RunConfig:
    (text,) = blocks("toml")
    (tmp_path / "cluster.toml").write_text(text)
    return load_run_config(tmp_path / "cluster.toml")


def test_the_recipe_fits_as_many_processes_as_the_page_says(recipe):
    refuse_misfit(recipe, 64)


def test_commands_are_understood(recipe):
    seen = set()
    for words in (words for block in blocks("bash") for words in commands(block)):
        seen.add(words[0])
        if words[0] == "benthic":
            assert parsed(words[1:])
            continue
        assert words[0] == "torchrun"
        launcher, benthic = launched(words[1:])
        processes = int(launcher["nnodes"].partition(":")[0]) * int(launcher["nproc_per_node"])
        changed = dict(setting.split("=") for setting in benthic["set_"] or ())
        sizes = {f"parallel.{axis}": getattr(recipe.parallel, axis) for axis in ("pipeline", "expert", "shard")}
        sizes |= {key: int(value) for key, value in changed.items()}
        assert processes == sizes["parallel.pipeline"] * sizes["parallel.expert"] * sizes["parallel.shard"]
    assert seen == {"benthic", "torchrun"}


def test_the_batch_script(recipe):
    (script,) = blocks("sbatch")
    directives = dict(line.partition("=")[::2] for line in re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE))
    assert directives.keys() <= SBATCH
    (step,) = [words for words in commands(script) if words[0] == "srun"]
    launcher, _ = launched(step[step.index("torchrun") + 1 :])
    assert directives["ntasks-per-node"] == "1"
    assert launcher["nproc_per_node"] == directives["gpus-per-node"]
    assert int(directives["nodes"]) * int(directives["gpus-per-node"]) == recipe.parallel.processes


def test_the_kubernetes_job(recipe, monkeypatch):
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec, worker = job["spec"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    assert worker["replicas"] * int(spec["nprocPerNode"]) == recipe.parallel.processes
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # What the operator sets, torchrun reads.
    for name, value in (("NNODES", 8), ("NPROC_PER_NODE", 8), ("RDZV_ENDPOINT", "lite-worker-0:23456")):
        monkeypatch.setenv(f"PET_{name}", str(value))
    assert container["command"][0] == "torchrun"
    launcher, _ = launched(container["command"][1:])
    assert (launcher["nnodes"], launcher["rdzv_endpoint"]) == ("8", "lite-worker-0:23456")


def test_variables_of_torch_are_known_to_it():
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    known = "".join(path.read_text(encoding="utf-8") for path in headers.rglob("*.hpp"))
    names = set(re.findall(r"TORCH_[A-Z_]+", PAGE))
    assert names
    assert all(f'"{name}"' in known for name in names)
