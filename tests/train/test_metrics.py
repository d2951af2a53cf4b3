"""metrics.jsonl keeps whole rows up to where a run resumes, and is valid JSON whatever is written."""

import json
import math

from benthic.train.metrics import MetricsLog, read_metrics


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 3})
            log.write({"step": step, "event": "x"})
    with MetricsLog(path, 3) as log:
        log.write({"step": 4, "loss": 0.5})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4]
    assert rows[0]["loss"] == 1 / 3


def test_rows_are_on_file_at_once_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.write({"step": 1})
        assert read_metrics(path) == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo\xff')
    assert read_metrics(path) == [{"step": 1}]
    with MetricsLog(path, 5) as log:
        log.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.write({"step": 1, "loss": math.nan, "mtp_losses": [math.inf, 2.0], "more": {"a": -math.inf}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "mtp_losses": [None, 2.0],
        "more": {"a": None},
    }


def test_rewinding_drops_rows_and_goes_on_after_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for step in range(1, 6):
            log.write({"step": step})
        log.rewind(2)
        log.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
