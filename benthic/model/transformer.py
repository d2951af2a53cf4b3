"""The main model: embedding, blocks of MLA and feed-forward, final norm, head (V3 report section 2)."""

from typing import Any

import torch
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.model.layers import RMSNorm, SwiGLU
from benthic.model.mla import AttentionContext, Cache, LatentAttention
from benthic.model.moe import MoE, Routing
from benthic.model.trainable import Trunk
from benthic.ops.rope import rope_angles


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LatentAttention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: MoE | SwiGLU
        if layer < config.first_k_dense_replace:
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)
        else:
            self.ffn = MoE(config)

    def forward(
        self, x_BTD: Tensor, context: AttentionContext, chosen_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        if isinstance(self.ffn, MoE):
            out_BTD, routing = self.ffn(self.ffn_norm(x_BTD), chosen_BTK)
            return x_BTD + out_BTD, routing
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), None


class Transformer(Trunk):
    """Token ids (B, T) to logits (B, T, V). Single-device; parallelism and precision are applied from outside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding itself would draw weights, which on the meta device imports PyTorch's compiler, for a second.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens_BT: Tensor, **context: Any) -> Tensor:
        """Logits (B, T, V); keyword arguments as for :meth:`hidden`."""
        logits_BTV: Tensor = self.head(self.hidden(tokens_BT, **context)[0])
        return logits_BTV

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        document_BT: Tensor | None = None,
        cache: Cache | None = None,
        chosen_MBTK: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Hidden states after the final norm (B, T, D), and what each MoE layer did.

        Args:
            document_BT: document of each position; attention then stays within documents.
            cache: latents of earlier tokens; the new ones follow them and are appended.
            chosen_MBTK: the experts that each MoE layer's tokens visit, where routers are not to choose them anew.
        """
        context = attention_context(self.config, tokens_BT, document_BT, cache)
        x_BTD, routings = self.embed(tokens_BT), list[Routing]()
        for block in self.layers:
            chosen_BTK = None if chosen_MBTK is None else chosen_MBTK[len(routings)]
            x_BTD, routing = block(x_BTD, context, chosen_BTK)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BTD), routings


def attention_context(
    config: ModelConfig, tokens_BT: Tensor, document_BT: Tensor | None = None, cache: Cache | None = None
) -> AttentionContext:
    """What all layers of a forward pass over these tokens share; positions go on from the cache's length."""
    start = 0 if cache is None else cache.length
    positions_T = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
    return AttentionContext(*rope_angles(config, positions_T), document_BT, cache)
