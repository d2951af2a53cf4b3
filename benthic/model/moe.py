"""DeepSeekMoE: many small routed experts beside shared ones, balanced without an auxiliary loss.

The router's bias is no parameter: after each step the trainer moves it towards balance (arXiv 2408.15664;
V3 report section 2.1.2). Every token reaches all the experts it chose.

Shapes: B batch, T time, N = B * T tokens, D model, E routed experts, K experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.config.schema import ModelConfig
from benthic.model.layers import SwiGLU
from benthic.ops.experts import routed_experts
from benthic.ops.routing import expert_load, gate_values, select_experts, sequence_balance_loss


@dataclass(frozen=True)
class Routing:
    """What one MoE layer did with one batch; what training asks of it is computed only when asked."""

    scores: Tensor
    """Affinities (B, T, E)."""
    index: Tensor
    """Chosen experts (B, T, K)."""

    @property
    def load_E(self) -> Tensor:  # noqa: N802 - a shape suffix
        """Tokens each expert received, int64."""
        return expert_load(self.index, self.scores.shape[-1])

    @property
    def balance_loss(self) -> Tensor:
        """Per-sequence balance loss, unweighted scalar."""
        return sequence_balance_loss(self.scores, self.index)


class Router(nn.Module):
    """Affinity of tokens to experts, in fp32 at least whatever the model's dtype, as published."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            precise = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(precise), self.weight.to(precise)).sigmoid()


class Experts(nn.Module):
    """Weights of all routed experts, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor) -> Tensor:
        return routed_experts(x_ND, index_NK, gate_NK, self.gate_up, self.down)


class MoE(nn.Module):
    """Shared experts plus the routed experts that a token's router chooses, or is told to have chosen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared: SwiGLU | None = None
        if config.n_shared_experts:
            self.shared = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_BTD: Tensor, chosen_BTK: Tensor | None = None) -> tuple[Tensor, Routing]:
        config = self.config
        scores_BTE = self.router(x_BTD)
        index_BTK = self._choose(scores_BTE.detach()) if chosen_BTK is None else chosen_BTK
        gate_BTK = gate_values(
            scores_BTE, index_BTK, normalise=config.norm_topk_prob, scale=config.routed_scaling_factor
        )
        out_ND = self.experts(x_BTD.flatten(0, 1), index_BTK.flatten(0, 1), gate_BTK.flatten(0, 1))
        out_BTD = out_ND.view_as(x_BTD)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        return out_BTD, Routing(scores_BTE, index_BTK)

    def _choose(self, scores_BTE: Tensor) -> Tensor:
        config = self.config
        return select_experts(
            scores_BTE,
            self.router.bias,
            n_group=config.n_group,
            topk_group=config.topk_group,
            top_k=config.num_experts_per_tok,
        )
