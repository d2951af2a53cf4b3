"""The small parts every block is made of: RMSNorm and the SwiGLU feed-forward layer."""

import torch
from torch import Tensor, nn

from benthic.ops.norm import rms_norm
from benthic.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """Normalisation by root mean square with a learned scale per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """Feed-forward layer ``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate rows first."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
