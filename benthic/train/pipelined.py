"""A training step of a model whose layers lie on several ranks: the losses and gradients that one process has.

Shapes: B sequences, S tokens, T positions, K predictions, M MoE layers of the whole model, E experts, D model width,
V vocabulary.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from benthic.data.batches import Batch
from benthic.model import LanguageModel, Routing
from benthic.ops.cross_entropy import IGNORE
from benthic.parallel.pipeline import Pipeline
from benthic.parallel.schedules import Schedule, ranks_of_stages, stages_of_rank
from benthic.parallel.stages import drop_other_stages, make_stages
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import Losses, Objective, cross_entropies, prediction_targets
from benthic.train.schedule import StepSettings


class PipelinedGradients:
    """``Gradients`` by pipeline; from its making on, the objective holds this rank's stages only.

    The ranks of ``group`` read the same batches. A rank's losses are of the whole model.

    Args:
        objective: of the whole model, the same on every rank.
        layers: of each stage, as :func:`benthic.parallel.cut.cut` gives them.
    """

    def __init__(self, objective: Objective, layers: list[range], schedule: Schedule, group: ProcessGroup) -> None:
        model = objective.model
        assert isinstance(model, LanguageModel)
        self._group, self._rank = group, group.rank()
        held = stages_of_rank(schedule, group.size(), self._rank)
        stages = make_stages(model, layers, held)
        drop_other_stages(model, stages)
        self._pipeline = Pipeline(stages, schedule, group)
        self._embedding, self._dtype = model.transformer.embed, next(model.parameters()).dtype
        self._experts = model.config.n_routed_experts
        last = ranks_of_stages(schedule, group.size())[-1]
        self._last = last if len(model.mtp) else 0
        """The rank that embeds for MTP modules."""
        self.copies = {"transformer.embed.weight"} if self._last == self._rank != 0 else set[str]()
        """Names of the model's parameters that another rank holds too and counts in its norm."""

    def __call__(
        self, objective: Objective, batch: Batch, settings: StepSettings, *, micro_batch_size: int, compute: Compute
    ) -> Losses:
        """As :func:`benthic.train.step.accumulate_gradients`."""
        predictions = objective.predictions(settings.mtp_weight)
        batch = batch.without_last(1 + len(objective.model.mtp) - predictions)
        targets_KBT = prediction_targets(batch.tokens_BS, batch.document_BS, predictions, batch.learn_BS)
        counts_K = _counted(targets_KBT)
        found = _Found()
        micro_batches = []
        for start in range(0, len(batch.tokens_BS), micro_batch_size):
            rows = slice(start, start + micro_batch_size)
            part, targets = batch.rows(rows), targets_KBT[:, rows]
            share = len(part.tokens_BS) / len(batch.tokens_BS)
            share_K = _counted(targets) / counts_K.clamp_min(1)
            micro_batches.append(_Learned(part, targets, share_K, share, settings, found))
        dtype = torch.bfloat16 if compute == "bf16" else self._dtype
        self._pipeline.backward(micro_batches, partial(compute_in, compute), dtype)
        if self._last:
            self._add_up_embedding_gradients()
        return self._of_all_stages(found, predictions, len(objective.routers) - len(objective.model.mtp) + predictions - 1)

    def _add_up_embedding_gradients(self) -> None:
        """Of the first and the last rank, on both: the last has none in a step without MTP."""
        if self._rank not in (0, self._last):
            return
        weight = self._embedding.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if self._rank == 0:
            other = torch.empty_like(weight.grad)
            dist.recv(other, group=self._group, group_src=self._last)
            weight.grad += other
            dist.send(weight.grad, group=self._group, group_dst=self._last)
        else:
            dist.send(weight.grad, group=self._group, group_dst=0)
            dist.recv(weight.grad, group=self._group, group_src=0)

    def _of_all_stages(self, found: "_Found", predictions: int, layers: int) -> Losses:
        """The losses, of whose parts each was found by one rank."""
        numbers = torch.zeros(predictions + 1, dtype=torch.float64)
        load_ME = torch.zeros(layers, self._experts, dtype=torch.int64)
        for nats_K in found.nats:
            numbers[:-1] += nats_K
        for balance in found.balances:
            numbers[-1] += balance
        for layer, load_E in found.loads:
            load_ME[layer] += load_E
        dist.all_reduce(numbers, group=self._group)
        dist.all_reduce(load_ME, group=self._group)
        *nats, balance = numbers.to(self._dtype)
        return Losses(torch.stack(nats), balance, load_ME)


@dataclass
class _Found:
    """What this rank's stages find out about a batch's micro-batches."""

    nats: list[Tensor] = field(default_factory=list)
    """Each micro-batch's part of the mean (K,)."""
    balances: list[Tensor] = field(default_factory=list)
    loads: list[tuple[int, Tensor]] = field(default_factory=list)
    """By number of the MoE layer."""


class _Learned:
    """A micro-batch on its way through the stages; ``share_K`` of the batch's targets and ``share`` of its rows."""

    def __init__(
        self, part: Batch, targets_KBT: Tensor, share_K: Tensor, share: float, settings: StepSettings, found: _Found
    ) -> None:
        self.depths = len(targets_KBT) - 1
        self.tokens_BS = part.tokens_BS[:, :-1]
        self.document_BT = None if part.document_BS is None else part.document_BS[:, : targets_KBT.shape[2]]
        self._targets_KBT, self._share_K, self._share = targets_KBT, share_K, share
        self._settings, self._found = settings, found

    def routed(self, first: int, routings: list[Routing]) -> Tensor | None:
        """The balance loss, weighted."""
        if not routings:
            return None
        balance = torch.stack([routing.balance_loss for routing in routings]).sum() * self._share
        self._found.balances.append(balance.detach())
        self._found.loads += [(first + number, routing.load_E) for number, routing in enumerate(routings)]
        return balance * self._settings.balance_weight

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """The main loss, and the mean of those of MTP modules, weighted."""
        nats_K = cross_entropies(states, head_VD, self._targets_KBT) * self._share_K
        self._found.nats.append(nats_K.detach())
        return Losses(nats_K, nats_K.new_zeros(()), self._targets_KBT).total(self._settings.mtp_weight, 0.0)


def _counted(targets_KBT: Tensor) -> Tensor:
    return (targets_KBT != IGNORE).sum((1, 2))
