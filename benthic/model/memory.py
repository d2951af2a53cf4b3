"""Memory for a model that was built on the meta device."""

from typing import TypeVar

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def give_memory(module: _Module, device: torch.device | str | None = None) -> _Module:
    """The same module with all tensors on a device, by default the CPU; what they hold is not set.

    As ``torch.nn.Module.to_empty``, which for tensors on the meta device imports half of PyTorch's compiler.
    """
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device or "cpu")
    )
    return module
