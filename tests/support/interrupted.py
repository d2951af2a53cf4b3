"""Interrupting training runs, and comparing what they leave with runs that were not interrupted."""

from pathlib import Path
from typing import Any

import pytest

from benthic.train import loop
from benthic.train.metrics import read_metrics

MEASURED = ("tokens_per_s", "share_of_gemm_peak", "seconds", "processor_seconds")
"""Keys of a row that a clock measured."""


class Killed(BaseException):
    """A kill, as far as a process can do it to itself and go on."""


def kill() -> None:
    raise Killed


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Do something as the given step of all stages together (from 1) begins, once."""
    original, count = loop.train_step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)


def course(out: Path) -> list[dict[str, Any]]:
    """Everything in the metrics but what a clock measured."""
    return [
        {key: value for key, value in row.items() if key not in MEASURED} for row in read_metrics(out / "metrics.jsonl")
    ]
