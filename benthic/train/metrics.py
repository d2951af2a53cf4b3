"""metrics.jsonl: one JSON object a line for every step, validation and event of a run, in order and without gaps.

Every row names its stage, and its step within that stage.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from benthic.config.stages import PRETRAIN
from benthic.files import write_atomically
from benthic.train.track import Tracker, numbers


class MetricsLog:
    """Appends a stage's rows to a file, and sends their numbers on to trackers, which it closes.

    Opening it drops the rows after ``step``, which a resumed run will write again. ``earlier`` are the stages before
    this one with their steps: trackers, which know no stages, count on from them.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        step: int,
        *,
        earlier: Mapping[str, int] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._path, self._stage, self._earlier, self._trackers = path, stage, earlier or {}, trackers
        self._file = self._open_after(step)

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``."""
        self._file.close()
        self._file = self._open_after(step)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, which has a ``step``. NaN and infinity, which JSON lacks, are written as null."""
        self._file.write(json.dumps({"stage": self._stage, **_finite(row)}, allow_nan=False) + "\n")
        if "event" not in row:
            for tracker in self._trackers:
                tracker.log(sum(self._earlier.values()) + row["step"], numbers(row))

    def sync(self) -> None:
        """Push all rows to the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _open_after(self, step: int) -> TextIO:
        kept = [line for line, row in _rows(self._path) if self._is_kept(row, step)]
        write_atomically(self._path, "".join(kept))
        # A line reaches the system as soon as it is whole: a kill loses nothing of it.
        return self._path.open("a", encoding="utf-8", buffering=1)

    def _is_kept(self, row: dict[str, Any], step: int) -> bool:
        stage = stage_of(row)
        return stage in self._earlier or (stage == self._stage and int(row["step"]) <= step)


def read_metrics(path: Path, stage: str | None = None) -> list[dict[str, Any]]:
    """All whole rows of a metrics file, or those of one stage."""
    return [row for _, row in _rows(path) if stage is None or stage_of(row) == stage]


def stream_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a metrics file, one at a time: a long run's are more than memory should hold."""
    return (row for _, row in _rows(path))


def stage_of(row: dict[str, Any]) -> Any:
    """The name of the stage that a row is of."""
    # Before runs had stages, rows named none.
    return row.get("stage", PRETRAIN)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines, each as it stands and as it reads; the last is left out if a power cut tore it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if line.endswith("\n") and (row := _row(line)) is not None:
                yield line, row


def _row(line: str) -> dict[str, Any] | None:
    """A line as an object with a step, if that is what it is."""
    try:
        row = json.loads(line)
        return row if int(row["step"]) >= 0 else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
