"""Weights at rest in fewer bits: how numbers are rounded, and what they are worth afterwards.

``int8`` and ``int4`` share a bf16 scale among 32 numbers along the contracted dimension, 8.5 and 4.5 bits a number;
``fp8`` is the published format, E4M3 in blocks of 128 x 128 (:mod:`benthic.precision.blocks`).

Dimensions: M rows, K columns, Q groups along them; further dimensions before these are matrices of their own.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.precision.blocks import BLOCK, dequantise_blocks, quantise_blocks

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8", "int8", "int4")
GROUP = 32
"""Numbers that share a scale in ``int8`` and ``int4``."""


def quantise_groups(weight_MK: Tensor, bits: Literal[8, 4]) -> tuple[Tensor, Tensor]:
    """Whole numbers int8 (..., M, K) and scales bf16 (..., M, Q) for groups of 32 columns, the last maybe smaller.

    With 8 bits numbers go from -127 to 127. With 4 they go from -8 to 7, and the scale takes the sign that lets the
    number of largest magnitude be -8. A group of zeros has scale 0; one that is not finite has a scale that is not.
    """
    groups_MQG = _in_groups(weight_MK.float())
    if bits == 8:
        scale_MQ = _up_to_bf16(groups_MQG.abs().amax(-1) / 127)
        lowest, highest = -127, 127
    else:
        largest_MQ = groups_MQG.gather(-1, groups_MQG.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale_MQ = (largest_MQ / -8).bfloat16()
        lowest, highest = -8, 7
    inverse_MQ1 = torch.where(scale_MQ == 0, 0.0, 1 / scale_MQ.float()).unsqueeze(-1)
    numbers_MQG = (groups_MQG * inverse_MQ1).round_().clamp_(lowest, highest).nan_to_num_().to(torch.int8)
    return numbers_MQG.flatten(-2)[..., : weight_MK.shape[-1]], scale_MQ


def dequantise_groups(numbers_MK: Tensor, scale_MQ: Tensor) -> Tensor:
    """fp32 numbers (..., M, K): each whole number times the scale of its group, which is exact."""
    weight_MQG = _in_groups(numbers_MK.float()) * scale_MQ.float().unsqueeze(-1)
    return weight_MQG.flatten(-2)[..., : numbers_MK.shape[-1]]


def rounded(weight_MK: Tensor, precision: Precision) -> Tensor:
    """What a weight (..., M, K) is worth in a precision, in its own dtype."""
    match precision:
        case "fp32":
            return weight_MK
        case "bf16":
            worth_MK = weight_MK.bfloat16()
        case "fp8":
            worth_MK = dequantise_blocks(*quantise_blocks(weight_MK))
        case "int8" | "int4":
            worth_MK = dequantise_groups(*quantise_groups(weight_MK, bits_of(precision)))
    return worth_MK.to(weight_MK.dtype)


def bits_of(precision: Literal["int8", "int4"]) -> Literal[8, 4]:
    """Bits of a number, its scale not counted."""
    return 8 if precision == "int8" else 4


def bytes_per_number(precision: Precision) -> float:
    """Of a large matrix, scales included."""
    scales = {"fp8": 4 / BLOCK**2, "int8": 2 / GROUP, "int4": 2 / GROUP}
    numbers = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
    return numbers[precision] + scales.get(precision, 0.0)


def head_precision(precision: Precision) -> Precision:
    """Of a model's head, where its other matrices are in ``precision``."""
    return "int8" if precision == "int4" else precision


def _in_groups(x_MK: Tensor) -> Tensor:
    """(..., M, Q, 32), zeros after the end."""
    groups_MQG: Tensor = F.pad(x_MK, (0, -x_MK.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return groups_MQG


def _up_to_bf16(x: Tensor) -> Tensor:
    """Numbers that are not negative rounded up to bf16, so that no quotient by them grows; NaN stays NaN."""
    nearest = x.bfloat16()
    return torch.where(nearest.float() < x, (nearest.view(torch.int16) + 1).view(torch.bfloat16), nearest)
