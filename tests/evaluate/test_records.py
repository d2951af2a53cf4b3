"""Records of evaluations: written, read back the same, and refused when damaged."""

import json

import pytest

from benthic.errors import InputError
from benthic.evaluate.records import Curve, EvaluationRecord, Sampled, evaluations
from benthic.evaluate.score import Score

RECORD = EvaluationRecord(
    stage="sft", step=12, when="2025-01-31T12:00:00+00:00", seconds=3.5,
    scores={"validation": Score("bits_per_byte", 1.5, 10, (1.4, 1.6), "bootstrap"), "one": Score("x", 0.0, 1, None)},
    acceptance=(Score("acceptance", 0.5, 100, (0.4, 0.6), "wilson"),),
    samples=(Sampled(prompt="Hello \u2028 </script>", answer="\x00\U0001f600", wanted="hi", score=0.5),),
    pretrained_length=4, by_position=(Curve(name="with YaRN", ends=(4, 16), bits_per_byte=(1.0, 2.0)),),
    not_measured={"pass@k": "no task file asks for it"},
)  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = RECORD.save(tmp_path)
    assert list(evaluations(tmp_path)) == [path] == [tmp_path / "evaluation" / "sft.json"]
    assert EvaluationRecord.load(path) == RECORD


def test_a_run_without_evaluation_has_none(tmp_path):
    assert list(evaluations(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stage": "../x"}, "stage"),
        ({"stage": "rl"}, "is of stage 'rl'"),
        ({"step": -1}, "step"),
        ({"unknown": 1}, "unknown"),
        ({"scores": {"validation": {"metric": "m", "value": float("nan"), "n": 1, "ci95": None}}}, "finite"),
        ({"scores": {"validation": {"metric": "m", "value": 1.0, "n": 1, "ci95": [0.0, float("inf")]}}}, "finite"),
        ({"by_position": [{"name": "a", "ends": [1, 2], "bits_per_byte": [1.0]}]}, "ends"),
        ({"by_position": [{"name": "a", "ends": [2, 2], "bits_per_byte": [1.0, 1.0]}]}, "rise"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, change, told):
    path = RECORD.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=told) as refused:
        EvaluationRecord.load(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '"sft"', "{}"])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(InputError, match=r"sft\.json"):
        EvaluationRecord.load(tmp_path / "sft.json")
