"""FP8 numbers with a scale for each block of them: E4M3 and one fp32 factor, as DeepSeek publishes and trains.

The released V3 and R1 checkpoints hold nothing wider for their linear layers (V3 report section 3.3.2), so reading
them means multiplying every block of 128 x 128 by its scale. A scale is stored under the weight's name with
``_scale_inv`` appended: it is the factor that gives the weight back, the inverse of the one that quantised it.
Training quantises activations and gradients by the same rule in tiles of 1 x 128 or 128 x 1.

Dimensions: M rows, N columns, P and Q blocks along them. Blocks at the lower and right edge may be smaller. Further
dimensions before these two are matrices of their own.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.precision import native_fp8

BLOCK = 128
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
SQUARE = (BLOCK, BLOCK)
ROW_TILE = (1, BLOCK)
COLUMN_TILE = (BLOCK, 1)

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def block_grid(shape: tuple[int, ...], block: tuple[int, int] = SQUARE) -> tuple[int, ...]:
    """Shape (..., P, Q) of the scales of a matrix of ``shape`` (..., M, N)."""
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def dequantise_blocks(weight_MN: Tensor, scale_PQ: Tensor, block: tuple[int, int] = SQUARE) -> Tensor:
    """Matrix (..., M, N) in fp32: each E4M3 number times the fp32 scale of its block, rounded once.

    Raises:
        ValueError: the scales are not one per block.
    """
    if scale_PQ.shape != block_grid(weight_MN.shape, block):
        raise ValueError(
            f"scales {tuple(scale_PQ.shape)} do not fit a weight {tuple(weight_MN.shape)}: "
            f"expected {block_grid(weight_MN.shape, block)}, one per {block[0]} x {block[1]} block"
        )
    if native_fp8.usable(weight_MN, scale_PQ):
        return native_fp8.dequantise(weight_MN, scale_PQ, block)
    padded, blocks_PaQb = _in_blocks(widen(weight_MN, torch.float32), block)
    blocks_PaQb *= scale_PQ.float()[..., :, None, :, None]
    return padded[..., : weight_MN.shape[-2], : weight_MN.shape[-1]]


def quantise_blocks(
    weight_MN: Tensor, block: tuple[int, int] = SQUARE, *, powers_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """E4M3 matrix (..., M, N) and fp32 scales (..., P, Q), such that the largest number of each block becomes 448.

    The inverse of ``dequantise_blocks`` up to E4M3's rounding, to nearest and ties to even. A block of zeros has
    scale 1. Scales are at least the smallest normal fp32 number, so that blocks of subnormals lose digits but stay
    finite. A number that is not finite makes its block NaN when it is multiplied with its scale.

    Args:
        powers_of_two: round scales up to powers of two. The largest number then falls between 224 and 448.
    """
    if native_fp8.usable(weight_MN):
        return native_fp8.quantise(weight_MN, block, powers_of_two)
    padded, blocks_PaQb = _in_blocks(weight_MN.float(), block)
    largest_PQ = blocks_PaQb.abs().amax(dim=(-3, -1))
    scale_PQ = torch.where(largest_PQ == 0, 1.0, (largest_PQ / E4M3_MAX).clamp(min=_SMALLEST_SCALE))
    if powers_of_two:
        scale_PQ = _next_power_of_two(scale_PQ)
    quantised = (blocks_PaQb / scale_PQ[..., :, None, :, None]).view_as(padded).to(torch.float8_e4m3fn)
    return quantised[..., : weight_MN.shape[-2], : weight_MN.shape[-1]].contiguous(), scale_PQ


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 numbers in a wider type, exactly, into fresh memory."""
    # On CPUs looking up one of 256 numbers is six times as fast as PyTorch's cast.
    return _all_numbers(dtype, x.device).index_select(0, x.reshape(-1).view(torch.uint8).int()).view(x.shape)


@lru_cache
def _all_numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(dtype)


def _in_blocks(x_MN: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix made of whole blocks by zeros at its edges, and the same memory as (..., P, a, Q, b)."""
    rows, columns = x_MN.shape[-2:]
    padded = F.pad(x_MN, (0, -columns % block[1], 0, -rows % block[0])).contiguous()
    return padded, padded.unflatten(-2, (-1, block[0])).unflatten(-1, (-1, block[1]))


def _next_power_of_two(scale: Tensor) -> Tensor:
    """Positive normal numbers rounded up to powers of two, exactly; infinity stays, NaN stays NaN."""
    fraction = 2**23 - 1
    rounded = ((scale.view(torch.int32) + fraction) & ~fraction).view(torch.float32)
    return torch.where(scale.isnan(), scale, rounded)
