"""Low-rank adapters (LoRA, arXiv 2106.09685) that leave the model plain: its weights are at all times the merged ones.

A weight is W = W0 + alpha / rank * B A, with W0 kept aside and B and A trained. The gradients of B and A follow from
that of W by the chain rule, as soon as that of W is whole, whereupon it is dropped: no two of them exist at once, and
moments are kept for B and A alone. So whatever the model is computed with, precision, kernels, recomputation, needs to
know nothing of adapters, nor does whoever reads its weights.

Shapes: E matrices stacked (experts), F rows, D columns, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benthic.config.posttrain import AdapterConfig
from benthic.config.schema import OptimizerConfig
from benthic.errors import InputError
from benthic.model import Trainable
from benthic.train.checkpoint import copy_into
from benthic.train.optimizer import ModelOptimizer


class Adapters(nn.Module):
    """Low-rank updates of a model's matrices whose names match; all other weights of the model are frozen.

    Raises InputError if a target matches no matrix, or the rank is larger than a matrix's sides.
    """

    def __init__(self, model: Trainable, config: AdapterConfig, seed: int) -> None:
        super().__init__()
        self._scale = config.alpha / config.rank
        self._weights = _matching(model, config)
        self._start: dict[str, Tensor] = {}
        """W0 by name."""
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, weight_FD in self._weights.items():
            *stack, rows, columns = weight_FD.shape
            down_RD = weight_FD.new_empty(*stack, config.rank, columns).detach()
            self.down[_key(name)] = nn.Parameter(down_RD.normal_(0.0, columns**-0.5, generator=generator))
            self.up[_key(name)] = nn.Parameter(weight_FD.new_zeros(*stack, rows, config.rank).detach())
            weight_FD.requires_grad_(True)
            weight_FD.register_post_accumulate_grad_hook(self._handing_on(name))
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Take the model's present weights for W0, to which the updates are added from now on."""
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def merge(self) -> None:
        """Make the model's weights W0 and the updates."""
        for name, weight_FD in self._weights.items():
            update_FD = self.up[_key(name)] @ self.down[_key(name)]
            torch.add(self._start[name], update_FD, alpha=self._scale, out=weight_FD.data)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        parts = {"down": self.down, "up": self.up}
        found = {f"{name}.{part}": of[_key(name)].detach() for part, of in parts.items() for name in self._weights}
        return found | {f"{name}.start": tensor for name, tensor in self._start.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], source: str) -> None:
        """Become what was saved, with the model. Raises InputError, naming ``source``, if it does not fit."""
        copy_into(self.tensors(), tensors, source)
        self.merge()

    def _handing_on(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hand_on(weight_FD: Tensor) -> None:
            """The gradient of W to B and A."""
            assert weight_FD.grad is not None
            grad_FD, weight_FD.grad = weight_FD.grad, None
            down_RD, up_FR = self.down[_key(name)], self.up[_key(name)]
            _add_grad(up_FR, self._scale * grad_FD @ down_RD.mT)
            _add_grad(down_RD, self._scale * up_FR.mT @ grad_FD)

        return hand_on


class AdapterOptimizer(ModelOptimizer):
    """AdamW over the updates; each step makes the model's weights anew."""

    def __init__(self, adapters: Adapters, config: OptimizerConfig, moments: torch.dtype = torch.float32) -> None:
        super().__init__(adapters, config.model_copy(update={"name": "adamw"}), moments)
        self._adapters = adapters

    def step(self, learning_rate_factor: float, grad_norm: float) -> None:
        """As the model's own optimizer does."""
        super().step(learning_rate_factor, grad_norm)
        self._adapters.merge()


def _matching(model: Trainable, config: AdapterConfig) -> dict[str, nn.Parameter]:
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}
    found: dict[str, nn.Parameter] = {}
    for target in config.targets:
        matched = {name: weight for name, weight in matrices.items() if f".{target}." in f".{name}."}
        if not matched:
            names = sorted({part for name in matrices for part in name.split(".") if not part.isdecimal()} - {"weight"})
            raise InputError(f"adapter.targets: no matrix has {target!r} in its name; parts are {', '.join(names)}")
        found |= matched
    for name, weight in found.items():
        if config.rank > min(weight.shape[-2:]):
            raise InputError(f"adapter.rank={config.rank}: must be at most {min(weight.shape[-2:])}, a side of {name}")
    return {name: found[name] for name in matrices if name in found}


def _key(name: str) -> str:
    return name.replace(".", "/")  # which a module's name may hold


def _add_grad(parameter: Any, grad: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
