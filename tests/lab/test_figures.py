"""Means, spreads and curves of several runs, and how they are drawn."""

import json
import random
import statistics

import pytest

from benthic.lab.compare import Outcome, Variant
from benthic.lab.figures import curve, draw_curves, figures, summary, told, windows


def outcome(seed: int) -> Outcome:
    draw = random.Random(seed).random
    rows = []
    for step in range(1, 8):
        rows.append({"step": step, "loss": draw(), "tokens": 10 * step, "processor_seconds": draw(), "seconds": draw()})
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
    sides = {Variant("this side"): [outcome(1)], Variant("that side"): [outcome(2)]}
    draw_curves(path, sides, "Title", ["tokens", "seconds"])
    drawn = path.read_text()
    for text in ("this side", "that side", "Title", "tokens read", "processor seconds of training"):
        assert f">{text}<" in drawn


def test_figures_of_a_side():
    runs = [outcome(seed) for seed in range(3)]
    told_of = json.loads(json.dumps(figures(runs)))
    assert told_of["bits_per_byte"]["values"] == [run.bits_per_byte for run in runs]
    assert told_of["processor_seconds"]["mean"] == pytest.approx(statistics.fmean(run.seconds for run in runs))
    assert told_of["wall_seconds"]["values"] == [pytest.approx(sum(run.steps("seconds"))) for run in runs]
    assert (told_of["steps"], told_of["tokens"]) == (7, 70)
    assert told_of["curve"] == [point._asdict() for point in curve(runs)]
