"""Causal attention of MLA's naive form, for training and prefill.

Queries and keys have a part without position and a rotary part; the rotary key is one for all heads. The expanded
latent of a token holds each head's key without position, then its value. The rotary part may be 0 wide: heads whose
keys are all their own, as in ordinary attention, give these as the part without position.

Shapes: B batch, T time, H heads, N nope width, R rope width, K = N + R, V value width, X = N + V.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native


def causal_attention_reference(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Softmax attention written out (B, T, H, V): position t sees positions up to t, of its own document if given."""
    q_BHTK, k_BHTK, v_BHTV = _heads_first(q_BTHK, kv_BTHX, k_rope_BTR)
    visible = _visible(q_BTHK.shape[1], document_BT, q_BTHK.device)
    scores_BHTS = (q_BHTK @ k_BHTK.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    return (scores_BHTS.softmax(-1) @ v_BHTV).transpose(1, 2)


def causal_attention(
    q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Same as :func:`causal_attention_reference`, without holding the scores in memory.

    Args:
        document_BT: document of each position; a document's positions follow one another.
    """
    if native.usable(q_BTHK, kv_BTHX, k_rope_BTR):
        first_BT = None if document_BT is None else _first_of_document(document_BT)
        out: Tensor = _NativeAttention.apply(q_BTHK, kv_BTHX, k_rope_BTR, first_BT, scale)
        return out
    # PyTorch's fused kernels want one width for queries, keys and values: the narrower are padded with zeros, which
    # change no score and no output.
    value_width = kv_BTHX.shape[-1] - (q_BTHK.shape[-1] - k_rope_BTR.shape[-1])
    common = max(q_BTHK.shape[-1], value_width)
    q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in _heads_first(q_BTHK, kv_BTHX, k_rope_BTR))
    visible = None if document_BT is None else _visible(q.shape[2], document_BT, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)
    return out[..., :value_width].transpose(1, 2)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, first_BT: Tensor | None, scale: float
    ) -> Tensor:
        q_BTHK, kv_BTHX, k_rope_BTR = q_BTHK.contiguous(), kv_BTHX.contiguous(), k_rope_BTR.contiguous()
        sizes = _sizes(q_BTHK, kv_BTHX, k_rope_BTR)
        batch, time, heads, *_, value = sizes
        out_BTHV, lse_BHT = (
            q_BTHK.new_empty(batch, time, heads, value),
            q_BTHK.new_empty(batch, heads, time, dtype=torch.float32),
        )
        native.call("attention_forward", q_BTHK, kv_BTHX, k_rope_BTR, first_BT, out_BTHV, lse_BHT, *sizes, scale)
        ctx.save_for_backward(q_BTHK, kv_BTHX, k_rope_BTR, first_BT, out_BTHV, lse_BHT)
        ctx.scale = scale
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        q_BTHK, kv_BTHX, k_rope_BTR = saved[:3]
        batch, time, heads, _, rope, _ = sizes = _sizes(q_BTHK, kv_BTHX, k_rope_BTR)
        dq_BTHK, dkv_BTHX = torch.empty_like(q_BTHK), torch.empty_like(kv_BTHX)
        dk_rope_BHTR = q_BTHK.new_empty(batch, heads, time, rope, dtype=torch.float32)
        native.call(
            "attention_backward", grads[0].contiguous(), *saved, dq_BTHK, dkv_BTHX, dk_rope_BHTR, *sizes, ctx.scale
        )
        return dq_BTHK, dkv_BTHX, dk_rope_BHTR.sum(1).to(k_rope_BTR.dtype), None, None


def _sizes(q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor) -> tuple[int, int, int, int, int, int]:
    batch, time, heads, width = q_BTHK.shape
    rope = k_rope_BTR.shape[-1]
    return batch, time, heads, width - rope, rope, kv_BTHX.shape[-1] - (width - rope)


def _heads_first(q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, whole keys and values as (B, H, T, width)."""
    nope = q_BTHK.shape[-1] - k_rope_BTR.shape[-1]
    k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, q_BTHK.shape[2], -1)
    k_BTHK = torch.cat((kv_BTHX[..., :nope], k_rope_BTHR), -1)
    return q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), kv_BTHX[..., nope:].transpose(1, 2)


def _visible(length: int, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """Boolean mask (T, T) or (B, 1, T, T): may the query (row) see the key (column)?"""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if document_BT is None:
        return causal
    return causal & (document_BT[:, None, :, None] == document_BT[:, None, None, :])


def _first_of_document(document_BT: Tensor) -> Tensor:
    """First position of each position's document (B, T)."""
    position_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    begins_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
    return torch.where(begins_BT, position_T, 0).cummax(1).values
