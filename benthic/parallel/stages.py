"""A model's stages: modules that run a part of its layers, and the model without what other ranks hold.

A rank's model keeps its tree, so that the names of parameters are those of the whole model on every rank; a module
that another rank holds leaves an empty one in its place.

The first stage begins with the embedding. The last one ends with final norm, MTP modules and head, and as MTP modules
embed too, it needs the embedding as well: where first and last stage are on one rank, as in V-shaped schedules, it is
the same; elsewhere the last rank keeps a copy, under the same name. Gradients of both are added up on both, so that
the copies stay equal bit for bit.

Shapes: B sequences, T positions, S = T + depths tokens, D model width, V vocabulary, K predictions.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from benthic.model import LanguageModel, Routing
from benthic.model.language_model import mtp_states
from benthic.model.moe import Router
from benthic.model.transformer import attention_context

if TYPE_CHECKING:  # it takes a while to import, and most runs have no pipeline
    from benthic.parallel.pipeline import Pipeline

EMBEDDING = "transformer.embed.weight"
PIPELINE = "_pipeline"
"""The attribute of a model that has only some stages."""


class Elsewhere(nn.Module):
    """Stands where another rank's module would be."""

    def __init__(self, absent: nn.Module) -> None:
        super().__init__()
        self.routers = sum(isinstance(module, Router) for module in absent.modules())
        """Routers of what is not here, which keep their place among the model's."""


class MicroBatch(Protocol):
    """What stages ask of a micro-batch, and tell it."""

    tokens_BS: Tensor
    """T tokens and one more for each MTP module that takes part."""
    document_BT: Tensor | None
    depths: int
    """MTP modules that take part."""

    def routed(self, first: int, routings: list[Routing]) -> Tensor | None:
        """Takes note of what a stage's MoE layers did, the model's from number ``first`` on; a loss of theirs."""

    def predicted(self, states: list[Tensor], head_VD: Tensor) -> Tensor:
        """The loss of states (B, T, D) ready for the head, the main model's and those of MTP modules, a scalar."""


class AnyStage(nn.Module, ABC):
    """What a pipeline runs on one rank: gives states to the next stage, or after the last a loss."""

    @abstractmethod
    def size(self, micro_batch: MicroBatch) -> tuple[int, ...]:
        """Of the states that stages hand on."""

    @abstractmethod
    def forward(self, x_BTD: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """States (B, T, D) for the next stage, or the loss after the last; the first stage takes none."""


class Stage(AnyStage):
    """Some consecutive layers of a model, with the embedding before the first and the head after the last."""

    def __init__(self, model: LanguageModel, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.first, self.last = model.config, first, last
        transformer = model.transformer
        self.blocks = nn.ModuleList(transformer.layers[layer] for layer in layers)
        self.first_moe_layer = max(0, layers.start - model.config.first_k_dense_replace)
        if first or (last and len(model.mtp)):
            self.embed = transformer.embed
        if last:
            self.norm, self.head, self.mtp = transformer.norm, transformer.head, model.mtp

    def size(self, micro_batch: MicroBatch) -> tuple[int, ...]:
        """Sequences, positions and width."""
        sequences, tokens = micro_batch.tokens_BS.shape
        return sequences, tokens - micro_batch.depths, self.config.hidden_size

    def forward(self, x_BTD: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """As any stage."""
        depths = micro_batch.depths
        tokens_BS = micro_batch.tokens_BS
        tokens_BT = tokens_BS[:, : tokens_BS.shape[1] - depths]
        context = attention_context(self.config, tokens_BT, micro_batch.document_BT)
        if self.first:
            x_BTD = self.embed(tokens_BT)
        assert x_BTD is not None
        routings = list[Routing]()
        for block in self.blocks:
            x_BTD, routing = block(x_BTD, context)
            routings += [] if routing is None else [routing]
        if not self.last:
            loss = micro_batch.routed(self.first_moe_layer, routings)
            return x_BTD if loss is None else with_loss(x_BTD, loss)
        modules = list(self.mtp[:depths])
        states, further = [self.norm(x_BTD)], list[Routing]()
        if modules:
            states, further = mtp_states(modules, self.embed, states[0], tokens_BS, context)
        loss = micro_batch.routed(self.first_moe_layer, routings + further)
        prediction_loss = micro_batch.predicted(states, self.head.weight)
        return prediction_loss if loss is None else prediction_loss + loss


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """``x``, in whose backward pass ``loss`` gets the gradient 1: how a stage's own loss joins a later one's."""
    out: Tensor = _WithLoss.apply(x, loss)
    return out


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.clone()  # a view could not be detached in place, as torch's pipelining does

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grads[0], one


def make_stages(model: LanguageModel, layers: list[range], held: list[int]) -> dict[int, Stage]:
    """The stages of these numbers; ``layers`` are those of every stage."""
    last = len(layers) - 1
    return {number: Stage(model, layers[number], first=number == 0, last=number == last) for number in held}


def drop_other_stages(model: LanguageModel, stages: dict[int, Stage]) -> None:
    """Leave only what these stages hold in the model, whose tree remains."""
    kept = {id(module) for stage in stages.values() for module in stage.modules()}
    parents: list[tuple[nn.Module, list[str]]] = [
        (model.transformer, ["embed", "norm", "head"]),
        (model.transformer.layers, [str(layer) for layer in range(len(model.transformer.layers))]),
        (model.mtp, [str(depth) for depth in range(len(model.mtp))]),
    ]
    for parent, names in parents:
        for name in names:
            module = parent.get_submodule(name)
            if id(module) not in kept:
                setattr(parent, name, Elsewhere(module))


def pipeline_of(model: nn.Module) -> "Pipeline | None":
    """What the model's steps go through; None if all of it is here."""
    found: Pipeline | None = model.__dict__.get(PIPELINE)
    return found


def routers_here(model: nn.Module) -> list[Router | None]:
    """The model's routers in order, None for one that another rank holds."""
    found: list[Router | None] = []
    for module in model.modules():
        if isinstance(module, Router):
            found.append(module)
        elif isinstance(module, Elsewhere):
            found += [None] * module.routers
    return found
