"""The gated activation of every feed-forward layer (arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benthic.ops import native


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; the last dimension holds the gate's numbers, then as many of the up's."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """Same as :func:`swiglu_reference`, in one pass over memory where there is a kernel for it."""
    one_row = gate_up.numel() == gate_up.shape[-1]  # decoding: a kernel's call would cost more than it saves
    if not one_row and native.usable(gate_up):
        out: Tensor = _NativeSwiGLU.apply(gate_up)
        return out
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _NativeSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        native.call("swiglu_forward", gate_up, out, out.numel() // width, width)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        width = gate_up.shape[-1] // 2
        dgate_up = torch.empty_like(gate_up)
        native.call("swiglu_backward", gate_up, grads[0].contiguous(), dgate_up, grads[0].numel() // width, width)
        return dgate_up
