"""The optimizer of a language model: which parameters are updated how, and its state by parameter name.

Weight decay applies to matrices, among them embedding, head and router; norm weights are not decayed. With Muon, hidden
matrices are orthogonalised; embedding, head, router and norms, whose rows are not one linear map between hidden
states, stay with AdamW.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benthic.config.schema import OptimizerConfig
from benthic.model import Trainable
from benthic.model.layers import SwiGLU
from benthic.model.moe import Experts, Router
from benthic.model.trainable import embedding_names
from benthic.ops.total_norm import total_norm
from benthic.parallel.local import is_divided, local
from benthic.parallel.owners import dividing_group
from benthic.precision.compute import Cast, compute_dtype, fast_matmul_dtype
from benthic.train.adamw import LowPrecisionAdamW
from benthic.train.checkpoint import copy_into
from benthic.train.muon import Division, Muon

_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
_MUON_STATE = ("momentum",)
_MTP = re.compile(r"((down|up)\.)?mtp\W")
"""Begins the names of MTP modules' parameters, and of their adapters'."""


class ModelOptimizer:
    """AdamW, or Muon beside AdamW, over all parameters of a model; ``moments`` is the dtype of AdamW's.

    Of a model that is divided among processes it updates the parts held here, and knows no others.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, moments: torch.dtype = torch.float32) -> None:
        self.config, self.moments = config, moments
        self._room: dict[str, Tensor] = {}
        self._copies: frozenset[str] = model.copies if isinstance(model, Trainable) else frozenset()
        parameters = dict(model.named_parameters())
        held = {name: _held(parameter) for name, parameter in parameters.items()}
        self._names: dict[Tensor, str] = {part: name for name, part in held.items()}
        self._divided = [(held[name], p) for name, p in parameters.items() if held[name] is not p]
        self._late = {parameter for parameter, name in self._names.items() if _MTP.match(name)}
        of_muon = hidden_matrices(model) if config.name == "muon" and isinstance(model, Trainable) else {}
        matrices = {held[name]: of_muon[parameter] for name, parameter in parameters.items() if parameter in of_muon}
        others = [parameter for parameter in self._names if parameter not in matrices]
        embeddings = [held[name] for name in sorted(embedding_names(model) & held.keys())]
        self._parts: list[tuple[torch.optim.Optimizer, tuple[str, ...]]] = [
            (adamw(others, config, moments, embeddings), _ADAMW_STATE)
        ]
        if matrices:
            products = matrix_products(config, next(iter(matrices)).device)
            muon = Muon(
                _groups_by_parts(matrices),
                config.matrix_learning_rate,
                weight_decay=config.weight_decay,
                dtype=compute_dtype(products),
                divided=_divisions(self._divided),
            )
            self._parts.append((muon, _MUON_STATE))
        self._groups = [(group, group["lr"]) for optimizer, _ in self._parts for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._names:
            parameter.grad = None
        for _, parameter in self._divided:
            parameter.grad = None

    def grad_norm(self) -> Tensor:
        """L2 norm of all gradients together that are held here, a scalar; what another process counts is left out."""
        grads = list(self._grads())
        if self._copies:
            grads = [p.grad for p, name in self._names.items() if p.grad is not None and name not in self._copies]
        return total_norm(grads) if grads else torch.zeros(())

    def step(self, learning_rate_factor: float, grad_norm: float) -> None:
        """Clip the gradients, whose norm is given, and update at this share of the peak rates."""
        grads = list(self._grads())
        if grad_norm > self.config.clip_norm:
            torch._foreach_mul_(grads, self.config.clip_norm / grad_norm)
        for group, peak in self._groups:
            group["lr"] = peak * learning_rate_factor
        for optimizer, _ in self._parts:
            optimizer.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """State of every parameter under ``<parameter>.<state>``; empty before the first update.

        MTP modules have none until their loss counts.
        """
        return {
            f"{self._names[parameter]}.{key}": state[key]
            for optimizer, keys in self._parts
            for parameter, state in optimizer.state.items()
            for key in keys
        }

    def room_for_state(self) -> dict[str, Tensor]:
        """Memory for every state that there may be, under the names of :meth:`state_tensors`: where one is, its own.

        What :meth:`load_state_tensors` is given next may be these, and is then copied no more.
        """
        there = self.state_tensors()
        self._room = {
            name: there[name] if name in there else self._empty_state(key, parameter)
            for optimizer, keys in self._parts
            for parameter in _parameters(optimizer)
            for key in keys
            for name in [f"{self._names[parameter]}.{key}"]
        }
        return dict(self._room)

    def load_state_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Take over a saved state. Raises InputError, naming ``source``, if it is of another model or optimizer."""
        room, self._room = self._room, {}
        if not tensors:
            for optimizer, _ in self._parts:
                optimizer.state.clear()
            return
        absent = self._late if not any(_MTP.match(key) for key in tensors) else set()
        for optimizer, keys in self._parts:
            optimizer.state.clear()
            for parameter in _parameters(optimizer):
                if parameter in absent:
                    continue
                places = {key: f"{self._names[parameter]}.{key}" for key in keys}
                optimizer.state[parameter] = {
                    key: room[name] if name in room else self._empty_state(key, parameter)
                    for key, name in places.items()
                }
        copy_into(self.state_tensors(), tensors, source)

    def _empty_state(self, key: str, parameter: Tensor) -> Tensor:
        if key == "step":
            return torch.empty((), device=parameter.device)
        return torch.empty_like(parameter, dtype=self.moments if key in _ADAMW_STATE else None)

    def _grads(self) -> Iterable[Tensor]:
        for part, parameter in self._divided:
            part.grad = None if parameter.grad is None else local(parameter.grad)
        return (parameter.grad for parameter in self._names if parameter.grad is not None)


def _held(parameter: Tensor) -> Tensor:
    """The parameter, or the part of it that is held here, in the same memory."""
    return local(parameter.detach()) if is_divided(parameter) else parameter


def matrix_products(config: OptimizerConfig, device: torch.device) -> Cast:
    """The precision of Muon's products: as set, or by what the device has units for."""
    if config.matrix_products == "auto":
        return "bf16" if fast_matmul_dtype(device) == torch.bfloat16 else "fp32"
    return config.matrix_products


def adamw(
    parameters: list[Tensor],
    config: OptimizerConfig,
    moments: torch.dtype = torch.float32,
    embeddings: Sequence[Tensor] = (),
) -> torch.optim.Optimizer:
    """AdamW as it is set, with decay for matrices alone; ``moments`` is the dtype of its moments.

    ``embeddings`` are those of the parameters that have a rate of their own.
    """
    apart = set(embeddings)
    others = [p for p in parameters if p not in apart]
    rate = config.embedding_learning_rate or config.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": list(embeddings), "weight_decay": config.weight_decay, "lr": rate},
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if moments == torch.float32:
        return torch.optim.AdamW(groups, **settings, fused=True)
    return LowPrecisionAdamW(groups, **settings, moments=moments)


def hidden_matrices(model: Trainable) -> dict[Tensor, int]:
    """Muon's parameters, and how many matrices each holds one above the other: gate and up are two."""
    apart = [*model.transformer.embed.parameters(), *model.transformer.head.parameters()]
    apart += [module.weight for module in model.modules() if isinstance(module, Router)]
    fused = {id(module.gate_up.weight) for module in model.modules() if isinstance(module, SwiGLU)}
    fused |= {id(module.gate_up) for module in model.modules() if isinstance(module, Experts)}
    kept = {id(parameter) for parameter in apart}
    return {p: 2 if id(p) in fused else 1 for p in model.parameters() if p.ndim >= 2 and id(p) not in kept}


def _groups_by_parts(matrices: dict[Tensor, int]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p, count in matrices.items() if count == parts], "parts": parts}
        for parts in sorted(set(matrices.values()))
    ]


def _divisions(divided: Sequence[tuple[Tensor, Tensor]]) -> dict[Tensor, Division]:
    """The parts, of pairs with what they are parts of, that are rows of a matrix; parts of a stack are whole ones."""
    groups = {part: dividing_group(parameter) for part, parameter in divided if part.ndim == 2}
    return {part: Division(len(whole), group) for part, whole in divided if (group := groups.get(part)) is not None}


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
