"""Which gradients a backward pass asks a function for: pipelines first ask for those of inputs, later of weights."""

from typing import Any

import torch


def wanted(ctx: Any) -> list[bool]:
    """For each tensor among the arguments of an autograd function, in its ``backward``.

    ``ctx.needs_input_grad`` says only what the forward pass could tell: that a gradient may be asked for.
    """
    return [node is not None and _runs(node) for node, _ in ctx.next_functions]


def _runs(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # so the engine speaks of leaves whose gradients it was asked for by name
        return True
