"""A device that is not the CPU, on a machine that has none: real numbers, and an error wherever the two would mix.

Tensors on it hold theirs on the CPU, and say that they are elsewhere. As on a GPU, an operation takes tensors of one
device, but for single numbers on the CPU; copies lead from one to the other. What is not found out so: what a GPU's own
kernels compute, how fast, and what is done with memory itself (recomputation, an average that is lent to its model).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("lazy:0")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._foreach_copy_.default}


class Elsewhere(Tensor):
    """Numbers on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", dispatch_device=True, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While entered, ``device="lazy"``, a name with nothing behind it, leads to tensors of this kind."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    if function is torch.ops.prim.device.default:
        return DEVICE
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = kwargs.get("device")
    if function not in _COPIES and there:
        here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
        if here:
            raise RuntimeError(f"{function}: tensors on two devices, one of shape {tuple(here[0].shape)} on the CPU")
    goes = bool(there) if asked is None else torch.device(asked).type != "cpu"
    if function is _aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    out = function(*args, **kwargs)
    if not goes:
        return out
    made = {id(tensor.held): tensor for tensor in there}  # what works in place returns what it was given
    return tree_map_only(Tensor, lambda tensor: made[id(tensor)] if id(tensor) in made else Elsewhere(tensor), out)
