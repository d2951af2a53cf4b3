"""Speed of training here: whole optimizer steps on random tokens, against the machine's best matrix product.

A step's time hardly depends on what the tokens are, except that random ones load all experts alike.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.errors import InputError
from benthic.model import build_model
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import Compute, compute_dtype
from benthic.train.compute import moments_dtype
from benthic.train.memory import keep_freed_memory
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.schedule import Course
from benthic.train.step import train_step

WARMUP_STEPS = 2


@dataclass(frozen=True)
class TrainSpeed:
    """Fields are the keys of ``benthic bench train --json``."""

    tokens_per_s: float
    """Of the median step."""
    gemm_gflops: float
    """Of a 2048 x 2048 x 2048 product in the same precision and process."""
    share_of_gemm_peak: float
    """Operations of a step (``benthic.plan.flops``, causal attention, MTP included) over time and ``gemm_gflops``."""
    step_seconds: tuple[float, ...]
    batch_size: int
    sequence_length: int
    precision: Compute


def bench_train(config: RunConfig) -> TrainSpeed:
    """Times ``config.train.steps`` steps after two to warm up; nothing is read or written."""
    if config.train.steps is None:
        raise InputError("train.minutes: a benchmark counts steps; give train.steps")
    compute = config.precision.compute
    if compute == "auto":
        raise InputError("precision.compute=auto: a benchmark measures one precision; give fp32 or bf16")
    keep_freed_memory()
    seconds = _step_seconds(config, config.train.steps, compute)
    train = config.train
    tokens_per_s = train.batch_size * train.sequence_length / statistics.median(seconds)
    gemm_gflops = measure_gemm_gflops(compute_dtype(compute))
    flops = training_flops(config.model, train.sequence_length, mtp=True)
    return TrainSpeed(
        tokens_per_s=tokens_per_s, gemm_gflops=gemm_gflops,
        share_of_gemm_peak=tokens_per_s * flops / (gemm_gflops * 1e9),
        step_seconds=tuple(seconds), batch_size=train.batch_size, sequence_length=train.sequence_length,
        precision=compute,
    )  # fmt: skip


def _step_seconds(config: RunConfig, timed: int, compute: Compute) -> list[float]:
    train = config.train
    steps = WARMUP_STEPS + timed
    objective = Objective(build_model(config.model, seed=train.seed))
    optimizer = ModelOptimizer(objective.model, train.optimizer, moments_dtype(compute))
    course = Course(train.schedule, steps, train.batch_size)
    generator = torch.Generator().manual_seed(train.seed)
    size = (train.batch_size, train.sequence_length + 1 + config.model.num_nextn_predict_layers)
    seconds = []
    for step in range(steps):
        batch = Batch(torch.randint(config.model.vocab_size, size, generator=generator), None)
        start = time.perf_counter()
        train_step(
            objective, optimizer, batch, course.at(step),
            micro_batch_size=train.micro_batch_size or train.batch_size, compute=compute,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:]
