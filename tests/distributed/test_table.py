"""Every layout of 1, 2, 4 and 8 processes over four axes, by every schedule: 20 steps as one process takes them."""

import itertools
from functools import cache

import pytest
from processes import run_processes
from spread import ALONE, InFloat32, InFloat64, largest_difference, settings, spread_over, spread_steps, take_steps

from benthic.config.schema import ParallelConfig

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")
LAYERS = {1: 4, 2: 4, 4: 6, 8: 14}
"""By the size of the pipeline, whose stages need some."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def layouts():
    for processes in (1, 2, 4, 8):
        for sizes in itertools.product((1, 2, 4, 8), repeat=4):
            layout = dict(zip(("pipeline", "expert", "shard", "replicate"), sizes, strict=True))
            if ParallelConfig(**layout).processes == processes:
                for schedule in SCHEDULES if sizes[0] > 1 else SCHEDULES[:1]:
                    yield layout | {"schedule": schedule}


def name(layout):
    axes = [f"{axis}{size}" for axis, size in layout.items() if axis != "schedule" and size > 1]
    return "-".join([*axes, layout["schedule"]] if layout["pipeline"] > 1 else axes or ["alone"])


def architecture(dtype):
    return InFloat64() if dtype == "float64" else InFloat32()


def config_of(layers, rows, mtp, compute, dtype):
    """In fp32 weights and rates are as published: where a step changes much, the last digit, which depends on the order
    of additions, decides what FP8 rounds to and which expert is chosen. With FP8 one choice in thousands still falls
    otherwise, whereupon the routers' bias moves the other way; there each token visits all experts.
    """
    model, optimizer = {"num_hidden_layers": layers, "num_nextn_predict_layers": mtp}, {"clip_norm": 0.5}
    if dtype == "float32":
        model |= {"initializer_range": 0.006}
        if compute == "fp8":
            model |= {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}
    rate = 1e-3 if dtype == "float64" else 1e-4
    return settings(
        steps=20, batch_size=rows, model=model, compute=compute, optimizer=optimizer | {"learning_rate": rate}
    )


@cache
def alone(*size_and_dtype):
    return take_steps(config_of(*size_and_dtype), ALONE, architecture(size_and_dtype[-1]))


def spread_all(rank, cases):
    """Each case's steps, by one group of processes."""
    return [spread_steps(rank, config, architecture(dtype)) for config, dtype in cases]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", list(layouts()), ids=name)
def test_a_layout_trains_what_one_process_does(layout):
    """With MTP and without, in fp32 and FP8, over float64 and fp32."""
    processes = ParallelConfig(**layout).processes
    # As many rows as let DualPipeV have a micro-batch for each of its stages.
    sizes = [
        (LAYERS[layout["pipeline"]], 2 * max(processes, 4), mtp, compute, dtype)
        for mtp, compute, dtype in itertools.product((1, 0), ("fp32", "fp8"), TOLERANCE)
    ]
    cases = [(spread_over(config_of(*size), **layout), size[-1]) for size in sizes]
    outcomes, *_ = run_processes(spread_all, processes, cases, timeout=3500)
    for size, outcome in zip(sizes, outcomes, strict=True):
        *_, compute, dtype = size
        # FP8 makes steps of roundings in fp32, which add up in a gradient's norm, and in its moments, which are kept in
        # bf16, more than in losses and weights.
        exact = (compute, dtype) != ("fp8", "float32")
        assert largest_difference(alone(*size), outcome, norms=exact, moments=exact) < TOLERANCE[dtype], size
        if not exact:
            assert largest_difference(alone(*size), outcome, norms=False) < 2 * TOLERANCE[dtype], size
