"""Rotary position embedding with YaRN, on interleaved pairs as DeepSeek lays them out.

Shapes: B batch, T time, H heads, R rotary width (even), P = R / 2 pairs.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.config.schema import ModelConfig, YarnConfig
from benthic.ops import native


def rope_angles(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, P) in fp32 of the rotation at each position, YaRN applied where configured."""
    angles_TP = positions_T.float()[:, None] * _inverse_frequencies(config).to(positions_T.device)
    factor = cosine_factor(config.rope_scaling)
    return angles_TP.cos() * factor, angles_TP.sin() * factor


def apply_rope(x_BTHR: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension by their position's angle (arXiv 2104.09864)."""
    precise = torch.promote_types(x_BTHR.dtype, torch.float32)
    cos_TP, sin_TP = cos_TP[:, None].to(precise), sin_TP[:, None].to(precise)
    even, odd = x_BTHR[..., 0::2].to(precise), x_BTHR[..., 1::2].to(precise)
    return torch.stack((even * cos_TP - odd * sin_TP, odd * cos_TP + even * sin_TP), -1).flatten(-2).to(x_BTHR.dtype)


def rotate_tail(x_BTHW: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate the last 2P of each head's W numbers as :func:`apply_rope` does, and copy the rest."""
    if native.usable(x_BTHW):
        if not torch.is_grad_enabled():
            return _rotate_tail_native(x_BTHW, cos_TP, sin_TP, 1.0)
        out: Tensor = _NativeRotateTail.apply(x_BTHW, cos_TP, sin_TP)
        return out
    kept = x_BTHW.shape[-1] - 2 * cos_TP.shape[-1]
    return torch.cat((x_BTHW[..., :kept], apply_rope(x_BTHW[..., kept:], cos_TP, sin_TP)), -1)


class _NativeRotateTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHW: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TP, sin_TP)
        return _rotate_tail_native(x_BTHW, cos_TP, sin_TP, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_TP, sin_TP = ctx.saved_tensors
        return _rotate_tail_native(grads[0], cos_TP, sin_TP, -1.0), None, None


@native.unhooked
def _rotate_tail_native(x_BTHW: Tensor, cos_TP: Tensor, sin_TP: Tensor, direction: float) -> Tensor:
    batch, time, heads, width = x_BTHW.shape
    if x_BTHW.stride()[2:] != (width, 1) or x_BTHW.stride(0) != time * x_BTHW.stride(1):
        x_BTHW = x_BTHW.contiguous()
    out_BTHW = x_BTHW.new_empty(x_BTHW.shape)
    native.call(
        "rope_tail", x_BTHW, x_BTHW.stride(1), cos_TP, sin_TP, direction, out_BTHW, batch * time * heads, time, heads,
        width, cos_TP.shape[-1],
    )  # fmt: skip
    return out_BTHW


def softmax_scale(config: ModelConfig) -> float:
    """Scale of attention scores: 1/sqrt(width), times YaRN's squared temperature (V3 report section 4.3)."""
    scale: float = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is None or not yarn.mscale_all_dim:
        return scale
    return scale * _temperature(yarn.factor, yarn.mscale_all_dim) ** 2


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def cosine_factor(yarn: YarnConfig | None) -> float:
    """What cosines and sines are multiplied by: the ratio of YaRN's two temperatures, 1 as published."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)
    return _temperature(yarn.factor, 1.0)


@lru_cache(maxsize=32)
def _inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair (P,): low frequencies interpolated by YaRN, high ones kept."""
    width, yarn = config.qk_rope_head_dim, config.rope_scaling
    with torch.device("cpu"), torch.inference_mode(False):
        periods = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        if yarn is None:
            return 1.0 / periods
        low, high = ramp_bounds(config.rope_theta, width, yarn)
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return (1.0 / (yarn.factor * periods)) * ramp + (1.0 / periods) * (1 - ramp)


def ramp_bounds(theta: float, width: int, yarn: YarnConfig) -> tuple[float, float]:
    """Pair indices between which YaRN goes from keeping to interpolating (arXiv 2309.00071 section 3.2)."""

    def pair_turning(rotations: float) -> float:
        wavelength_share = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(wavelength_share) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001
