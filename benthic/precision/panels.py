"""Groups of whole numbers in the order in which native decoding reads them (``ops/native/decode/matrix.h``).

Sixteen rows make a panel, so that in a vector register each row has a lane of its own, and one instruction multiplies
four columns of all of them. Within a panel everything is read once, front to back.

Dimensions: S matrices, M rows, K columns, P panels, Q pairs of groups.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.precision.quantise import GROUP

_ROWS = 16
_COLUMNS = 2 * GROUP


def pack_panels(numbers_SMK: Tensor, scale_SMG: Tensor, bits: Literal[8, 4]) -> Tensor:
    """Bytes (S, P, Q, 64 + 1024 or 64 + 512): for every 64 columns the scales of 16 rows, then their numbers.

    Args:
        numbers_SMK: int8, as :func:`benthic.precision.quantise.quantise_groups` gives them.
        scale_SMG: bf16, of groups of 32 columns.
        bits: of a number. Four-bit numbers share a byte, that of the group's first half in the low bits.
    """
    padding = -numbers_SMK.shape[-1] % _COLUMNS, -numbers_SMK.shape[-2] % _ROWS
    whole = F.pad(numbers_SMK, (0, padding[0], 0, padding[1]))
    offset = 128 if bits == 8 else 8
    unsigned = (whole.to(torch.int16) + offset).to(torch.uint8)
    # From panel, row, pair, group of the pair, four columns, column to: row and column last.
    parts = unsigned.unflatten(-1, (-1, 2, GROUP // 4, 4)).unflatten(1, (-1, _ROWS)).permute(0, 1, 3, 4, 5, 2, 6)
    if bits == 4:
        low, high = parts.chunk(2, dim=4)
        parts = low | high << 4
    scales = F.pad(scale_SMG, (0, -scale_SMG.shape[-1] % 2, 0, padding[1]))
    scales = scales.unflatten(-1, (-1, 2)).unflatten(1, (-1, _ROWS)).permute(0, 1, 3, 4, 2)
    return torch.cat((scales.flatten(3).contiguous().view(torch.uint8), parts.flatten(3)), -1)
