"""What goes through the stages of a model that lie on several processes: micro-batches to learn from, or to judge by.

Each process notes what its own stages find, and all of them together have what one process would.

Shapes: B sequences, S tokens, T positions, K predictions, M MoE layers of the whole model, E experts, D model width,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from benthic.data.batches import Batch
from benthic.model import LanguageModel, Routing
from benthic.precision.compute import Compute
from benthic.train.compute import compute_in
from benthic.train.objective import Losses, Objective, cross_entropies
from benthic.train.schedule import StepSettings

if TYPE_CHECKING:
    from benthic.parallel.pipeline import Pipeline


class Pass(NamedTuple):
    """A micro-batch, and what it counts for."""

    batch: Batch
    targets_KBT: Tensor
    share_K: Tensor
    """Of the whole batch's targets."""
    share: float
    """Of its sequences."""


def learn(
    pipeline: "Pipeline", objective: Objective, passes: Sequence[Pass], settings: StepSettings, compute: Compute
) -> Losses:
    """Gradients of these passes, and this process's part of their losses: what its stages have found.

    Loads have rows for all layers of the model.
    """
    from benthic.parallel.shard import whole_for_step  # takes a second, and one process alone has no use for it

    model = objective.model
    assert isinstance(model, LanguageModel)
    experts = model.config.n_routed_experts
    predictions = len(passes[0].targets_KBT)
    found = Losses(
        torch.zeros(predictions, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
        torch.zeros(len(objective.routers) - len(model.mtp) + predictions - 1, experts, dtype=torch.int64),
    )
    with whole_for_step(objective):
        pipeline.backward([_Learned(one, settings, found) for one in passes], *precision(objective, compute))
    pipeline.add_up_copies(model.transformer.embed)
    dtype = next(objective.parameters()).dtype
    return Losses(found.cross_entropy_K.to(dtype), found.balance.to(dtype), found.load_ME)


def precision(module: nn.Module, compute: Compute) -> tuple[Callable[..., Any], torch.dtype]:
    """How stages of the module are called, and what their states are."""
    dtype = torch.bfloat16 if compute == "bf16" else next(module.parameters()).dtype
    return partial(compute_in, compute), dtype


class _Learned:
    """A pass on its way through the stages; ``found`` takes what those of this process see of all passes."""

    def __init__(self, one: Pass, settings: StepSettings, found: Losses) -> None:
        self.depths = len(one.targets_KBT) - 1
        self.tokens_BS = one.batch.tokens_BS[:, :-1]
        documents_BS = one.batch.document_BS
        self.document_BT = None if documents_BS is None else documents_BS[:, : one.targets_KBT.shape[2]]
        self._pass, self._settings, self._found = one, settings, found

    def routed(self, first: int, routings: list[Routing]) -> Tensor | None:
        """The balance loss, weighted."""
        if not routings:
            return None
        balance = torch.stack([routing.balance_loss for routing in routings]).sum() * self._pass.share
        self._found.balance.add_(balance.detach())
        if self._pass.share:
            for number, routing in enumerate(routings, start=first):
                self._found.load_ME[number] += routing.load_E
        return balance * self._settings.balance_weight

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """The main loss, and the mean of those of MTP modules, weighted."""
        nats_K = cross_entropies(states, head_VD, self._pass.targets_KBT) * self._pass.share_K
        self._found.cross_entropy_K.add_(nats_K.detach())
        return self._found._replace(cross_entropy_K=nats_K, balance=nats_K.new_zeros(())).total(
            self._settings.mtp_weight, 0.0
        )
