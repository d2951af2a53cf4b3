"""The latent cache in pages: all that decoding remembers of earlier tokens, in pieces that sequences can share.

Multi-head latent attention needs only the compressed latent and the shared rotary key of each token, so the cache
holds exactly ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer (DeepSeek-V2, arXiv 2405.04434,
section 2.1.3) whatever the number of heads, in a form of :mod:`benthic.precision.latents`. Which page belongs to whom
is :mod:`benthic.inference.pages`' business.

Legend: N layers, S cached tokens, T new tokens, L = kv_lora_rank + qk_rope_head_dim, W what a row of the cache has.
"""

import torch
from torch import Tensor

from benthic.config.schema import ModelConfig
from benthic.precision.latents import LatentFormat

PAGE = 64
"""Tokens a page."""


def pages_for(tokens: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-tokens // PAGE)


class PagedCache:
    """A pool of pages, one tensor per layer: ``pages_N[layer]`` is (pages, PAGE, W) and contiguous.

    Layers of the transformer come first, then those of MTP modules, as ``LatentAttention.layer`` numbers them. On the
    CPU the memory becomes real only where it is written.

    Args:
        config: of the model.
        pages: how many.
        mtp_layers: MTP modules that write it too.
        dtype: of the numbers; E4M3 stands for DeepSeek's format with scales.
        device: where the pages are.
    """

    def __init__(
        self, config: ModelConfig, pages: int, *, mtp_layers: int = 0, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.pages = pages
        self.bytes_a_page = self.page_bytes(config, mtp_layers=mtp_layers, dtype=dtype)
        layers = config.num_hidden_layers + mtp_layers
        self.format = LatentFormat(config, dtype)
        shape = (pages, PAGE, self.format.width)
        self.pages_N = [torch.empty(shape, dtype=self.format.storage, device=device) for _ in range(layers)]

    @staticmethod
    def page_bytes(config: ModelConfig, *, mtp_layers: int = 0, dtype: torch.dtype) -> int:
        """Bytes of one page in all layers."""
        return (config.num_hidden_layers + mtp_layers) * PAGE * LatentFormat(config, dtype).row_bytes


class PagedView:
    """One sequence's part of a paged cache, in the form that ``Transformer.hidden`` reads and appends to.

    Args:
        cache: the pool.
        table_P: int32, the sequence's pages in order; it may have more entries than are used.
        length: tokens cached before this step.
        dtype: of the latents handed out.
    """

    def __init__(self, cache: PagedCache, table_P: Tensor, length: int, dtype: torch.dtype) -> None:
        self.length = length
        self._cache, self._table_P, self._dtype = cache, table_P, dtype

    def append(self, layer: int, latent_BTL: Tensor) -> Tensor:
        """Store the new latents (1, T, L) of a layer and return a copy of all of its latents (1, S, L)."""
        end = self.length + latent_BTL.shape[1]
        pages = self._cache.pages_N[layer]
        position_T = torch.arange(self.length, end)
        page_T, slot_T = self._table_P[position_T // PAGE], position_T % PAGE
        pages[page_T, slot_T] = self._cache.format.pack(latent_BTL[0])
        row_SW = pages[self._table_P[: pages_for(end)]].flatten(0, 1)[:end]
        return self._cache.format.unpack(row_SW).unsqueeze(0).to(self._dtype)
