"""Interrupting training runs, and comparing what they leave with runs that were not interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benthic.config.stages import PRETRAIN
from benthic.train import loop
from benthic.train.checkpoint import Checkpoint, committed, load
from benthic.train.metrics import read_metrics

MEASURED = (
    "tokens_per_s", "share_of_gemm_peak", "seconds", "processor_seconds", "rollout_seconds", "reward_seconds",
    "bytes_sent",
)  # fmt: skip
"""Keys of a row that a clock measured; and bytes, of which a pipeline's first step in a process sends more."""


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


def assert_same_run(out: Path, whole: Path) -> None:
    """Bit for bit: every stage's last checkpoint, and everything in the metrics but what a clock measured."""
    assert course(out) == course(whole)
    stages = sorted(folder.name for folder in (whole / "checkpoints").iterdir())
    assert sorted(folder.name for folder in (out / "checkpoints").iterdir()) == stages
    for stage in stages:
        left, right = ended(out, stage), ended(whole, stage)
        assert left.state == right.state
        assert left.tensors.keys() == right.tensors.keys()
        for group, tensors in right.tensors.items():
            assert left.tensors[group].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(left.tensors[group][name], tensor), (stage, group, name)


def ended(out: Path, stage: str = PRETRAIN) -> Checkpoint:
    """The last checkpoint of a stage."""
    return load(committed(out / "checkpoints" / stage)[-1])
