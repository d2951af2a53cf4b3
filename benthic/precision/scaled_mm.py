"""PyTorch's block-scaled FP8 product, for GPUs that have units for it: Hopper, with cuBLAS 12.9 or later.

It takes tiles of 1 x 128 on the left, and tiles of 1 x 128 or blocks of 128 x 128 on the right. It wants sizes in
multiples of 16, scales by columns, and those of square blocks padded to multiples of four along K.

Dimensions: M, N outer, K contracted, Q = ceil(K / 128) blocks along it, P rows of blocks.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

_MULTIPLE = 16
_SCALES_MULTIPLE = 4


def usable(x: Tensor) -> bool:
    """Whether the device of this tensor multiplies FP8 blocks."""
    return x.device.type == "cuda" and _supported(x.device)


@lru_cache
def _supported(device: torch.device) -> bool:
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")))
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)


def product(a_MK: Tensor, scale_MQ: Tensor, b_NK: Tensor, scale_PQ: Tensor) -> Tensor:
    """``a b^T`` (M, N) in fp32 of E4M3 operands; P is N for tiles of 1 x 128, ceil(N / 128) for square blocks."""
    (rows, _), (columns, _) = a_MK.shape, b_NK.shape
    tiles = len(scale_PQ) == columns
    a_MK, b_NK = _padded(a_MK), _padded(b_NK)
    if tiles:
        scale_b = _by_columns(_rows_padded(scale_PQ, len(b_NK)))
        recipe = ScalingType.BlockWise1x128
    else:
        scale_b = F.pad(scale_PQ, (0, -scale_PQ.shape[1] % _SCALES_MULTIPLE)).T
        recipe = ScalingType.BlockWise128x128
    out_MN = F.scaled_mm(
        a_MK, b_NK.T, _by_columns(_rows_padded(scale_MQ, len(a_MK))), ScalingType.BlockWise1x128, scale_b, recipe,
        output_dtype=torch.float32,
    )  # fmt: skip
    return out_MN[:rows, :columns]


def _padded(x: Tensor) -> Tensor:
    """Zeros at the edges, through bytes: PyTorch does not pad FP8."""
    rows, columns = x.shape
    padding = (0, -columns % _MULTIPLE, 0, -rows % _MULTIPLE)
    return F.pad(x.contiguous().view(torch.uint8), padding).view(x.dtype)


def _rows_padded(scale: Tensor, rows: int) -> Tensor:
    return F.pad(scale, (0, 0, 0, rows - len(scale)))


def _by_columns(scale: Tensor) -> Tensor:
    return scale.T.contiguous().T
