"""Multi-token prediction: modules that each look one token further ahead (V3 report section 2.2).

Module k joins the hidden state that module k - 1 left at position i with the embedding of token i + k and predicts
token i + k + 1 through the shared head. Each takes the state before it as the head sees it, after its norm: so the
released weights expect it of the first, and so transformers chains the rest.

Shapes: B batch, T time, D model, S = T + depth tokens.
"""

import torch
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.model.layers import RMSNorm
from benthic.model.mla import AttentionContext
from benthic.model.moe import Routing
from benthic.model.transformer import Block


class MTPModule(nn.Module):
    """One further token: two norms, a projection, a block, and the norm before the shared head."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.project = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, embedding_BTD: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Routing | None]:
        """Hidden states (B, T, D), normalised, for the head and for the next module."""
        joined = torch.cat((self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)), -1)
        out_BTD, routing = self.block(self.project(joined), context)
        return self.norm(out_BTD), routing
