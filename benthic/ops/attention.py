"""Causal attention of MLA's naive form, for training and prefill.

Queries and keys have a part without position and a rotary part; the rotary key is one for all heads. The expanded
latent of a token holds each head's key without position, then its value. The rotary part may be 0 wide: heads whose
keys are all their own, as in ordinary attention, give these as the part without position.

Shapes: B batch, T time, S keys (as many as T, and those before), H heads, N nope width, R rope width, K = N + R,
V value width, X = N + V.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native
from benthic.ops.product import units_for


def causal_attention_reference(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Softmax attention written out (B, T, H, V): position t sees positions up to t, of its own document if given."""
    q_BHTK, k_BHSK, v_BHSV = _heads_first(q_BTHK, kv_BSHX, k_rope_BSR)
    visible = _visible(q_BTHK.shape[1], kv_BSHX.shape[1], document_BT, q_BTHK.device)
    scores_BHTS = (q_BHTK @ k_BHSK.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    return (scores_BHTS.softmax(-1) @ v_BHSV).transpose(1, 2)


def causal_attention(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, *, scale: float, document_BT: Tensor | None = None
) -> Tensor:
    """Same as :func:`causal_attention_reference`, without holding the scores in memory.

    Args:
        q_BTHK: queries of the last T of S positions.
        kv_BSHX: keys without position, and values.
        k_rope_BSR: rotary keys.
        document_BT: document of each position, if all are queried; a document's positions follow one another.
    """
    if native.usable(q_BTHK, kv_BSHX, k_rope_BSR):
        first_BT = None if document_BT is None else _first_of_document(document_BT)
        if not torch.is_grad_enabled():
            return _forward_native(q_BTHK, kv_BSHX, k_rope_BSR, first_BT, scale)[0]
        if q_BTHK.shape[1] == kv_BSHX.shape[1]:
            out: Tensor = _NativeAttention.apply(q_BTHK, kv_BSHX, k_rope_BSR, first_BT, scale)
            return out
    # PyTorch's fused kernels want one width for queries, keys and values: the narrower are padded with zeros, which
    # change no score and no output.
    value_width = kv_BSHX.shape[-1] - (q_BTHK.shape[-1] - k_rope_BSR.shape[-1])
    common = max(q_BTHK.shape[-1], value_width)
    q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in _heads_first(q_BTHK, kv_BSHX, k_rope_BSR))
    whole = document_BT is None and q.shape[2] == k.shape[2]
    visible = None if whole else _visible(q.shape[2], k.shape[2], document_BT, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale)
    return out[..., :value_width].transpose(1, 2)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor, first_BT: Tensor | None, scale: float
    ) -> Tensor:
        q_BTHK, kv_BTHX, k_rope_BTR = q_BTHK.contiguous(), kv_BTHX.contiguous(), k_rope_BTR.contiguous()
        out_BTHV, lse_BHT = _forward_native(q_BTHK, kv_BTHX, k_rope_BTR, first_BT, scale)
        ctx.save_for_backward(q_BTHK, kv_BTHX, k_rope_BTR, first_BT, out_BTHV, lse_BHT)
        ctx.scale, ctx.units = scale, units_for(q_BTHK)
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
            "attention_backward", grads[0].contiguous(), *saved, dq_BTHK, dkv_BTHX, dk_rope_BHTR, *sizes, ctx.scale,
            int(ctx.units),
        )  # fmt: skip
        return dq_BTHK, dkv_BTHX, dk_rope_BHTR.sum(1).to(k_rope_BTR.dtype), None, None


@native.unhooked
def _forward_native(
    q_BTHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, first_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The outcome, and for the backward pass the logarithm of each row's sum of exponentials."""
    q_BTHK, kv_BSHX, k_rope_BSR = q_BTHK.contiguous(), kv_BSHX.contiguous(), k_rope_BSR.contiguous()
    sizes = _sizes(q_BTHK, kv_BSHX, k_rope_BSR)
    batch, time, heads, *_, value = sizes
    out_BTHV = q_BTHK.new_empty(batch, time, heads, value)
    lse_BHT = q_BTHK.new_empty(batch, heads, time, dtype=torch.float32)
    native.call(
        "attention_forward", q_BTHK, kv_BSHX, k_rope_BSR, first_BT, out_BTHV, lse_BHT, *sizes, scale,
        kv_BSHX.shape[1] - time, int(units_for(q_BTHK)),
    )  # fmt: skip
    return out_BTHV, lse_BHT


def _sizes(q_BTHK: Tensor, kv_BTHX: Tensor, k_rope_BTR: Tensor) -> tuple[int, int, int, int, int, int]:
    batch, time, heads, width = q_BTHK.shape
    rope = k_rope_BTR.shape[-1]
    return batch, time, heads, width - rope, rope, kv_BTHX.shape[-1] - (width - rope)


def _heads_first(q_BTHK: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), whole keys and values (B, H, S, width)."""
    nope = q_BTHK.shape[-1] - k_rope_BSR.shape[-1]
    k_rope_BSHR = k_rope_BSR.unsqueeze(2).expand(-1, -1, q_BTHK.shape[2], -1)
    k_BSHK = torch.cat((kv_BSHX[..., :nope], k_rope_BSHR), -1)
    return q_BTHK.transpose(1, 2), k_BSHK.transpose(1, 2), kv_BSHX[..., nope:].transpose(1, 2)


def _visible(queries: int, keys: int, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """Boolean mask (T, S) or (B, 1, T, T): may the query (row) see the key (column)?"""
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if document_BT is None:
        return causal
    return causal & (document_BT[:, None, :, None] == document_BT[:, None, None, :])


def _first_of_document(document_BT: Tensor) -> Tensor:
    """First position of each position's document (B, T)."""
    position_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    begins_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
    return torch.where(begins_BT, position_T, 0).cummax(1).values
