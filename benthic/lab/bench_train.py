"""Speed of training here: whole optimizer steps on random tokens, against the machine's best matrix product."""

import statistics
import time
from dataclasses import dataclass

from benthic.config.schema import RunConfig
from benthic.errors import InputError
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import Compute, compute_dtype
from benthic.train.memory import settle_memory
from benthic.train.trial import RandomSequences, Trial, heaviest_mtp


@dataclass(frozen=True)
class TrainSpeed:
    """Fields are the keys of ``benthic bench train --json``."""

    tokens_per_s: float
    """Of the median step."""
    gemm_gflops: float
    """Of a 2048 x 2048 x 2048 product in the same precision and process."""
    share_of_gemm_peak: float
    """Operations of a step (``benthic.plan.flops``, causal attention, MTP where its loss counts) over time and
    ``gemm_gflops``."""
    step_seconds: tuple[float, ...]
    batch_size: int
    sequence_length: int
    precision: Compute


def bench_train(config: RunConfig) -> TrainSpeed:
    """Times ``config.train.steps`` full batches after two to warm up; nothing is read or written.

    Where the run has steps with and without MTP, those with it are timed.
    """
    if config.train.steps is None:
        raise InputError("train.minutes: a benchmark counts steps; give train.steps")
    if config.parallel.processes > 1:
        raise InputError("parallel: a benchmark is of one process; benchmarks/parallel.py measures several")
    compute = config.precision.compute
    if compute == "auto":
        raise InputError("precision.compute=auto: a benchmark measures one precision; give fp32, fp32-tiles or bf16")
    settle_memory()
    seconds = _step_seconds(config, config.train.steps, compute)
    train = config.train
    tokens_per_s = train.batch_size * train.sequence_length / statistics.median(seconds)
    gemm_gflops = measure_gemm_gflops(compute_dtype(compute), train.device)
    flops = training_flops(config.model, train.sequence_length, mtp=heaviest_mtp(config) > 0)
    return TrainSpeed(
        tokens_per_s=tokens_per_s, gemm_gflops=gemm_gflops,
        share_of_gemm_peak=tokens_per_s * flops / (gemm_gflops * 1e9),
        step_seconds=tuple(seconds), batch_size=train.batch_size, sequence_length=train.sequence_length,
        precision=compute,
    )  # fmt: skip


def _step_seconds(config: RunConfig, timed: int, compute: Compute) -> list[float]:
    trial = Trial(config, RandomSequences(config), compute).warm_up()
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        trial.step()
        seconds.append(time.perf_counter() - start)
    return seconds
