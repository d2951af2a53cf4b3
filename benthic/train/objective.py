"""What pretraining minimises: the next token, the tokens after it, and balance between experts.

Shapes: B sequences, T positions, D depths of multi-token prediction, S = T + 1 + D tokens, K = 1 + D predictions,
M MoE layers, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benthic.model import Trainable
from benthic.model.moe import Router
from benthic.ops.cross_entropy import IGNORE, linear_cross_entropy
from benthic.parallel.stages import routers_here


class Losses(NamedTuple):
    """Parts of the objective over some sequences, unweighted."""

    cross_entropy_K: Tensor
    """Mean nats per token of the main model, then of each MTP depth."""
    balance: Tensor
    """Per-sequence balance loss summed over MoE layers."""
    load_ME: Tensor
    """Tokens each expert received, int64."""

    def total(self, mtp_weight: float, balance_weight: float) -> Tensor:
        """Main loss + mtp_weight x mean over depths + balance_weight x balance (V3 report eq. 17, 24, 25)."""
        loss = self.cross_entropy_K[0] + balance_weight * self.balance
        if len(self.cross_entropy_K) > 1:
            loss = loss + mtp_weight * self.cross_entropy_K[1:].mean()
        return loss


class Objective(nn.Module):
    """A language model with its losses, as one module, so that precision can be applied to all of it."""

    def __init__(self, model: Trainable) -> None:
        super().__init__()
        self.model = model

    def predictions(self, mtp_weight: float) -> int:
        """Tokens predicted at each position: MTP modules that count for nothing are not run."""
        return 1 + (len(self.model.mtp) if mtp_weight else 0)

    @property
    def routers(self) -> list[Router | None]:
        """Routers in the order of the rows of ``load_ME``, which has none for MTP modules that did not run.

        None stands for one that another rank of a pipeline holds.
        """
        return routers_here(self.model)

    def forward(self, tokens_BS: Tensor, document_BS: Tensor | None, targets_KBT: Tensor) -> Losses:
        """Losses of whole sequences.

        Args:
            tokens_BS: T + K tokens of each sequence.
            document_BS: document of each token, if attention and prediction stay within documents.
            targets_KBT: from :func:`prediction_targets`; as many MTP modules run as it has rows beyond the first.
        """
        inputs = slice(None, tokens_BS.shape[1] - 1)
        document_BI = None if document_BS is None else document_BS[:, inputs]
        states, routings = self.model.training_hidden(tokens_BS[:, inputs], document_BI, depths=len(targets_KBT) - 1)
        nats_K = cross_entropies(states, self.model.transformer.head.weight, targets_KBT)
        if not routings:
            return Losses(nats_K, tokens_BS.new_zeros((), dtype=torch.float32), tokens_BS.new_zeros(0, 1))
        balance = torch.stack([routing.balance_loss for routing in routings]).sum()
        return Losses(nats_K, balance, torch.stack([routing.load_E for routing in routings]))


def cross_entropies(states: list[Tensor], head_VD: Tensor, targets_KBT: Tensor) -> Tensor:
    """Mean nats per token (K,) of each prediction's states (B, T, D)."""
    return torch.stack(
        [
            linear_cross_entropy(state_BTD.flatten(0, 1), head_VD, target_BT.flatten())
            for state_BTD, target_BT in zip(states, targets_KBT, strict=True)
        ]
    )


def prediction_targets(
    tokens_BS: Tensor, document_BS: Tensor | None, predictions: int, learn_BS: Tensor | None = None
) -> Tensor:
    """What each position is to predict (K, B, T): k-th row, token i + 1 + k; ``IGNORE`` if of another document.

    A prediction within one document uses only inputs of that document, so nothing else need be masked. With
    ``learn_BS``, only tokens marked there are predicted, at whatever depth.
    """
    length = tokens_BS.shape[1] - predictions
    shifted = [slice(1 + k, 1 + k + length) for k in range(predictions)]
    targets_KBT = torch.stack([tokens_BS[:, shift] for shift in shifted])
    if document_BS is not None:
        same_KBT = torch.stack([document_BS[:, shift] == document_BS[:, :length] for shift in shifted])
        targets_KBT = targets_KBT.where(same_KBT, IGNORE)
    if learn_BS is not None:
        targets_KBT = targets_KBT.where(torch.stack([learn_BS[:, shift] for shift in shifted]), IGNORE)
    return targets_KBT
