"""Root-mean-square normalisation, the only normalisation DeepSeek-V3 uses (arXiv 1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, written out.

    The quotient is computed in fp32 at least and rounded to the dtype of ``x`` before the weight, in every dtype: this
    is what DeepSeek's own code does, and what makes logits equal to transformers' to the last bits.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as :func:`rms_norm_reference`, in one pass over memory where there is a kernel for it."""
    if native.usable(x, weight):
        if not torch.is_grad_enabled():
            return _forward_native(x, weight, eps)[0]
        out: Tensor = _NativeRMSNorm.apply(x, weight, eps)
        return out
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * F.rms_norm(exact, weight.shape, eps=eps).to(x.dtype)


class _NativeRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rows_ND, rstd_N = _forward_native(x, weight, eps)
        ctx.save_for_backward(rows_ND, weight, rstd_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weight, rstd_N = ctx.saved_tensors
        dy, threads = grads[0].contiguous(), torch.get_num_threads()
        dx, dweight_parts = torch.empty_like(dy), dy.new_zeros(threads, len(weight), dtype=torch.float32)
        native.call(
            "rms_norm_backward", dy, rows_ND, rows_ND.stride(0), weight, rstd_N, dx, dweight_parts, *rows_ND.shape,
            threads,
        )  # fmt: skip
        return dx, dweight_parts.sum(0).to(weight.dtype), None


@native.unhooked
def _forward_native(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The outcome, and for the backward pass ``x`` as rows and the reciprocal of each row's root mean square."""
    rows_ND = _as_rows(x)
    y = x.new_empty(x.shape)
    rstd_N = x.new_empty(len(rows_ND), dtype=torch.float32)
    native.call("rms_norm_forward", rows_ND, rows_ND.stride(0), weight, y, rstd_N, *rows_ND.shape, eps)
    return y, rows_ND, rstd_N


def _as_rows(x: Tensor) -> Tensor:
    """(N, D) with dense rows at one distance, without copying where ``x`` allows it, as slices of a matrix do."""
    if x.dim() == 3 and x.stride(2) == 1 and x.stride(0) == x.stride(1) * x.shape[1]:
        return x.as_strided((x.shape[0] * x.shape[1], x.shape[2]), (x.stride(1), 1))
    return x.contiguous().view(-1, x.shape[-1])
