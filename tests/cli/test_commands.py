"""What each subcommand is for, done once; and the JSON keys that other programs rely on."""

import importlib.metadata
import json
import shlex
import shutil

import pytest

from benthic.config.load import load_run_config

FAST = ("--set", "inference.max_new_tokens=4", "--set", "inference.seed=3", "--set", "inference.temperature=0")


def output(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_leaves_what_a_run_directory_holds(small_run):
    names = {path.name for path in small_run.iterdir()}
    assert names >= {"config.toml", "tokenizer", "data", "checkpoints", "metrics.jsonl", "model"}


def test_a_finished_run_again_is_done_at_once(benthic, small_run):
    before = (small_run / "metrics.jsonl").read_text()
    assert "bits per byte" in output(benthic("run", small_run / "config.toml", "--out", small_run))
    assert (small_run / "metrics.jsonl").read_text() == before


def test_data(benthic, corpus, tmp_path):
    found = json.loads(output(benthic("data", corpus, "--out", tmp_path / "out", "--json")))
    assert found.keys() >= {"documents", "tokens", "bytes", "rejected", "duplicates", "train_tokens", "val_tokens"}
    assert found["documents"] == 40
    assert found["tokens"] == found["train_tokens"] + found["val_tokens"]
    # A document's plain text ends with a line break of its own.
    assert found["bytes"] == sum(len(path.read_bytes()) + 1 for path in corpus.iterdir())


def test_data_then_train_is_a_run(benthic, corpus, tmp_path):
    settings = (
        "--set",
        f'data.sources=["{corpus}"]',
        "--set",
        "train.steps=1",
        "--set",
        "data.validation_fraction=0.2",
    )
    for command in ("data", "train"):
        output(benthic(command, "tiny", "--out", tmp_path / "out", *settings))
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_data_from_files_then_train_by_the_command_it_ends_with(benthic, corpus, tmp_path):
    settings = ("--set", "model.preset=tiny", "--set", "data.validation_fraction=0.2", "--set", "train.steps=1",
                "--set", "train.batch_size=2", "--set", "train.sequence_length=32",
                "--set", "train.extend=[]")  # fmt: skip
    out = tmp_path / "out"
    last = output(benthic("data", corpus, "--out", out, *settings)).splitlines()[-1]
    told, _, command = last.partition(": ")
    assert told == "to train on it"
    assert shlex.split(command) == ["benthic", "train", "quickstart", "--out", str(out), *settings]
    output(benthic(*shlex.split(command)[1:]))
    recorded = load_run_config(out / "config.toml").data
    assert (recorded.sources, recorded.validation_fraction) == ((str(corpus),), 0.2)
    output(benthic("run", out / "config.toml", "--out", out))


def test_the_last_validation_of_a_run_is_what_eval_finds_in_any_precision(benthic, small_run, tmp_path):
    out = tmp_path / "out"
    for part in ("data", "tokenizer"):
        shutil.copytree(small_run / part, out / part)
    output(benthic("train", "tiny", "--out", out, "--set", "precision.compute=bf16", "--set", "train.ema_decay=0.5"))
    score = json.loads(output(benthic("eval", out, "--json")))["validation"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "validation_bits_per_byte" in row][-1]
    assert score["value"] == pytest.approx(last["average_validation_bits_per_byte"], rel=1e-5)
    assert score["value"] != pytest.approx(last["validation_bits_per_byte"], rel=1e-5)


def test_eval_with_its_baseline(benthic, small_run):
    scores = json.loads(output(benthic("eval", small_run, "--baseline", "--json")))
    xz, own = scores["xz_baseline"], scores["validation"]
    assert (xz["metric"], xz["n"], xz["ci95"]) == ("bits_per_byte", 1, None)
    assert 0 < xz["value"] < 8
    text = output(benthic("eval", small_run, "--baseline"))
    for number in (f"{own['value']:.4f}", f"{xz['value']:.4f}", f"{own['value'] / xz['value']:.3f}"):
        assert number in text


def test_eval_in_another_precision(benthic, small_run):
    scores = json.loads(output(benthic("eval", small_run, "--precision", "int4", "--json")))
    assert set(scores) == {"validation", "validation_int4", "greedy_agreement_int4"}
    assert scores["validation_int4"]["value"] != scores["validation"]["value"]
    assert 0.3 < scores["greedy_agreement_int4"]["value"] <= 1
    text = output(benthic("eval", small_run, "--precision", "int4"))
    assert f"{scores['validation_int4']['value']:.4f} with weights in int4" in text


def test_eval_with_the_cache_in_another_precision(benthic, small_run):
    asked = ("eval", small_run, "--precision", "bf16", "--cache-precision", "fp8")
    scores = json.loads(output(benthic(*asked, "--json")))
    names = ("validation", "greedy_agreement")
    assert set(scores) == {"validation", *(f"{name}_{kept}" for name in names for kept in ("bf16", "cache_fp8"))}
    assert len({scores[name]["value"] for name in scores if name.startswith("validation")}) == 3
    assert 0.5 < scores["greedy_agreement_cache_fp8"]["value"] <= 1
    text = output(benthic(*asked))
    assert f"{scores['validation_cache_fp8']['value']:.4f} with the cache in fp8" in text
    assert f"{scores['validation_bf16']['value']:.4f} with weights in bf16" in text


def test_generating_in_other_precisions(benthic, small_run):
    asked = ("generate", small_run, "--prompt", "the", "--set", "inference.max_new_tokens=3")
    for kept in (("--precision", "int8"), ("--cache-precision", "fp8")):
        found = json.loads(output(benthic(*asked, *kept, "--json")))
        assert len(found["token_ids"]) == 3 or found["finish_reason"] == "stop"


def test_eval(benthic, small_run):
    score = json.loads(output(benthic("eval", small_run, "--json")))["validation"]
    assert score.keys() >= {"metric", "value", "n", "ci95"}
    rows = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    last = [row["validation_bits_per_byte"] for row in rows if "validation_bits_per_byte" in row][-1]
    assert score["value"] == pytest.approx(last, rel=1e-5)
    assert score["ci95"][0] <= score["value"] <= score["ci95"][1]


def test_generate_prints_the_text_of_its_json(benthic, small_run):
    text = output(benthic("generate", small_run, "--prompt", "The sea", *FAST))
    found = json.loads(output(benthic("generate", small_run, "--prompt", "The sea", *FAST, "--json")))
    assert found["text"] + "\n" == text


def test_chat_answers_each_line(benthic, small_run):
    assert output(benthic("chat", small_run, *FAST, stdin="hello\n/reset\nhow are you?\n")).count("\n") >= 3


def untimed(completion: dict) -> dict:
    """What does not depend on the clock, as the number of drafts does."""
    return {key: completion[key] for key in ("text", "token_ids", "logprobs", "finish_reason")}


def test_export_and_import_keep_the_model(benthic, small_run, tmp_path):
    output(benthic("export", small_run, "--format", "hf", "--out", tmp_path / "hf"))
    output(benthic("import", tmp_path / "hf", "--out", tmp_path / "again"))
    asked = ("--prompt", "The sea", *FAST, "--json")
    again, first = (json.loads(output(benthic("generate", run, *asked))) for run in (tmp_path / "again", small_run))
    assert untimed(again) == untimed(first)


def test_export_for_llama_cpp(benthic, small_run, tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "new" / "m.gguf"
    said = output(benthic("export", small_run, "--format", "gguf", "--precision", "q8_0", "--out", out))
    assert "left out: 1 MTP module" in said
    assert said.splitlines()[-1] == f"wrote {out}"
    assert out.read_bytes()[:4] == b"GGUF"
    larger = tmp_path / "f32.gguf"
    output(benthic("export", small_run, "--format", "gguf", "--out", larger))
    assert larger.stat().st_size > out.stat().st_size
    before = out.read_bytes()
    again = benthic("export", small_run, "--format", "gguf", "--out", out)
    assert (again.returncode, again.stderr) == (
        2, f"error: {out}: already there and not replaced; give a path that is free\n"
    )  # fmt: skip
    assert out.read_bytes() == before


def test_report(benthic, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    assert output(benthic("report", run)) == f"the report is {run / 'report.html'}\n"
    assert "4 of 4" in (run / "report.html").read_text(encoding="utf-8")
    found = json.loads(output(benthic("report", run, "--json")))
    assert found["report"] == str(run / "report.html")
    assert found["stages"] == [{"name": "pretrain", "kind": "corpus", "done": 4, "planned": 4, "state": "done"}]
    assert found["ledger"].keys() >= {"pretrain", "evaluation"}
    assert "bits_per_byte" in {score["metric"] for score in found["evaluation"]["pretrain"].values()}
    assert found["damaged"] == []
    assert benthic("report", tmp_path).returncode == 2


def test_plan(benthic):
    plan = json.loads(output(benthic("plan", "v3-671b", "--json")))
    assert plan.keys() >= {"total_parameters", "active_parameters", "kv_bytes_per_token", "parameters"}
    assert plan["total_parameters"] == pytest.approx(671.03e9, rel=1e-4)
    assert f"{plan['total_parameters']:,}" in output(benthic("plan", "v3-671b"))


def test_plan_of_a_cluster(benthic):
    settings = ("--set", "train.batch_size=64", "--set", "train.sequence_length=32")
    plan = json.loads(output(benthic("plan", "tiny", *settings, "--gpus", "4", "--gpu", "h200", "--json")))
    assert plan.keys() >= {
        "total_parameters", "active_parameters", "kv_bytes_per_token", "memory_per_gpu_gib", "bubble_share",
        "step_seconds", "gpu_hours", "cost_usd", "energy_kwh",
    }  # fmt: skip
    assert (plan["gpus"], plan["gpu"], plan["fits"]) == (4, "H200", True)
    assert "pretrain: 8 steps of" in output(benthic("plan", "tiny", *settings, "--gpus", "4"))


def test_dry_run_of_training(benthic, tmp_path):
    command = ("train", "v3-671b", "--dry-run")
    assert "GB too much" in output(benthic(*command))
    found = json.loads(output(benthic(*command, "--gpu", "H200", "--json")))
    assert (found["processes"], found["gpu"], found["fits"]) == (2048, "H200", False)
    assert not list(tmp_path.iterdir())
    for words, complaint in (
        (("train", "tiny"), "--out DIR: is missing"),
        (("train", "tiny", "--out", tmp_path, "--gpu", "H100"), "--gpu H100: is for --dry-run"),
        ((*command, "--gpu", "V100"), "--gpu V100: no such GPU is known"),
        ((*command, "--set", "parallel.expert=48"), "parallel.expert=48 must divide"),
    ):
        done = benthic(*words)
        assert (done.returncode, done.stdout, complaint in done.stderr) == (2, "", True), done.stderr


def test_plan_of_a_recipe_with_a_setting(benthic):
    plan = json.loads(output(benthic("plan", "quickstart", "--set", "train.sequence_length=77", "--json")))
    assert plan["sequence_length"] == 77


@pytest.mark.parametrize(("work", "keys"), [
    (("train", "--set", "model.preset=tiny", "--set", "train.steps=1", "--set", "train.sequence_length=16"),
     {"tokens_per_s", "gemm_gflops", "share_of_gemm_peak"}),
    (("prefill", "--context", "32", "--set", "model.preset=tiny"),
     {"tokens_per_s", "context", "batch", "precision", "memory_gb_per_s", "gemm_gflops", "share_of_limit"}),
    (("decode", "--context", "32", "--cache-precision", "fp8", "--set", "model.preset=tiny"),
     {"tokens_per_s", "cache_precision", "share_of_limit"}),
    (("decode", "--context", "32", "--batch", "2", "--set", "model.preset=tiny"),
     {"tokens_per_s", "context", "batch", "precision", "memory_gb_per_s", "share_of_limit", "accepted_per_step"}),
])  # fmt: skip
def test_bench(benthic, work, keys):
    figures = json.loads(output(benthic("bench", *work, "--json")))
    assert figures.keys() >= keys
    assert figures["tokens_per_s"] > 0


def test_version(benthic):
    assert output(benthic("--version")) == f"benthic {importlib.metadata.version('benthic')}\n"
