"""Causal attention over expanded keys and values: the naive form of MLA, for training and prefill.

Shapes: B batch, T queries and keys, H heads, K query/key width, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention_reference(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Softmax attention written out: position t sees positions up to t, of its own document if these are given."""
    scores_BHTS = (q_BHTK @ k_BHTK.transpose(-1, -2)) * scale
    visible = _visible(q_BHTK.shape[2], document_BT, q_BHTK.device)
    return scores_BHTS.masked_fill(~visible, float("-inf")).softmax(-1) @ v_BHTV


def causal_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Same as :func:`causal_attention_reference`, without holding the scores in memory.

    The fused kernels want one width for queries, keys and values, so the narrower are padded with zeros, which
    change no score and no output.
    """
    width, value_width = q_BHTK.shape[-1], v_BHTV.shape[-1]
    common = max(width, value_width)
    q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in (q_BHTK, k_BHTK, v_BHTV))
    if document_BT is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        visible = _visible(q.shape[2], document_BT, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return out[..., :value_width]


def _visible(length: int, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """Boolean mask (T, T) or (B, 1, T, T): may the query (row) see the key (column)?"""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if document_BT is None:
        return causal
    return causal & (document_BT[:, None, :, None] == document_BT[:, None, None, :])
