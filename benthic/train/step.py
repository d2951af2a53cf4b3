"""One optimizer step: losses, gradients, the guard against non-finite numbers, the update, the routers' bias.

Shapes: B sequences, K predictions per position, M MoE layers, E experts.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benthic.data.batches import Batch
from benthic.model.moe import Router
from benthic.ops.cross_entropy import IGNORE
from benthic.parallel.stages import pipeline_of
from benthic.parallel.world import ALONE, World
from benthic.precision.compute import Compute
from benthic.precision.weight_copies import quantised_once
from benthic.train.compute import compute_in
from benthic.train.health import Health, Incident, Trouble
from benthic.train.objective import Losses, Objective, prediction_targets
from benthic.train.optimizer import ModelOptimizer
from benthic.train.pipelined import Pass, learn
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
    world: World = ALONE,
) -> StepReport:
    """Learn from one batch, by ``gradients``: by default, with :func:`accumulate_gradients`, from its next tokens.

    A loss or gradient that is NaN or infinite, or by ``health`` a spike, makes the batch run again. If it happens
    again, what is not finite stops the update before it happens; a spike does as ``health`` says. All processes of
    ``world`` see the same numbers, and so do the same.
    """
    health = health or Health()
    gradients = gradients or accumulate_gradients

    def run() -> StepReport:
        optimizer.zero_grad()
        with quantised_once():
            losses = gradients(objective, batch, settings, micro_batch_size=micro_batch_size, compute=compute)
        parts = torch.stack([*losses.cross_entropy_K, losses.balance])
        parts, norm, load_ME = world.agree(parts, optimizer.grad_norm(), losses.load_ME)
        *cross_entropy, balance, grad_norm = [*parts.tolist(), norm.item()]
        return StepReport(cross_entropy, balance, grad_norm, load_ME)

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
    objective: Objective,
    batch: Batch,
    settings: StepSettings,
    *,
    micro_batch_size: int,
    compute: Compute,
    world: World = ALONE,
) -> Losses:
    """Gradients of the batch's loss, a micro-batch at a time, and the batch's losses without their graph.

    Each micro-batch counts by its share of the targets that are not ignored, so that the sum is the loss of the
    whole batch however it is cut. ``batch`` has the rows of this process; its losses are its part of the whole.
    """
    predictions = objective.predictions(settings.mtp_weight)
    batch = batch.without_last(1 + len(objective.model.mtp) - predictions)
    targets_KBT = prediction_targets(batch.tokens_BS, batch.document_BS, predictions, batch.learn_BS)
    own = torch.tensor([*_counted(targets_KBT).tolist(), len(batch.tokens_BS)], device=batch.tokens_BS.device)
    *counted, sequences = world.total(own)
    counts_K = torch.stack(counted)
    precise = torch.promote_types(next(objective.parameters()).dtype, torch.float32)
    passes = []
    for number in range(world.passes(int(sequences), micro_batch_size)):
        rows = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
        part, part_KBT = batch.rows(rows), targets_KBT[:, rows]
        share_K = (_counted(part_KBT).double() / counts_K.clamp_min(1)).to(precise)
        share = len(part.tokens_BS) / int(sequences)
        if not len(part.tokens_BS):
            # The others need this process beside them, though it has nothing left to do.
            part, part_KBT = _nothing(batch), _nothing_to_predict(targets_KBT)
        passes.append(Pass(part, part_KBT, share_K, share))
    if pipeline := pipeline_of(objective.model):
        return learn(pipeline, objective, passes, settings, compute)
    parts = []
    for number, (part, part_KBT, share_K, share) in enumerate(passes, start=1):
        world.begin_pass(objective, last=number == len(passes))
        losses: Losses = compute_in(compute, objective, part.tokens_BS, part.document_BS, part_KBT)
        nats_K = losses.cross_entropy_K * share_K.to(losses.cross_entropy_K.device)
        weighted = Losses(nats_K, losses.balance * share, losses.load_ME * bool(share))
        weighted.total(settings.mtp_weight, settings.balance_weight).backward()
        parts.append(Losses(*(part.detach() for part in weighted)))
    return Losses(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))


@torch.no_grad()
def update_router_bias(routers: list[Router | None], load_ME: Tensor, speed: float) -> None:
    """Raise the bias of experts below the mean load and lower it above (arXiv 2408.15664; V3 report 2.1.2)."""
    if not speed:
        return
    for router, load_E in zip(routers, load_ME.to(torch.float32), strict=False):  # MTP modules, last, may not have run
        if router is not None:
            router.bias.add_(torch.sign(load_E.mean() - load_E), alpha=speed)


def _counted(targets_KBT: Tensor) -> Tensor:
    return (targets_KBT != IGNORE).sum((1, 2))


def _nothing(batch: Batch) -> Batch:
    """A sequence that teaches nothing."""
    tokens_1S = batch.tokens_BS.new_zeros(1, batch.tokens_BS.shape[1])
    return Batch(tokens_1S, None if batch.document_BS is None else tokens_1S)


def _nothing_to_predict(targets_KBT: Tensor) -> Tensor:
    return targets_KBT.new_full((len(targets_KBT), 1, targets_KBT.shape[2]), IGNORE)
