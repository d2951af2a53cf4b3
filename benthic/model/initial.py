"""The weights that training begins with, for a whole model or for any parts of it.

They are drawn from one stream of random numbers, a parameter after another in the order of the whole model. A process
that holds a part of some of them draws that part, and passes over the rest (:mod:`benthic.ops.normal_stream`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benthic.model.layers import RMSNorm
from benthic.model.moe import Router
from benthic.model.trainable import embedding_names
from benthic.ops.normal_stream import NormalStream


class Part(NamedTuple):
    """Some successive numbers of a tensor."""

    tensor: Tensor
    """In whatever shape; contiguous."""
    start: int
    """The place of the first one in the whole."""


class InitialWeights:
    """What the parameters and buffers of a model are at first, noted while all of it is there, if on the meta device.

    Normal with a standard deviation, norms 1, routers' bias 0 (V3 report section 4.2).
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError if it has buffers other than routers' bias."""
        norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
        biases = {id(module.bias) for module in model.modules() if isinstance(module, Router)}
        self._constant = {name: 1.0 for name, parameter in model.named_parameters() if id(parameter) in norms}
        for name, buffer in model.named_buffers():
            if id(buffer) not in biases:
                raise ValueError(f"{name}: nothing says what it is at first")
            self._constant[name] = 0.0
        self._drawn = {name: p.numel() for name, p in model.named_parameters() if name not in self._constant}
        self._embeddings = embedding_names(model)

    @torch.no_grad()
    def fill(self, parts: Mapping[str, Part], std: float, seed: int, *, embedding_std: float | None = None) -> None:
        """Set what a process holds, by the names of the whole model: all on one device, if not the CPU all whole.

        The embedding has ``embedding_std`` where that is given; the same numbers are drawn for all.

        Raises ValueError if a name is not one of the model's.
        """
        unknown = parts.keys() - self._constant.keys() - self._drawn.keys()
        if unknown:
            raise ValueError(f"{min(unknown)}: the whole model has no such tensor")
        for name in parts.keys() & self._constant.keys():
            parts[name].tensor.fill_(self._constant[name])
        if not (held := parts.keys() & self._drawn.keys()):
            return
        some = parts[next(iter(held))].tensor
        stream = NormalStream(seed, std, some.device)
        nothing = Part(some.new_empty(0), 0)
        for name, numel in self._drawn.items():
            part = parts.get(name, nothing)
            stream.fill(part.tensor, part.start, numel)
            if embedding_std is not None and name in self._embeddings:
                part.tensor.mul_(embedding_std / std)


def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Fresh weights for a model that is whole."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    InitialWeights(model).fill({name: Part(tensor, 0) for name, tensor in tensors}, std, seed)
