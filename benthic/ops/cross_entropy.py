"""Cross-entropy of a linear head, fused so that the logits of a whole batch never exist at once.

Shapes: N positions, D model width, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native
from benthic.ops.product import multiply
from benthic.ops.wanted import wanted

IGNORE = -100
"""Targets with this value count for nothing."""

_CHUNK = 512
_MOST = 0.75
"""Share of positions with a target, up to which the others are left out: to copy what is kept costs less then."""


def linear_cross_entropy_reference(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Mean over counted targets of -log softmax(x @ weight.T)[target], in nats."""
    return F.cross_entropy((x_ND @ weight_VD.T).float(), target_N, ignore_index=IGNORE)


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Same as :func:`linear_cross_entropy_reference`; 0 if no target counts.

    Gradients are computed chunk by chunk during the forward pass, while a chunk's logits are at hand, so that
    nothing of size (N, V) is kept or built twice. Where a good part of the positions has no target, as in prompts,
    they are left out.
    """
    counted_N = target_N != IGNORE
    if counted_N.sum() <= _MOST * len(target_N):
        x_ND, target_N = x_ND[counted_N], target_N[counted_N]
    loss: Tensor = _LinearCrossEntropy.apply(x_ND, weight_VD, target_N)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        counted = int((target_N != IGNORE).sum())
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        # Sums over chunks are kept in at least fp32; autograd rounds them to the weight's dtype once.
        precise = torch.promote_types(x_ND.dtype, torch.float32)
        dweight_VD = torch.zeros_like(weight_VD, dtype=precise) if needs_weight else None
        total = torch.zeros((), dtype=precise, device=x_ND.device)
        buffer_CV = x_ND.new_empty(min(_CHUNK, len(x_ND)), len(weight_VD))
        for start in range(0, len(x_ND), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logits_CV = buffer_CV[: len(x_ND) - start]
            multiply(x_ND[rows], weight_VD.T, logits_CV)
            nats, dlogits_CV = _chunk_loss(logits_CV, target_N[rows], max(counted, 1))
            total += nats
            if dx_ND is not None:
                multiply(dlogits_CV, weight_VD, dx_ND[rows])
            if dweight_VD is not None:
                multiply(dlogits_CV.T, x_ND[rows].contiguous(), dweight_VD, add=True)
        ctx.save_for_backward(dx_ND, dweight_VD)
        return total / max(counted, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        pairs = zip(ctx.saved_tensors, wanted(ctx), strict=False)
        return *(d * scale.to(d.dtype) if d is not None and asked else None for d, asked in pairs), None


def _chunk_loss(logits_CV: Tensor, target_C: Tensor, counted: int) -> tuple[Tensor, Tensor]:
    """Summed nats of a chunk, and the gradient of the mean loss with respect to its logits (in their dtype).

    The gradient takes the place of the logits where a kernel does this.
    """
    if native.usable(logits_CV):
        nats_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float64)
        native.call("cross_entropy_rows", logits_CV, target_C, nats_C, *logits_CV.shape, IGNORE, 1.0 / counted)
        return nats_C.sum(), logits_CV
    logits = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    keep_C1 = (target_C != IGNORE)[:, None].to(logits.dtype)
    target_C1 = target_C[:, None].clamp_min(0)
    log_normaliser_C1 = logits.logsumexp(-1, keepdim=True)
    nats = ((log_normaliser_C1 - logits.gather(-1, target_C1)) * keep_C1).sum()
    dlogits_CV = logits.sub_(log_normaliser_C1).exp_().mul_(keep_C1 / counted)
    dlogits_CV.scatter_add_(-1, target_C1, -keep_C1 / counted)
    return nats, dlogits_CV.to(logits_CV.dtype)
