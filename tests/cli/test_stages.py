"""A run with context extension, as a user gives, ends and measures it."""

import json

import pytest

PHASES = "train.extend=[{sequence_length = 96, steps = 2}, {sequence_length = 160, steps = 3}]"


@pytest.fixture(scope="module")
def extended(benthic, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "extended"
    done = benthic("run", "tiny", "--out", out, "--set", f'data.sources=["{corpus}"]', "--set", PHASES,
                   "--set", "data.validation_fraction=0.2", "--set", "train.steps=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain 2/2", "extend-1 2/2", "extend-2 3/3"):
        assert stage in done.stderr
    return out


def test_the_model_takes_what_the_last_stage_read(benthic, extended):
    config = json.loads((extended / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_scaling"]["factor"]) == (160, 2.5)
    prompt = "The sea was calm. " * 20
    options = ("--set", "inference.max_new_tokens=3", "--set", "inference.temperature=0")
    found = benthic("generate", extended, "--prompt", prompt[:200], *options, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["finish_reason"] in ("length", "stop")


def test_eval_reads_at_the_length_of_the_stage_that_was_reached(benthic, extended):
    found = benthic("eval", extended, "--json")
    rows = [json.loads(line) for line in (extended / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "validation_bits_per_byte" in row][-1]
    assert last["stage"] == "extend-2"
    assert json.loads(found.stdout)["validation"]["value"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)


def test_again_it_is_done_at_once_and_other_phases_are_refused(benthic, extended):
    before = (extended / "metrics.jsonl").read_text()
    assert benthic("run", extended / "config.toml", "--out", extended).returncode == 0
    assert (extended / "metrics.jsonl").read_text() == before
    done = benthic("run", extended / "config.toml", "--out", extended, "--set", "train.extend.1.steps=4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "train.extend.1.steps: saved 3, given 4" in done.stderr


def test_a_wrong_phase_is_refused_before_anything_is_written(benthic, tmp_path):
    out = tmp_path / "out"
    done = benthic("run", "tiny", "--out", out, "--set", "train.extend=[{sequence_length = 64, steps = 2}]")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "extend.0.sequence_length=64 must be greater than 64" in done.stderr
    assert not out.exists()
