"""FP8 weights as DeepSeek publishes them: E4M3 numbers with one fp32 scale for each block of 128 x 128.

The released V3 and R1 checkpoints hold nothing wider for their linear layers (V3 report section 3.3.2), so reading
them means multiplying every block by its scale. A scale is stored under the weight's name with ``_scale_inv``
appended: it is the factor that gives the weight back, the inverse of the one that quantised it.

Dimensions: M rows, N columns, P = ceil(M / 128) and Q = ceil(N / 128) blocks. Blocks at the lower and right edge
may be smaller.
"""

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def block_grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (P, Q) of the scales of a weight of ``shape`` (M, N)."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantise_blocks(weight_MN: Tensor, scale_PQ: Tensor) -> Tensor:
    """Weight (M, N) in fp32: each E4M3 number times the fp32 scale of its block, rounded once.

    Raises:
        ValueError: the scales are not one per block.
    """
    if scale_PQ.shape != block_grid(weight_MN.shape):
        raise ValueError(
            f"scales {tuple(scale_PQ.shape)} do not fit a weight {tuple(weight_MN.shape)}: "
            f"expected {block_grid(weight_MN.shape)}, one per {BLOCK} x {BLOCK} block"
        )
    out_MN = weight_MN.float()
    for rows_bN, scale_Q in zip(torch.split(out_MN, BLOCK), scale_PQ.float(), strict=True):
        rows_bN *= scale_Q.repeat_interleave(BLOCK)[: out_MN.shape[1]]
    return out_MN


def quantise_blocks(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 weight (M, N) and fp32 scales (P, Q) such that the largest number of each block becomes 448.

    The inverse of ``dequantise_blocks`` up to E4M3's rounding. A block of zeros has scale 1.
    """
    rows, columns = weight_MN.shape
    P, Q = block_grid(weight_MN.shape)
    padded = weight_MN.new_zeros(P * BLOCK, Q * BLOCK, dtype=torch.float32)
    padded[:rows, :columns] = weight_MN
    blocks_PbQb = padded.view(P, BLOCK, Q, BLOCK)
    scale_PQ = blocks_PbQb.abs().amax(dim=(1, 3)) / E4M3_MAX
    scale_PQ = torch.where(scale_PQ > 0, scale_PQ, 1.0)
    # Division may round a block's largest number past 448, which E4M3 would make a NaN.
    scaled = (blocks_PbQb / scale_PQ[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    quantised_MN = scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
    return quantised_MN.contiguous(), scale_PQ
