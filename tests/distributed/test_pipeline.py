"""Runs over the ranks of a pipeline beside the same run on one process: losses, norms, loads and weights are equal."""

import itertools

import pytest
import torch
from pipelines import Case, largest_difference

from benthic.parallel.schedules import KINDS

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(*cases):
    for case, found in largest_difference(list(cases)).items():
        # In bf16, sums over micro-batches and over uses of the embedding are rounded in another order.
        assert found < (1e-2 if case.compute == "bf16" else TOLERANCE[case.dtype]), case


def test_two_processes_with_every_schedule_train_what_one_does():
    check(
        Case(2, "1f1b", 4, steps=4, mtp_until=2),
        Case(2, "zb1p", 4, steps=4),
        Case(2, "interleaved", 4, steps=4, recompute=True, dtype=torch.float32),
        Case(2, "zbv", 4, steps=4, rows=7, mtp=0),
        Case(2, "dualpipev", 4, steps=4, optimizer="muon"),
        Case(2, "dualpipev", 4, steps=2, compute="fp8", dtype=torch.float32),
        Case(2, "zbv", 4, steps=3, compute="bf16", dtype=torch.float32, documents=False),
    )


def test_four_processes_with_a_v_train_what_one_does():
    check(
        Case(4, "dualpipev", 6, steps=3, micro_batches=8, mtp=2),
        Case(4, "1f1b", 6, steps=3, micro_batches=3, compute="fp8"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_whole_table(ranks, schedule, dtype):
    layers, micro_batches = {2: (4, 4), 4: (6, 8), 8: (14, 16)}[ranks]
    for mtp, compute in itertools.product((1, 0), ("fp32", "fp8")):
        check(Case(ranks, schedule, layers, mtp=mtp, compute=compute, dtype=dtype, micro_batches=micro_batches))
