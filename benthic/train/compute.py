"""The precision of a training step, applied to a module from outside for the length of a call.

FP8 replaces the products of linear layers and experts. As published (V3 report section 3.3.1), embedding, head,
routers, norms and the core of attention stay as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benthic.config.stages import Stage
from benthic.errors import InputError
from benthic.model import Trunk
from benthic.model.layers import SwiGLU
from benthic.model.mla import LatentAttention
from benthic.model.moe import Experts, MoE, Router
from benthic.ops import native
from benthic.ops.product import own_products
from benthic.parallel.experts import senders_of
from benthic.parallel.local import may_divide
from benthic.precision.compute import Compute, call_rounded
from benthic.precision.fp8_experts import fp8_experts, fp8_swiglu
from benthic.precision.fp8_linear import fp8_linear
from benthic.precision.weight_copies import WeightCopies, copies_of_step


def compute_in(compute: Compute, module: nn.Module, *args: Any) -> Any:
    """``module(*args)``, computed in this precision, where its weights are; gradients reach the fp32 weights."""
    device = next(module.parameters()).device
    if device.type != "cpu":
        args = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
    if compute == "fp8":
        with fp8_products(module):
            return module(*args)
    if compute == "bf16":
        return call_rounded(module, *args, keep=router_weights(module) | _rounded_when_gathered(module))
    with own_products(next(module.parameters()), tiles=compute == "fp32-tiles"):
        return module(*args)


def _rounded_when_gathered(module: nn.Module) -> set[str]:
    if not may_divide():
        return set()
    from benthic.parallel.shard import names_rounded_when_gathered

    return names_rounded_when_gathered(module)


def refuse_stages_without_tiles(stages: Iterable[Stage]) -> None:
    """:func:`refuse_without_tiles` for each stage, naming the setting that asks for it."""
    for stage in stages:
        own = stage.kind in ("rl", "reward")
        key = f"posttrain.{stage.kind}.compute" if own else "precision.compute"
        refuse_without_tiles(stage.config.precision.compute, key)


def refuse_without_tiles(compute: str, key: str = "precision.compute") -> None:
    """Raises InputError where ``fp32-tiles`` is asked for and cannot be had."""
    if compute == "fp32-tiles" and not native.has_tiles():
        raise InputError(
            f"{key}={compute}: needs bf16 tiles (AMX), which this processor lacks, or which go unused for "
            "want of a compiler or by BENTHIC_NATIVE; fp32 is as exact"
        )


def refuse_stages_without_device(stages: Iterable[Stage]) -> None:
    """:func:`refuse_without_device` for each stage that is trained."""
    for stage in stages:
        if stage.kind != "base":
            refuse_without_device(stage.config.train.device, stage.config.precision.compute)


def refuse_without_device(device: str, compute: str) -> None:
    """Raises InputError where ``train.device`` is not there, or has no such precision."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise InputError(f'train.device="{device}": PyTorch finds no GPU here; "cpu" needs none')
    if compute == "fp32-tiles":
        raise InputError(f'precision.compute="{compute}" is of CPUs; on a GPU there are fp32, bf16 and fp8')


def moments_dtype(compute: Compute) -> torch.dtype:
    """The dtype of AdamW's moments: bf16 beside FP8 products (V3 report section 3.3.3), else fp32."""
    return torch.bfloat16 if compute == "fp8" else torch.float32


def router_weights(module: nn.Module) -> set[str]:
    """Names of a module's router weights, to which no lower precision is applied (V3 report section 3.3.1)."""
    return {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Router)}


@contextmanager
def fp8_products(module: nn.Module) -> Iterator[None]:
    """Inside, forward passes of the module multiply FP8 operands; the backward passes of these may come later."""
    forwards = _fp8_forwards(module)
    for part, forward in forwards.items():
        part.forward = forward
    try:
        yield
    finally:
        for part in forwards:
            del part.forward


def _fp8_forwards(module: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """New forward methods by the part of the module they are for."""
    parts, copies = list(module.modules()), copies_of_step()
    heads = {part.head for part in parts if isinstance(part, Trunk)}
    forwards: dict[nn.Module, Callable[..., Tensor]] = {
        part: partial(_linear, part, copies) for part in parts if isinstance(part, nn.Linear) and part not in heads
    }
    for part in parts:
        if isinstance(part, LatentAttention):
            forwards[part.o] = partial(_linear, part.o, copies, powers_of_two=True)
        elif isinstance(part, Experts):
            forwards[part] = partial(_experts, part, copies)
        elif isinstance(part, MoE) and part.shared is not None:
            forwards[part.shared] = partial(_swiglu, part.shared, copies)
    return forwards


# Weights are taken when they are used: where they are divided among processes, they are whole only then.


def _linear(part: nn.Linear, copies: WeightCopies, x: Tensor, *, powers_of_two: bool = False) -> Tensor:
    return fp8_linear(x, part.weight, powers_of_two=powers_of_two, copy_of=copies)


def _experts(part: Experts, copies: WeightCopies, x_ND: Tensor, index_NK: Tensor, gate_NK: Tensor) -> Tensor:
    return fp8_experts(x_ND, index_NK, gate_NK, part.gate_up, part.down, senders_of(part), copy_of=copies)


def _swiglu(part: SwiGLU, copies: WeightCopies, x: Tensor) -> Tensor:
    return fp8_swiglu(x, part.gate_up.weight, part.down.weight, copy_of=copies)
