"""How the cache keeps a token's latents: as they are, in bf16, or in FP8 as DeepSeek's own kernels do.

In FP8 a token's row of a layer is C numbers in E4M3, an fp32 scale for each 128 of them, and the rotary key in bf16,
which would lose too much: 656 bytes for V3's 512 + 64 ("FP8 with scale" in the README of
github.com/deepseek-ai/FlashMLA).

Legend: C kv_lora_rank, R rope width, L = C + R, W what a row has of its storage's type; further dimensions come before.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.precision.blocks import BLOCK, ROW_TILE, dequantise_blocks, quantise_blocks

CachePrecision = Literal["fp32", "bf16", "fp8"]
CACHE_DTYPES: dict[CachePrecision, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class LatentFormat:
    """Rows of latents in memory.

    Args:
        config: of the model.
        dtype: of the numbers; E4M3 stands for the whole format above.
    """

    config: ModelConfig
    dtype: torch.dtype

    @property
    def storage(self) -> torch.dtype:
        """Type of what :meth:`pack` returns: in FP8, bytes."""
        return torch.uint8 if self._fp8 else self.dtype

    @property
    def width(self) -> int:
        """W."""
        latent, rope = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        return latent + 4 * -(-latent // BLOCK) + 2 * rope if self._fp8 else latent + rope

    @property
    def row_bytes(self) -> int:
        """Of one token in one layer."""
        return self.width * self.storage.itemsize

    def pack(self, latent_TL: Tensor) -> Tensor:
        """Rows (..., T, W) of latents (..., T, L)."""
        if not self._fp8:
            return latent_TL.to(self.dtype)
        latent_TC, rope_TR = latent_TL.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        numbers_TC, scale_TQ = quantise_blocks(latent_TC, ROW_TILE)
        return torch.cat([part.view(torch.uint8) for part in (numbers_TC, scale_TQ, rope_TR.bfloat16())], -1)

    def unpack(self, row_TW: Tensor) -> Tensor:
        """What rows are worth (..., T, L), in fp32 if they are FP8, else in their own type."""
        if not self._fp8:
            return row_TW
        numbers = self.config.kv_lora_rank
        sizes = (numbers, 4 * -(-numbers // BLOCK), 2 * self.config.qk_rope_head_dim)
        types = (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
        parts = zip(row_TW.split(sizes, -1), types, strict=True)
        # Fresh memory, since bytes of a row need not lie where a wider type wants them.
        numbers_TC, scale_TQ, rope_TR = (part.clone(memory_format=torch.contiguous_format).view(t) for part, t in parts)
        return torch.cat((dequantise_blocks(numbers_TC, scale_TQ, ROW_TILE), rope_TR.float()), -1)

    def rounded(self, latent_TL: Tensor) -> Tensor:
        """What latents are worth once they have been in the cache, in their own type."""
        return self.unpack(self.pack(latent_TL)).to(latent_TL.dtype)

    @property
    def _fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn
