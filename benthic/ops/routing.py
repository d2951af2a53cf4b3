"""Which experts a token visits, and with what weight (V3 report section 2.1.2, equations 12 to 20).

Shapes: N tokens, E experts, G groups, K experts per token, B sequences, T time.
"""

import torch
from torch import Tensor


def select_experts(scores_NE: Tensor, bias_E: Tensor, *, n_group: int, topk_group: int, top_k: int) -> Tensor:
    """Indices (N, K) of the chosen experts.

    A token first picks the ``topk_group`` groups whose two best experts score highest together, then its best
    experts within them. The bias steers this choice and nothing else.
    """
    biased_NE = scores_NE + bias_E
    if topk_group < n_group:
        grouped_NGe = biased_NE.unflatten(-1, (n_group, -1))
        group_score_NG = grouped_NGe.topk(min(2, grouped_NGe.shape[-1]), -1).values.sum(-1)
        chosen_NG = torch.zeros_like(group_score_NG, dtype=torch.bool)
        chosen_NG.scatter_(-1, group_score_NG.topk(topk_group, -1).indices, True)
        biased_NE = grouped_NGe.masked_fill(~chosen_NG[..., None], float("-inf")).flatten(-2)
    return biased_NE.topk(top_k, -1, sorted=False).indices


def gate_values(scores_NE: Tensor, index_NK: Tensor, *, normalise: bool, scale: float) -> Tensor:
    """Weights (N, K) of the chosen experts: their unbiased scores, normalised over the choice, then scaled."""
    gate_NK = scores_NE.gather(-1, index_NK)
    if normalise:
        gate_NK = gate_NK / (gate_NK.sum(-1, keepdim=True) + 1e-20)
    return gate_NK * scale


def sequence_balance_loss(scores_BTE: Tensor, index_BTK: Tensor) -> Tensor:
    """Per-sequence balance loss, averaged over sequences; 1 where every expert is equally loaded.

    Equations 17 to 20: the sum over experts of (share of the sequence's choices, times E) and (mean normalised
    score). Gradients flow through the scores only.
    """
    experts, top_k = scores_BTE.shape[-1], index_BTK.shape[-1]
    chosen_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add_(
        -1, index_BTK.flatten(1), torch.ones_like(index_BTK.flatten(1), dtype=scores_BTE.dtype)
    )
    share_BE = chosen_BE * (experts / (top_k * scores_BTE.shape[1]))
    mean_score_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    return (share_BE * mean_score_BE).sum(-1).mean()


def expert_load(index_NK: Tensor, n_experts: int) -> Tensor:
    """Tokens each expert received (E,), int64."""
    return torch.bincount(index_NK.flatten(), minlength=n_experts)
