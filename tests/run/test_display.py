"""One display over all stages: which of how many, how far, how long it and the whole still take."""

import io

import pytest

from benthic.run import display
from benthic.run.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


FORECAST = {"data": 10.0, "pretrain": 100.0, "export": 20.0, "report": 5.0}
NAMES = ["data", "pretrain", "export", "report"]


def test_plain_lines_say_where_the_run_is_and_what_is_left(clock):
    stream = io.StringIO()
    with Display(NAMES, lambda: FORECAST, stream) as shown:
        data = shown.stage("data")
        clock[0] += 4
        data.count("reading", 300, None)
        clock[0] += 11
        data.count("encoding", 500, 1000)
        with shown.stage("pretrain", 50) as pretrain:
            for step in range(1, 51):
                clock[0] += 3.0  # slower than was forecast
                pretrain.update(step, "loss 1.0", 999)
            pretrain.note("a note")
        last = shown.stage("report")
        last.count("a page", 0, None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "1/4 data 300  reading  0:06 left, 2:11 in all"
    assert lines[1] == "1/4 data 500/1000  encoding  0:00 left, 2:05 in all"
    assert lines[2] == "2/4 pretrain 1/50  loss 1.0  16:39 left, 17:04 in all"
    assert lines[3] == "2/4 pretrain 5/50  loss 1.0  2:15 left, 2:40 in all"
    assert lines[-3:] == [
        "2/4 pretrain 50/50  loss 1.0  0:00 left, 0:25 in all", "a note", "4/4 report a page  0:05 left"
    ]  # fmt: skip
    assert len(lines) == 2 + 13 + 1 + 2  # the first, then one in ten seconds, which are four steps, and the last


def test_parts_that_are_over_tell_more_than_the_forecast(clock):
    stream = io.StringIO()
    with Display(["evaluation", "export"], lambda: {"evaluation": 20.0, "export": 5.0}, stream) as shown:
        stage = shown.stage("evaluation")
        for model in range(1, 5):
            clock[0] += 30.0
            stage.count("answers", 1, 2)
            clock[0] += 10.0
            stage.passed(model, 4)
    assert [line.partition("answers  ")[2] for line in stream.getvalue().splitlines()] == [
        "0:00 left, 0:05 in all", "1:30 left, 1:35 in all", "0:50 left, 0:55 in all", "0:10 left, 0:15 in all",
    ]  # fmt: skip


def test_the_rate_is_that_of_the_last_minute(clock):
    stream = io.StringIO()
    with Display(["pretrain"], dict, stream) as shown:
        progress = shown.stage("pretrain", 1000)
        for step in range(1, 101):
            clock[0] += 10.0
            progress.update(step, "")
        for step in range(101, 161):
            clock[0] += 1.0
            progress.update(step, "")
    # 840 steps are left, of a second each; from the beginning on it would be more than four times as long.
    last = stream.getvalue().splitlines()[-1]
    minutes, seconds = map(int, last.split()[-2].split(":"))
    assert 60 * minutes + seconds == pytest.approx(840 * 60 / 59, rel=0.2)


def test_what_is_not_forecast_is_not_told(clock):
    stream = io.StringIO()
    with Display(["data", "pretrain"], dict, stream) as shown:
        shown.stage("data").count("reading", 0, None)
    assert stream.getvalue() == "1/2 data reading\n"


def test_the_forecast_is_asked_for_anew_at_each_stage(clock):
    stream, known = io.StringIO(), {"b": 60.0}
    with Display(["a", "b"], lambda: known, stream) as shown:
        shown.stage("a", 2).update(2, "", 5.0)
        known["b"] = 90.0
        shown.stage("b").count("", 0, None)
    assert [line.split("  ")[-1] for line in stream.getvalue().splitlines()] == [
        "0:05 left, 1:05 in all",
        "2/2 b 1:30 left",
    ]


def test_a_terminal_gets_one_bar():
    stream = Terminal()
    with Display(NAMES, lambda: FORECAST, stream) as shown:
        with shown.stage("pretrain", 50) as progress:
            progress.update(7, "loss [1.0]", 60)
            progress.note("note [bold]")
        shown.stage("export").count("the model", 0, None)
    seen = stream.getvalue()
    assert "note [bold]" in seen
    assert "3/4 export" in seen
    assert "the model" in seen
