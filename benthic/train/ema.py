"""Exponential moving average of the weights, an early estimate of the model after decay (V3 report section 3.2.3)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benthic.parallel.local import is_divided, local


class WeightAverage:
    """Average of a model's parameters, or of what is held here of them, moved towards them by ``1 - decay`` at every
    update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {name: local(p.detach()) if is_divided(p) else p for name, p in model.named_parameters()}
        self._decay = decay
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights."""
        torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - self._decay)

    @torch.no_grad()
    def begin_anew(self, names: Iterable[str]) -> None:
        """Forget what these weights were: the average is what they are now."""
        for name in names:
            self.tensors[name].copy_(self._parameters[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def move_into_model(self) -> None:
        """Make the average the model's weights for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.tensors[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            if isinstance(parameter, nn.Parameter):
                parameter.data, self.tensors[name] = self.tensors[name], parameter.data
            else:  # a part, whose memory others know
                kept = parameter.clone()
                parameter.copy_(self.tensors[name])
                self.tensors[name].copy_(kept)
