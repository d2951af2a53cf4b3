"""The latent cache: all that decoding remembers of earlier tokens.

Multi-head latent attention needs only the compressed latent and the shared rotary key of each token, so the cache
holds exactly ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer (DeepSeek-V2, arXiv 2405.04434,
section 2.1.3) whatever the number of heads.

Legend: B batch, T new tokens, S cached tokens, L = kv_lora_rank + qk_rope_head_dim.
"""

import torch
from torch import Tensor

_BLOCK = 256
"""Capacity is a multiple of this many tokens."""


class LatentCache:
    """Latents of the tokens seen so far, one contiguous store per layer.

    A step appends its tokens layer by layer and then calls :meth:`advance` once; until then ``length`` is
    the position of the step's first token in every layer.
    """

    def __init__(
        self, layers: int, batch: int, latent_dim: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.length = 0
        self._store_NBSL = [torch.empty(batch, 0, latent_dim, dtype=dtype, device=device) for _ in range(layers)]

    def append(self, layer: int, latent_BTL: Tensor) -> Tensor:
        """Store a layer's new latents and return a view of all of them, (B, length + T, L)."""
        end = self.length + latent_BTL.shape[1]
        if end > self._store_NBSL[layer].shape[1]:
            self._store_NBSL[layer] = self._grown(self._store_NBSL[layer], end)
        store_BSL = self._store_NBSL[layer]
        store_BSL[:, self.length : end] = latent_BTL
        return store_BSL[:, :end]

    def advance(self, tokens: int) -> None:
        """End a step that appended so many tokens to every layer."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def nbytes(self) -> int:
        """Bytes of the latents held, without room kept for growth."""
        return sum(store[:, : self.length].numel() * store.element_size() for store in self._store_NBSL)

    def _grown(self, store_BSL: Tensor, needed: int) -> Tensor:
        # At least half as much again, so that a token's cost of copying stays constant however long the text gets.
        capacity = max(needed, store_BSL.shape[1] * 3 // 2)
        batch, _, latent_dim = store_BSL.shape
        grown_BSL = store_BSL.new_empty(batch, -(-capacity // _BLOCK) * _BLOCK, latent_dim)
        grown_BSL[:, : self.length] = store_BSL[:, : self.length]
        return grown_BSL
