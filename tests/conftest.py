"""The command line in this process, a tiny training run on prepared data, and a server of a tiny model."""

import contextlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import pytest

from benthic.cli import main
from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig

if TYPE_CHECKING:
    from serving import Server

_TEXT = "the sea is deep and dark and cold below the light where slow fish drift over the soft grey mud"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def benthic():
    """Runs the command line as a user does: its exit status and both of its outputs."""

    def invoke(*arguments, stdin=""):
        out, err = io.StringIO(), io.StringIO()
        argv = ["benthic", *map(str, arguments)]
        with (
            mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop,
        ):  # fmt: skip
            main()
        return Done(stop.value.code or 0, out.getvalue(), err.getvalue())

    return invoke


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short documents with enough pattern to learn from."""
    folder = tmp_path_factory.mktemp("texts")
    words, rng = _TEXT.split(), random.Random(0)
    for number in range(120):
        starts = [rng.randrange(len(words)) for _ in range(40)]
        text = " ".join(words[(start + i) % len(words)] for start in starts for i in range(2))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny_run_config(texts: Path) -> Callable[..., RunConfig]:
    """Settings of a run of the ``tiny`` preset with two layers; keywords go to ``train``."""

    def build(model: dict[str, Any] | None = None, mask_documents: bool = False, **train: Any) -> RunConfig:
        defaults = {
            "steps": 20,
            "batch_size": 4,
            "sequence_length": 32,
            "validate_every": 8,
            "validation_tokens": 256,
            "checkpoint_every": 10,
            "optimizer": {"learning_rate": 3e-3},
        }
        return RunConfig.model_validate(
            {
                "model": {**PRESETS["tiny"].model_dump(), "num_hidden_layers": 2, **(model or {})},
                "data": {"sources": [str(texts)], "mask_documents": mask_documents},
                "train": {**defaults, **train},
                "precision": {"compute": "fp32"},
            }
        )

    return build


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_run_config: Callable[..., RunConfig]) -> Path:
    """A directory with data and tokenizer."""
    from benthic.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(tiny_run_config().data, 320, out)
    return out


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, small enough to be served at once."""
    from serving import make_model

    return make_model(tmp_path_factory.mktemp("served") / "small")


@pytest.fixture(scope="session")
def server(served_model: Path) -> Iterator["Server"]:
    """`benthic serve` in a process of its own, for tests that leave it as it was."""
    from serving import Server

    running = Server(f"small={served_model}")
    yield running
    assert running.terminate() == 0


@pytest.fixture
def make_server(served_model: Path) -> Iterator[Callable[..., "Server"]]:
    """Further servers of that model, with settings such as ``max_queue=1``."""
    from serving import Server

    made: list[Server] = []

    def make(*arguments: str, environment: dict[str, str] | None = None, **settings: Any) -> Server:
        given = [part for key, value in settings.items() for part in ("--set", f"serve.{key}={json.dumps(value)}")]
        made.append(Server(f"small={served_model}", *given, *arguments, environment=environment))
        return made[-1]

    yield make
    assert [one.terminate() for one in made] == [0] * len(made)


@pytest.fixture
def make_run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fresh run directories on the prepared data. The GEMM peak, which takes a second to measure, is made up."""
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", cache(lambda *of: 100.0))

    def make(name: str = "run") -> Path:
        out = tmp_path / name
        out.mkdir()
        for part in ("data", "tokenizer"):
            (out / part).symlink_to(prepared / part)
        return out

    return make
