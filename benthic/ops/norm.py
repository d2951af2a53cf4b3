"""Root-mean-square normalisation, the only normalisation DeepSeek-V3 uses (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, written out."""
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same as :func:`rms_norm_reference`; statistics in at least fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)
