"""Runs side by side: each made once, resumed where it stopped, and never mixed with those of other settings."""

import json
import random
import statistics

import pytest

from benthic.errors import InputError
from benthic.lab import compare
from benthic.lab.compare import Outcome, Study, Variant, curve, draw_curves, summary, told, windows
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
    monkeypatch.setattr("benthic.train.loop.measure_gemm_gflops", lambda dtype: 100.0)
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


def outcome(seed: int) -> Outcome:
    draw = random.Random(seed).random
    rows = []
    for step in range(1, 8):
        rows.append({"step": step, "loss": draw(), "tokens": 10 * step, "processor_seconds": draw()})
        if step % 3 == 0:
            rows.append({"step": step, "validation_bits_per_byte": draw()})
    return Outcome([*rows, {"step": 7, "event": "x"}], draw())


def test_a_curve_is_the_mean_and_span_of_all_seeds():
    runs = [outcome(seed) for seed in range(4)]
    points = curve(runs)
    assert [point.tokens for point in points] == [30, 60]
    for number, point in enumerate(points, start=1):
        bits = [
            [row["validation_bits_per_byte"] for row in run.rows if len(row) == 2 and "event" not in row][number - 1]
            for run in runs
        ]
        seconds = [sum(run.steps("processor_seconds")[: 3 * number]) for run in runs]
        assert point.bits_per_byte == pytest.approx(statistics.fmean(bits))
        assert (point.least, point.most) == (min(bits), max(bits))
        assert point.seconds == pytest.approx(statistics.fmean(seconds))


def test_windows_mean_and_deviation():
    assert windows([1, 2, 3, 4, 9], 2) == [1.5, 3.5]
    assert windows([1, 2, 3], 5) == [2]
    assert summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "deviation": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}
    assert summary([4.0])["deviation"] is None
    assert told([1.0, 2.0, 6.0], 2) == "3.00 +- 2.65"
    assert told([4.0], 1) == "4.0"


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.svg"
    draw_curves(
        path, {"this side": curve([outcome(1)]), "that side": curve([outcome(2)])}, "Title", ["tokens", "seconds"]
    )
    drawn = path.read_text()
    for text in ("this side", "that side", "Title", "tokens read", "processor seconds of training"):
        assert f">{text}<" in drawn
    json.dumps(curve([outcome(1)])[0]._asdict())
