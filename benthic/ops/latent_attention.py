"""Attention in the latent space, the absorbed form of MLA: what decoding runs over the compressed cache.

Keys and values are never expanded: all heads attend to the same cached row, whose first C numbers are the
compressed latent (key and value at once) and whose last R are the shared rotary key. Seen so, the heads of one
query are rows of one ordinary attention over a single shared head.

Legend: B batch, H heads, T new tokens, S cached tokens (the new ones included), C kv_lora_rank,
R qk_rope_head_dim, L = C + R.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def latent_attention(
    q_latent_BHTC: Tensor, q_rope_BHTR: Tensor, latent_BSL: Tensor, *, scale: float, start: int
) -> Tensor:
    """Causal attention of T new queries to S cached latents; query t sees positions up to ``start + t``.

    ``q_latent`` is the query without position, multiplied by its head's part of the key up-projection;
    the returned (B, H, T, C) awaits multiplication by the head's part of the value up-projection
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2; appendix C).
    """
    B, H, T, C = q_latent_BHTC.shape
    q_BHTL = torch.cat((q_latent_BHTC, q_rope_BHTR), dim=-1)
    # The whole row serves as value too: fused kernels want keys and values of one width, and a row already read
    # costs less than a second pass. The last R numbers of the outcome mean nothing and are dropped.
    row_B1SL = latent_BSL.unsqueeze(1)
    if T == 1:
        # Heads are rows of one product with the cache, in as many groups as there are threads to share the work.
        groups = math.gcd(H, torch.get_num_threads())
        rows_BGSL = row_B1SL.expand(-1, groups, -1, -1)
        q_BGhL = q_BHTL.view(B, groups, H // groups, -1)
        out_BGhL = F.scaled_dot_product_attention(q_BGhL, rows_BGSL, rows_BGSL, scale=scale)
        return out_BGhL.reshape(B, H, 1, -1)[..., :C]
    visible_TS = _visible(T, latent_BSL.shape[1], start, latent_BSL.device)
    rows_BHSL = row_B1SL.expand(-1, H, -1, -1)
    return F.scaled_dot_product_attention(q_BHTL, rows_BHSL, rows_BHSL, attn_mask=visible_TS, scale=scale)[..., :C]


def latent_attention_reference(
    q_latent_BHTC: Tensor, q_rope_BHTR: Tensor, latent_BSL: Tensor, *, scale: float, start: int
) -> Tensor:
    """The definition of :func:`latent_attention`, term by term."""
    C = q_latent_BHTC.shape[-1]
    compressed_BSC, rotary_BSR = latent_BSL[..., :C], latent_BSL[..., C:]
    score_BHTS = torch.einsum("bhtc,bsc->bhts", q_latent_BHTC, compressed_BSC)
    score_BHTS = (score_BHTS + torch.einsum("bhtr,bsr->bhts", q_rope_BHTR, rotary_BSR)) * scale
    visible_TS = _visible(score_BHTS.shape[2], score_BHTS.shape[3], start, latent_BSL.device)
    weight_BHTS = score_BHTS.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhts,bsc->bhtc", weight_BHTS, compressed_BSC)


def _visible(T: int, S: int, start: int, device: torch.device) -> Tensor:
    """Which of S cached positions each of T queries beginning at position ``start`` may attend to."""
    return torch.arange(S, device=device) <= start + torch.arange(T, device=device).unsqueeze(1)
