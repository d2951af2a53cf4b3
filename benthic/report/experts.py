"""How evenly experts are used: a heat map of their recorded loads, or else of how much the busiest had."""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from benthic.report.chart import heat_map
from benthic.report.course import Curve, Loads, StageCourse
from benthic.report.facts import Facts

_KEY = "expert_load_max_over_mean"
_CELLS = 100
"""Across, of a map over time."""
_SHARES = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
_SHARE_NAMES = ("under ¼", "to ½", "to 0.8", "fair", "to 2", "to 4", "over 4 times the mean")
_BUSIEST = (0.0, 0.0, 0.0, 1.5, 2.0, 4.0)
_BUSIEST_NAMES = ("", "", "", "fair: under 1.5", "to 2", "to 4", "over 4 times the mean")
"""The busiest has never less than the mean: the first levels are not used."""


def map_of(facts: Facts) -> Markup | None:
    """Of the latest stage with records of every expert, or else of the longest; nothing if there are no experts'."""
    recorded = [(name, course) for name, course in facts.course.items() if course.loads]
    if recorded:
        return _of_every_expert(facts, *recorded[-1])
    with_busiest = [(name, course) for name, course in facts.course.items() if f"{_KEY}/0" in course.curves]
    if not with_busiest:
        return None
    return _of_the_busiest(facts, *max(with_busiest, key=lambda one: one[1].steps))


def _of_every_expert(facts: Facts, stage: str, course: StageCourse) -> Markup:
    records = course.loads
    # MTP modules, last, do not run in every step.
    fullest_ME = max((one.load_ME for one in records), key=len)
    sums_ME = [_sums_of(records, number, len(row)) for number, row in enumerate(fullest_ME)]
    rows = [(_layer(facts, number), _over_mean(row)) for number, row in enumerate(sums_ME)]
    steps = (
        f"step {records[0].step}"
        if len(records) == 1
        else f"{len(records)} records, steps {records[0].step:,} to {records[-1].step:,}"
    )
    return heat_map(
        f"Tokens of each expert, {stage}, {steps}", rows, _SHARES, _SHARE_NAMES, below="expert",
        ends=("0", str(max(map(len, sums_ME)) - 1)),
    )  # fmt: skip


def _sums_of(records: Iterable[Loads], layer: int, experts: int) -> list[int]:
    """Tokens of each of a layer's experts, over the records that have it."""
    rows = [one.load_ME[layer] for one in records if layer < len(one.load_ME) and len(one.load_ME[layer]) == experts]
    return [sum(column) for column in zip(*rows, strict=True)]


def _of_the_busiest(facts: Facts, stage: str, course: StageCourse) -> Markup:
    layers = course.family(_KEY)
    cells = min(_CELLS, max(1, course.steps))
    rows = [
        (_layer(facts, int(name)), _over_time(curve, course.steps, cells))
        for name, curve in layers.items()
        if name.isdecimal()
    ]
    return heat_map(
        f"Tokens of the busiest expert over those of the mean, {stage}", rows, _BUSIEST, _BUSIEST_NAMES, below="step",
        ends=("0", f"{course.steps:,}"),
    )  # fmt: skip


def _layer(facts: Facts, number: int) -> str:
    """A row of loads: layers with experts, MTP modules behind them."""
    if facts.model is None:
        return str(number)
    layer = facts.model.first_k_dense_replace + number
    beyond = layer - facts.model.num_hidden_layers
    return f"layer {layer}" if beyond < 0 else f"MTP {beyond + 1}"


def _over_mean(loads: Sequence[int]) -> list[float]:
    mean = sum(loads) / len(loads)
    return [load / mean if mean else math.nan for load in loads]


def _over_time(curve: Curve, steps: int, cells: int) -> list[float]:
    """Means by place in the stage; NaN where nothing is recorded, as of an MTP module that begins late."""
    sums, counts = [0.0] * cells, [0] * cells
    for bucket in curve.buckets:
        first, last = (min(cells - 1, max(0, (step - 1) * cells // steps)) for step in (bucket.first, bucket.last))
        for cell in range(first, last + 1):
            sums[cell] += bucket.mean
            counts[cell] += 1
    return [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
