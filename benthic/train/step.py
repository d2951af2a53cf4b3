"""One optimizer step: losses, gradients, the guard against non-finite numbers, the update, the routers' bias.

Shapes: B sequences, K predictions per position, M MoE layers, E experts.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benthic.data.batches import Batch
from benthic.model.moe import Router
from benthic.ops.cross_entropy import IGNORE
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.health import Health, Incident, Trouble
from benthic.train.objective import Losses, Objective, prediction_targets
from benthic.train.optimizer import ModelOptimizer
from benthic.train.schedule import StepSettings


class StepReport(NamedTuple):
    """What a step saw and did."""

    cross_entropy: list[float]
    """Nats per token of the main model, then of each MTP depth."""
    balance: float
    grad_norm: float
    load_ME: Tensor
    updated: bool = False
    """If not, nothing has changed."""
    incident: Incident | None = None
    """What was amiss when the batch was first run; all else here is of the second time."""


class Gradients(Protocol):
    """Adds the gradients of a batch's loss to the parameters', and returns the losses without their graph."""

    def __call__(
        self, objective: Objective, batch: Any, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """Called a second time if the first looked wrong; must then do the same again."""


def train_step(
    objective: Objective,
    optimizer: ModelOptimizer,
    batch: Any,
    settings: StepSettings,
    *,
    micro_batch_size: int,
    compute: Compute,
    health: Health | None = None,
    gradients: Gradients | None = None,
) -> StepReport:
    """Learn from one batch, by ``gradients``: by default, with :func:`accumulate_gradients`, from its next tokens.

    A loss or gradient that is NaN or infinite, or by ``health`` a spike, makes the batch run again. If it happens
    again, what is not finite stops the update before it happens; a spike does as ``health`` says.
    """
    health = health or Health()
    gradients = gradients or accumulate_gradients

    def run() -> StepReport:
        optimizer.zero_grad()
        losses = gradients(objective, batch, settings, micro_batch_size=micro_batch_size, compute=compute)
        numbers = torch.stack([*losses.cross_entropy_K, losses.balance, optimizer.grad_norm()]).tolist()
        *cross_entropy, balance, grad_norm = numbers
        return StepReport(cross_entropy, balance, grad_norm, losses.load_ME)

    report, incident = run(), None
    if trouble := _trouble(health, report):
        first, report = report, run()
        incident = Incident(trouble, first.cross_entropy[0], first.grad_norm, _trouble(health, report))
    updated = health.may_update(incident)
    if updated:
        optimizer.step(settings.learning_rate_factor, report.grad_norm)
        update_router_bias(objective.routers, report.load_ME, settings.bias_speed)
    health.remember(report.cross_entropy[0], report.grad_norm, updated=updated)
    return report._replace(updated=updated, incident=incident)


def _trouble(health: Health, report: StepReport) -> Trouble | None:
    return health.trouble([*report.cross_entropy, report.balance], report.grad_norm)


def accumulate_gradients(
    objective: Objective, batch: Batch, settings: StepSettings, *, micro_batch_size: int, compute: Compute
) -> Losses:
    """Gradients of the batch's loss, a micro-batch at a time, and the batch's losses without their graph.

    Each micro-batch counts by its share of the targets that are not ignored, so that the sum is the loss of the
    whole batch however it is cut.
    """
    predictions = objective.predictions(settings.mtp_weight)
    batch = batch.without_last(1 + len(objective.model.mtp) - predictions)
    targets_KBT = prediction_targets(batch.tokens_BS, batch.document_BS, predictions, batch.learn_BS)
    counts_K = _counted(targets_KBT)
    parts = []
    for start in range(0, len(batch.tokens_BS), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        part = batch.rows(rows)
        losses: Losses = compute_in(compute, objective, part.tokens_BS, part.document_BS, targets_KBT[:, rows])
        share_K = _counted(targets_KBT[:, rows]) / counts_K.clamp_min(1)
        share = len(part.tokens_BS) / len(batch.tokens_BS)
        weighted = Losses(losses.cross_entropy_K * share_K, losses.balance * share, losses.load_ME)
        weighted.total(settings.mtp_weight, settings.balance_weight).backward()
        parts.append(Losses(*(part.detach() for part in weighted)))
    return Losses(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))


@torch.no_grad()
def update_router_bias(routers: list[Router], load_ME: Tensor, speed: float) -> None:
    """Raise the bias of experts below the mean load and lower it above (arXiv 2408.15664; V3 report 2.1.2)."""
    if not speed:
        return
    for router, load_E in zip(routers, load_ME.to(torch.float32), strict=False):  # MTP modules, last, may not have run
        router.bias.add_(torch.sign(load_E.mean() - load_E), alpha=speed)


def _counted(targets_KBT: Tensor) -> Tensor:
    return (targets_KBT != IGNORE).sum((1, 2))
