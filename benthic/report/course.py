"""The course of a run out of ``metrics.jsonl``: a curve for every number in it, in memory that is bounded."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benthic.parallel.replay import KEY as EXPERT_LOAD
from benthic.train.metrics import stage_of, stream_metrics

MOST_BUCKETS = 400
MOST_CURVES = 2000
"""Of a stage: names come from a file, and there is a curve for each."""
MOST_STAGES = 100
MOST_EVENTS = 50
MOST_LOADS = 16
"""Records of every expert's load that are kept, the latest of each stage."""
_DEEPEST = 4


class Bucket(NamedTuple):
    """Neighbouring values of a curve."""

    first: int
    """Step."""
    last: int
    mean: float
    least: float
    most: float
    values: int


class Curve:
    """Values by step, at most so many buckets of them: as more come, neighbours are put together."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self._size = 1
        self.last = math.nan
        """The latest value."""

    @property
    def buckets(self) -> list[Bucket]:
        """In order, each of as many values but the last, which may have fewer."""
        return self._buckets

    def add(self, step: int, value: float) -> None:
        """The next value."""
        self.last = value
        one = Bucket(step, step, value, value, value, 1)
        if self._buckets and self._buckets[-1].values < self._size:
            self._buckets[-1] = _together(self._buckets[-1], one)
            return
        if len(self._buckets) == MOST_BUCKETS:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
            self._buckets = [_together(*pair) for pair in pairs]
            self._size *= 2
        self._buckets.append(one)


def _together(left: Bucket, right: Bucket) -> Bucket:
    values = left.values + right.values
    mean = left.mean + (right.mean - left.mean) * (right.values / values)
    return Bucket(left.first, right.last, mean, min(left.least, right.least), max(left.most, right.most), values)


class Loads(NamedTuple):
    """A record of every expert's load."""

    step: int
    load_ME: list[list[int]]
    """Tokens, by layer with experts and expert."""


@dataclass
class StageCourse:
    """What was recorded of one stage."""

    steps: int = 0
    """The latest that is recorded."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By name: ``loss``, ``mtp_losses/0``, ``accuracy/all/value``."""
    loads: deque[Loads] = field(default_factory=lambda: deque(maxlen=MOST_LOADS))
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    """The latest; as recorded."""
    event_count: int = 0

    def family(self, prefix: str) -> dict[str, Curve]:
        """Curves under a name: of ``mtp_losses`` by depth, of ``reward_by_source`` by source."""
        start = f"{prefix}/"
        return {name.removeprefix(start): curve for name, curve in self.curves.items() if name.startswith(start)}


def read_course(path: Path) -> dict[str, StageCourse]:
    """By stage, in the order of the file; nothing if there is none."""
    found: dict[str, StageCourse] = {}
    for row in stream_metrics(path):
        stage = stage_of(row)
        if isinstance(stage, str) and (stage in found or len(found) < MOST_STAGES):
            _add(found.setdefault(stage, StageCourse()), int(row["step"]), row)
    return found


def _add(course: StageCourse, step: int, row: Mapping[str, Any]) -> None:
    course.steps = max(course.steps, step)
    if "event" in row:
        course.events.append(dict(row))
        course.event_count += 1
        return
    if is_load(row.get(EXPERT_LOAD)):
        course.loads.append(Loads(step, row[EXPERT_LOAD]))
    for name, value in _numbers({key: item for key, item in row.items() if key not in (EXPERT_LOAD, "step")}):
        if name in course.curves or len(course.curves) < MOST_CURVES:
            course.curves.setdefault(name, Curve()).add(step, value)


def is_load(value: Any) -> bool:
    """Whether this is what a record of loads holds: rows of natural numbers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and row for row in value)
        and all(type(number) is int and number >= 0 for row in value for number in row)
    )


def _numbers(tree: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Every finite number of a row, with the names that lead to it."""
    if isinstance(tree, bool):
        return
    if isinstance(tree, int | float):
        if math.isfinite(tree):
            yield name, float(tree)
    elif depth < _DEEPEST and isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(item, f"{name}/{key}" if name else str(key), depth + 1)
