"""Multi-head latent attention: keys and values come from one compressed latent per token (V3 report section 2.1.1).

Two forms of one layer with the same weights. The naive form expands the latent into keys and values and suits
training and prefill, where arithmetic is the limit. The absorbed form moves the expansion onto queries and outputs,
so that attention runs in the latent space and a decode step reads only the cache.

Shapes: B batch, T time, S cached time, D model, H heads, N nope width, R rope width, V value width,
C latent (kv_lora_rank), L = C + R numbers cached per token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.model.layers import RMSNorm
from benthic.ops.attention import causal_attention
from benthic.ops.latent_attention import latent_attention
from benthic.ops.rope import rotate_tail, softmax_scale

_LATENT_NORM_EPS = 1e-6
"""DeepSeek and transformers normalise the latents with this whatever ``rms_norm_eps`` says."""
_MOST_EXPANDED = 2**28
"""Numbers of one layer's keys and values that a chunk of a prompt may expand; a gigabyte in fp32."""


class Cache(Protocol):
    """What attention asks of a latent cache."""

    @property
    def length(self) -> int:
        """Tokens cached before this step."""

    def append(self, layer: int, latent_BTL: Tensor) -> Tensor:
        """Store a layer's new latents and return all of its latents (B, S, L)."""


@dataclass(frozen=True)
class AttentionContext:
    """What the layers of one forward pass share: rotations, document of each position, cache."""

    cos_TP: Tensor
    sin_TP: Tensor
    document_BT: Tensor | None = None
    cache: Cache | None = None

    def __post_init__(self) -> None:
        if self.document_BT is not None and self.cache is not None:
            raise ValueError("document_BT: a cache holds one document; it cannot be read with a mask of several")


class LatentAttention(nn.Module):
    """One MLA layer. ``layer`` is its index in the cache."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q = nn.Linear(width, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a = nn.Linear(width, config.latent_dim, bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o = nn.Linear(heads * config.v_head_dim, width, bias=False)
        self.kept = nn.Identity()
        """What a cache would keep passes through it, so that a hook can round that."""
        self.scale = softmax_scale(config)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        q_BTHK = self._queries(x_BTD, context)
        latent_BTC, k_rope_BTR = self._latent(x_BTD, context)
        if context.cache is None:
            out_BTHV = self._naive(q_BTHK, latent_BTC, k_rope_BTR, context.document_BT)
        else:
            start = context.cache.length
            cached_BSL = context.cache.append(self.layer, torch.cat((latent_BTC, k_rope_BTR), -1))
            if start == 0 and x_BTD.shape[1] > 1:
                out_BTHV = self._naive(q_BTHK, latent_BTC, k_rope_BTR, None)
            elif self._expansion_pays(x_BTD.shape[1], cached_BSL.shape[1]):
                latent_BSC, k_rope_BSR = cached_BSL.split((latent_BTC.shape[-1], k_rope_BTR.shape[-1]), -1)
                out_BTHV = self._naive(q_BTHK, latent_BSC, k_rope_BSR, None)
            else:
                out_BTHV = self._absorbed(q_BTHK, cached_BSL, start)
        out: Tensor = self.o(out_BTHV.flatten(-2))
        return out

    def _queries(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Queries (B, T, H, N + R), the last R rotated."""
        flat = self.q(x_BTD) if self.config.q_lora_rank is None else self.q_b(self.q_norm(self.q_a(x_BTD)))
        q_BTHK = flat.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        return rotate_tail(q_BTHK, context.cos_TP, context.sin_TP)

    def _latent(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """What the cache keeps: the normalised latent (B, T, C) and the rotated key (B, T, R)."""
        latent_BTC, k_rope_BTR = self.kv_a(x_BTD).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), -1)
        k_rope_BTR = rotate_tail(k_rope_BTR.unsqueeze(2), context.cos_TP, context.sin_TP).squeeze(2)
        kept: tuple[Tensor, Tensor] = self.kept((self.kv_norm(latent_BTC), k_rope_BTR))
        return kept

    def _expansion_pays(self, tokens: int, cached: int) -> bool:
        """Whether so many queries save more by narrower keys and values than it costs to expand what is cached.

        For each cached token and head: 2 C (N + V) operations once, against 2 (C + C - N - V) for each query. Where
        there would be too much of it to hold, nothing is expanded.
        """
        latent, expanded = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        fits = cached * self.config.num_attention_heads * expanded <= _MOST_EXPANDED
        return fits and tokens * (2 * latent - expanded) > latent * expanded

    def _naive(self, q_BTHK: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, document_BT: Tensor | None) -> Tensor:
        """Attention over keys and values expanded from the latents: (B, T, H, V)."""
        kv_BTHX = self.kv_b(latent_BTC).unflatten(-1, (self.config.num_attention_heads, -1))
        return causal_attention(q_BTHK, kv_BTHX, k_rope_BTR, scale=self.scale, document_BT=document_BT)

    def _absorbed(self, q_BTHK: Tensor, cached_BSL: Tensor, start: int) -> Tensor:
        """Attention in the latent space, the expansion applied to queries and outputs instead: (B, T, H, V)."""
        config = self.config
        q_nope_BTHN, q_rope_BTHR = q_BTHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        kv_b_HXC = self.kv_b.weight.unflatten(0, (config.num_attention_heads, -1))
        key_HNC, value_HVC = kv_b_HXC.split((config.qk_nope_head_dim, config.v_head_dim), 1)
        out_BHTC = latent_attention(
            q_nope_BTHN.transpose(1, 2) @ key_HNC,
            q_rope_BTHR.transpose(1, 2),
            cached_BSL,
            scale=self.scale,
            start=start,
        )
        out_BHTV: Tensor = out_BHTC @ value_HVC.transpose(-1, -2)
        return out_BHTV.transpose(1, 2)
