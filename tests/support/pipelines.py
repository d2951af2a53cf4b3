"""Training runs of a few steps on one process and on the ranks of a pipeline, and what is compared of them."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig, OptimizerConfig
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.parallel.cut import computed_costs, cut
from benthic.parallel.schedules import KINDS, Schedule
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.pipelined import PipelinedGradients
from benthic.train.recompute import recompute_activations
from benthic.train.schedule import StepSettings
from benthic.train.step import accumulate_gradients, update_router_bias

LENGTH = 10


@dataclass(frozen=True)
class Case:
    """One run."""

    ranks: int
    schedule: Schedule
    layers: int
    mtp: int = 1
    compute: str = "fp32"
    dtype: torch.dtype = torch.float64
    micro_batches: int = 4
    rows: int | None = None
    """Sequences of a batch; by default one for each micro-batch."""
    documents: bool = True
    recompute: bool = False
    optimizer: str = "adamw"
    steps: int = 20
    mtp_until: int = 1000
    """The step from which on MTP counts for nothing."""

    @property
    def config(self) -> ModelConfig:
        sizes = {"hidden_size": 32, "num_hidden_layers": self.layers, "num_nextn_predict_layers": self.mtp}
        return PRESETS["tiny"].model_copy(update={"vocab_size": 96, "initializer_range": 0.2, **sizes})

    def batch(self, step: int) -> Batch:
        rows = self.rows or self.micro_batches
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(96, (rows, LENGTH + 1 + self.mtp), generator=generator)
        document = torch.rand(tokens.shape, generator=generator).lt(0.2).cumsum(1) if self.documents else None
        return Batch(tokens, document)

    def settings(self, step: int) -> StepSettings:
        weight = 0.3 if self.mtp and step < self.mtp_until else 0.0
        return StepSettings(0, self.rows or self.micro_batches, 1.0, 0.01, weight, 0.02)

    @property
    def micro_batch_size(self) -> int:
        return -(-(self.rows or self.micro_batches) // self.micro_batches)


@dataclass
class Outcome:
    """Losses and norms of every step, loads of the last, and the weights after it by name."""

    losses: list[list[float]]
    load_ME: Tensor
    weights: dict[str, Tensor]


def run_alone(case: Case) -> Outcome:
    """On one process."""
    objective = _objective(case)
    return _train(case, objective, accumulate_gradients, set())


def run_on_rank(rank: int, cases: list[Case]) -> list[Outcome]:
    """One rank's part of several runs, one after the other."""
    return [_run_on_rank(case) for case in cases]


def _run_on_rank(case: Case) -> Outcome:
    objective = _objective(case)
    stages = case.ranks * KINDS[case.schedule].stages_per_rank
    layers = cut(computed_costs(case.config, LENGTH, mtp=bool(case.mtp)), stages)
    gradients = PipelinedGradients(objective, layers, case.schedule, dist.group.WORLD)
    return _train(case, objective, gradients, gradients.copies)


def _objective(case: Case) -> Objective:
    model = build_model(case.config, seed=1, dtype=case.dtype)
    if case.recompute:
        recompute_activations(model)
    return Objective(model)


def _train(case: Case, objective: Objective, gradients: Any, copies: set[str]) -> Outcome:
    config = OptimizerConfig(name=case.optimizer, learning_rate=0.003, clip_norm=0.5)
    optimizer = ModelOptimizer(objective.model, config)
    losses = []
    for step in range(case.steps):
        optimizer.zero_grad()
        settings = case.settings(step)
        found = gradients(
            objective, case.batch(step), settings, micro_batch_size=case.micro_batch_size, compute=case.compute
        )
        norm = _norm(objective, copies)
        losses.append([*found.cross_entropy_K.tolist(), float(found.balance), float(norm)])
        optimizer.step(1.0, norm)
        update_router_bias(objective.routers, found.load_ME, settings.bias_speed)
    weights = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    return Outcome(losses, found.load_ME, weights)


def _norm(objective: Objective, copies: set[str]) -> Tensor:
    squares = [
        parameter.grad.double().square().sum()
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is not None and name not in copies
    ]
    total = torch.stack(squares).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def largest_difference(cases: list[Case]) -> dict[Case, float]:
    """Of each case between one process and as many as it has ranks, which is the same for all of them."""
    ranks = {case.ranks for case in cases}
    by_rank = run_processes(run_on_rank, *ranks, cases, timeout=280.0)
    return {
        case: difference(together([outcomes[number] for outcomes in by_rank]), _alone(replace(case, schedule="1f1b")))
        for number, case in enumerate(cases)
    }


_alone = cache(run_alone)
"""Schedules have no say in what one process does."""


def together(outcomes: list[Outcome]) -> Outcome:
    """One run's, out of its ranks'; what several ranks hold must be equal bit for bit."""
    whole: dict[str, Tensor] = {}
    for outcome in outcomes:
        assert outcome.losses == outcomes[0].losses
        assert torch.equal(outcome.load_ME, outcomes[0].load_ME)
        for name, tensor in outcome.weights.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), name
    return replace(outcomes[0], weights=whole)


def difference(left: Outcome, right: Outcome) -> float:
    """The greatest of any loss or weight, relative to the greatest number of its kind."""
    assert left.weights.keys() == right.weights.keys()
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(left.losses, right.losses, strict=True)]
    pairs += [(tensor, right.weights[name]) for name, tensor in left.weights.items()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)
