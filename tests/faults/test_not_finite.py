"""NaN and infinity in a run: the step is not taken and its sequences are recorded; several in a row end it."""

import math

import pytest
import torch

from benthic.train import loop
from benthic.train.checkpoint import committed, load
from benthic.train.incidents import Diverged
from benthic.train.loop import train
from benthic.train.metrics import read_metrics


def poison(monkeypatch, steps: set[int], value: float) -> None:
    """Multiply the hidden states of the given steps, counted from 1, by a number that is not finite."""
    real_step, count = loop.train_step, 0

    def step(objective, *args, **kwargs):
        nonlocal count
        count += 1
        if count not in steps:
            return real_step(objective, *args, **kwargs)
        hook = objective.model.transformer.norm.register_forward_hook(lambda module, inputs, out: out * value)
        try:
            return real_step(objective, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_recorded(tiny_run_config, make_run, monkeypatch, value):
    out = make_run()
    poison(monkeypatch, {5, 6, 9}, value)
    result = train(tiny_run_config(), out)
    assert math.isfinite(result.bits_per_byte)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    events = [row for row in read_metrics(out / "metrics.jsonl") if "event" in row]
    assert [(row["step"], row["event"], row["sequences"]) for row in events] == [
        (5, "update skipped", [16, 19]),
        (6, "update skipped", [20, 23]),
        (9, "update skipped", [32, 35]),
    ]
    assert all(row["reason"] == "loss not finite" for row in events)


def test_three_in_a_row_end_the_run_with_its_last_checkpoint_intact(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    poison(monkeypatch, {13, 14, 15}, math.nan)
    with pytest.raises(Diverged, match=r"step 15: loss not finite 3 times in a row, last in sequences 56 to 59"):
        train(tiny_run_config(), out)
    checkpoint = load(committed(out / "checkpoints" / "pretrain")[-1])
    assert checkpoint.state["step"] == 10
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors["model"].values())
