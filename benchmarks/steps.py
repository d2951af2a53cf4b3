"""What the benchmarks of training share: a training step as a function, and steps of several kinds in turns.

Steps of different kinds alternate within one process, so that a busy moment falls on all of them.
"""

import statistics
import time
from collections.abc import Callable

import torch

from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.precision.compute import Compute
from benthic.train.compute import moments_dtype
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.recompute import recompute_activations
from benthic.train.schedule import Course
from benthic.train.step import train_step

WARMUP_STEPS = 2
Step = Callable[[torch.Tensor], None]


def training_step(config: RunConfig, compute: Compute = "fp32") -> Step:
    """A step of a fresh model on a batch of tokens, as `benthic train` takes it."""
    model = build_model(config.model)
    if config.train.recompute:
        recompute_activations(model)
    objective = Objective(model)
    optimizer = ModelOptimizer(model, config.train.optimizer, moments_dtype(compute))
    settings = Course(config.train.schedule, 100, config.train.batch_size).at(50)
    micro = config.train.micro_batch_size or config.train.batch_size

    def step(tokens_BS: torch.Tensor) -> None:
        train_step(objective, optimizer, Batch(tokens_BS, None), settings, micro_batch_size=micro, compute=compute)

    return step


def seconds_in_turns(steps: dict[str, Step], config: RunConfig, repeats: int) -> dict[str, list[float]]:
    """Times of each step over batches that all of them see, after warming up; entry i of all is of one moment."""
    length = config.train.sequence_length + 1 + config.model.num_nextn_predict_layers
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARMUP_STEPS + repeats):
        tokens_BS = torch.randint(config.model.vocab_size, (config.train.batch_size, length))
        for name, step in steps.items():
            start = time.perf_counter()
            step(tokens_BS)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[WARMUP_STEPS:] for name, times in seconds.items()}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over moments of one step's time over another's: drift of the machine falls out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
