"""Runs side by side: each made once, resumed where it stopped, and never mixed with those of other settings."""

import json

import pytest

from benthic.errors import InputError
from benthic.lab import compare
from benthic.lab.compare import Study, Variant
from benthic.lab.dense import Dense, DenseSizes

DENSE = Variant(
    "dense",
    ("model.num_nextn_predict_layers=0",),
    Dense(DenseSizes(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, intermediate_size=20)),
)
USUAL = Variant("usual")
RECIPE = """
[model]
preset = "tiny"
num_hidden_layers = 2
[data]
sources = ["{texts}"]
[train]
steps = 6
batch_size = 2
sequence_length = 16
validate_every = 3
validation_tokens = 64
checkpoint_every = 2
[precision]
compute = "fp32"
"""


@pytest.fixture
def study(tmp_path, texts, prepared, monkeypatch):
    """A study of a tiny recipe on data that is there already."""
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda *of: 100.0)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(texts=texts))
    directory = tmp_path / "study"
    directory.mkdir()
    for part in ("data", "tokenizer"):
        (directory / part).symlink_to(prepared / part)
    return lambda *settings: Study(directory, settings, str(tmp_path / "recipe.toml"))


def fail(*args, **kwargs):
    pytest.fail("trained again")


def test_a_finished_run_is_read_and_not_repeated(study, monkeypatch):
    first = [study().run(variant, seed) for variant in (USUAL, DENSE) for seed in (0, 1)]
    assert len({outcome.bits_per_byte for outcome in first}) == 4
    assert not list(study().directory.glob("*/checkpoints"))
    monkeypatch.setattr(compare, "train", fail)
    assert [study().run(variant, seed) for variant in (USUAL, DENSE) for seed in (0, 1)] == first
    assert [row["step"] for row in first[0].rows if "loss" in row] == list(range(1, 7))
    assert first[0].seconds == pytest.approx(sum(first[0].steps("processor_seconds")))


def test_an_interrupted_run_goes_on(study, monkeypatch):
    whole = study().run(DENSE, 0)
    real, steps = compare.train.__globals__["train_step"], []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("benthic.train.loop.train_step", step)
    again = DENSE.but(name="again")
    with pytest.raises(KeyboardInterrupt):
        study().run(again, 0)
    outcome = study().run(again, 0)
    assert len(steps) == 5 + 2  # the checkpoint was of step 4
    assert outcome.bits_per_byte == whole.bits_per_byte
    assert outcome.steps("loss") == whole.steps("loss")


def test_runs_of_other_settings_are_not_taken_for_these(study):
    study().run(USUAL, 0)
    with pytest.raises(InputError, match=r"config\.train\.steps: saved 6, given 7"):
        study("train.steps=7").run(USUAL, 0)
    with pytest.raises(InputError, match=r"architecture\.kind: saved None, given dense"):
        study().run(USUAL._replace(architecture=DENSE.architecture), 0)


def test_a_setting_of_a_later_version_counts_as_its_default(study):
    first = study().run(USUAL, 0)
    end = study().directory / "usual-0" / "outcome.json"
    kept = json.loads(end.read_text())
    del kept["config"]["train"]["track"]
    end.write_text(json.dumps(kept))
    assert study().run(USUAL, 0) == first
    for broken in ({**kept, "config": {}}, {**kept, "bits_per_byte": None}, {"config": kept["config"]}):
        end.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"outcome\.json: cannot be used"):
            study().run(USUAL, 0)


def test_an_answer_is_found_once_and_for_one_question(study):
    answers = iter([{"a": 1.5}, None])
    for _ in range(2):
        assert study().once("answer", {"of": (1, 2)}, lambda: next(answers)) == {"a": 1.5}
    with pytest.raises(InputError, match=r"answer\.json: was found for .*1, 2.*not for .*1, 3"):
        study().once("answer", {"of": (1, 3)}, lambda: next(answers))


def test_steps_are_timed_once(study, monkeypatch):
    monkeypatch.setattr(compare, "_ROUNDS", 3)
    seconds = study().step_seconds([USUAL, DENSE])
    assert set(seconds) == {"usual", "dense"}
    assert 0 < seconds["dense"] < seconds["usual"]
    monkeypatch.setattr(compare, "Trial", fail)
    assert study().step_seconds([USUAL, DENSE]) == seconds


def test_parts_of_a_run_count_by_their_share(study, monkeypatch):
    late = ("train.schedule.mtp_loss_weight=0", "train.schedule.mtp_late_loss_weight=0.3")
    late = USUAL.but(*late, "train.schedule.mtp_late_start=0.75", name="late")
    monkeypatch.setattr(compare, "_ROUNDS", 2)
    real = compare._in_turn

    def in_turn(trials, parts):
        assert {name: {*each} for name, each in real(trials, parts).items()} == {"usual": {0.3}, "late": {0.0, 0.3}}
        return {"usual": {0.3: [1.0, 2.0, 9.0]}, "late": {0.0: [1.0], 0.3: [2.0]}}

    monkeypatch.setattr(compare, "_in_turn", in_turn)
    assert study().step_seconds([USUAL, late]) == {"usual": 2.0, "late": pytest.approx(1.25)}


def test_precision_is_decided_once_for_all_runs(study, monkeypatch):
    monkeypatch.setattr("benthic.train.calibrate.seconds_per_step", lambda config, batches, mode, **_: len(mode))
    assert study("precision.compute=auto").config(DENSE).precision.compute == "fp32"
    monkeypatch.setattr("benthic.train.calibrate.seconds_per_step", fail)
    assert study("precision.compute=auto").config(USUAL).precision.compute == "fp32"


def test_all_seeds_of_all_sides_are_run_and_told(study):
    outcomes = study().compare([USUAL, DENSE], 2)
    assert [run.bits_per_byte for run in outcomes[DENSE]] == [study().run(DENSE, seed).bits_per_byte for seed in (0, 1)]
    study().write("told", {variant: {"runs": len(runs)} for variant, runs in outcomes.items()})
    assert json.loads((study().directory / "told.json").read_text()) == {
        "usual": {"settings": [], "runs": 2},
        "dense": {"settings": list(DENSE.settings), "runs": 2},
    }


def test_a_variant_lasts_as_many_steps_as_asked_for(study):
    train = study().config(USUAL.lasting(50, 4)).train
    assert (train.steps, train.validate_every) == (50, 12)
    assert study().config(USUAL.lasting(3, 16)).train.validate_every == 1
    assert study().config(USUAL.lasting(50)).train.validate_every == 50


def test_data_of_other_sources_is_not_taken_for_these(study, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "text.txt").write_text("another text altogether")
    with pytest.raises(InputError, match="prepared with sources="):
        study(f'data.sources=["{other}"]')
