"""metrics.jsonl keeps whole rows up to where a run resumes, and is valid JSON whatever is written."""

import json
import math
from typing import ClassVar

from benthic.train.metrics import MetricsLog, read_metrics


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, "pretrain", 0) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": step / 3})
            log.write({"step": step, "event": "x"})
    with MetricsLog(path, "pretrain", 3) as log:
        log.write({"step": 4, "loss": 0.5})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4]
    assert rows[0]["loss"] == 1 / 3


def test_rows_are_on_file_at_once_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, "pretrain", 0) as log:
        log.write({"step": 1})
        assert read_metrics(path) == [{"stage": "pretrain", "step": 1}]
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo\xff')
    assert read_metrics(path) == [{"stage": "pretrain", "step": 1}]
    with MetricsLog(path, "pretrain", 5) as log:
        log.write({"step": 2})
    assert path.read_text() == '{"stage": "pretrain", "step": 1}\n{"stage": "pretrain", "step": 2}\n'


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, "pretrain", 0) as log:
        log.write({"step": 1, "loss": math.nan, "mtp_losses": [math.inf, 2.0], "more": {"a": -math.inf}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "stage": "pretrain",
        "step": 1,
        "loss": None,
        "mtp_losses": [None, 2.0],
        "more": {"a": None},
    }


def test_rewinding_drops_rows_and_goes_on_after_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, "pretrain", 0) as log:
        for step in range(1, 6):
            log.write({"step": step})
        log.rewind(2)
        log.write({"step": 3, "again": True})
    assert [(row["step"], row.get("again")) for row in read_metrics(path)] == [(1, None), (2, None), (3, True)]


def test_a_stage_keeps_the_rows_of_those_before_it_and_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')  # of a version whose rows named no stage
    lengths = {"pretrain": 2, "extend-1": 3, "extend-2": 2}
    for number, (stage, steps) in enumerate(lengths.items()):
        with MetricsLog(path, stage, 2 * (number == 0), earlier=dict(list(lengths.items())[:number])) as log:
            for step in range(1, steps + 1):
                log.write({"step": step + 2 * (number == 0)})
    assert [(row.get("stage"), row["step"]) for row in read_metrics(path)] == [
        (None, 1), (None, 2), ("pretrain", 3), ("pretrain", 4),
        ("extend-1", 1), ("extend-1", 2), ("extend-1", 3), ("extend-2", 1), ("extend-2", 2),
    ]  # fmt: skip
    assert [row["step"] for row in read_metrics(path, "pretrain")] == [1, 2, 3, 4]
    MetricsLog(path, "extend-1", 1, earlier={"pretrain": 4}).__exit__()
    assert [(row.get("stage"), row["step"]) for row in read_metrics(path)][4:] == [("extend-1", 1)]
    MetricsLog(path, "pretrain", 1).__exit__()
    assert read_metrics(path) == [{"step": 1}]


def test_trackers_count_on_from_one_stage_to_the_next(tmp_path):
    class Tracker:
        logged: ClassVar = []

        def log(self, step, values):
            self.logged.append((step, values))

        def close(self):
            pass

    earlier = {"pretrain": 20, "extend-1": 5}
    with MetricsLog(tmp_path / "metrics.jsonl", "extend-2", 0, earlier=earlier, trackers=[Tracker()]) as log:
        log.write({"step": 1, "loss": 0.5})
    assert Tracker.logged == [(26, {"loss": 0.5})]
