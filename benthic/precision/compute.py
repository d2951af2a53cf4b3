"""In which precision a module computes, applied to it from outside; master weights stay fp32."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Cast = Literal["fp32", "bf16"]
Compute = Literal[Cast, "fp32-tiles", "fp8"]


def compute_dtype(compute: Compute) -> torch.dtype:
    """The dtype of the results of a mode's matrix products."""
    return torch.bfloat16 if compute == "bf16" else torch.float32


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype for matrix products that need not be exact: bf16 where the device has units for it."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32
    return torch.bfloat16


def call_rounded(module: nn.Module, *args: Any, keep: Collection[str] = ()) -> Any:
    """``module(*args)``, computed with weights rounded to bf16.

    Gradients reach the fp32 weights through the rounding. ``keep`` names parameters that are not rounded. Activations
    take the weights' precision, so a bf16 step also moves half the memory.
    """
    rounded: dict[str, Tensor] = {
        name: parameter.to(torch.bfloat16) for name, parameter in module.named_parameters() if name not in keep
    }
    return functional_call(module, rounded, args)
