"""Activations that are computed again in the backward pass instead of being kept (V3 report section 3.2.3).

As published, these are the outputs of norms, MLA's up-projections, and of SwiGLU in dense layers and shared experts
(routed experts never keep theirs): cheap to compute from what is kept anyway. It is applied to a model from outside,
through module hooks: they note how each such output came about, and where autograd would save one of them for the
backward pass, it saves the note instead. The same kernels run again on the same numbers, so gradients are equal bit
for bit, in whatever precision the forward pass ran.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benthic.model.layers import RMSNorm, SwiGLU
from benthic.model.mla import AttentionContext, LatentAttention
from benthic.model.moe import Router
from benthic.model.transformer import Block
from benthic.ops.norm import rms_norm
from benthic.ops.product import linear_as_here
from benthic.ops.rope import rotate_tail
from benthic.ops.swiglu import swiglu

_Compute = Callable[[Tensor], Tensor]


class _Recipe:
    """How to compute a tensor again; ``source`` is kept for the backward pass anyway, or has a recipe itself."""

    def __init__(self, source: "Tensor | _Recipe", compute: _Compute) -> None:
        self._source, self._compute = source, compute
        self._version = source._version if isinstance(source, Tensor) else 0
        self._uses = 0
        """Places in the graph that still want the tensor; it is kept from the first of them to the last."""
        self._kept: Tensor | None = None

    def add_use(self) -> None:
        self._uses += 1

    def use(self) -> Tensor:
        """The tensor, for one of the uses that were counted."""
        self._uses -= 1
        return self.value()

    def value(self) -> Tensor:
        """The tensor, computed unless it is at hand."""
        value = self._kept
        if value is None:
            if isinstance(self._source, Tensor) and self._source._version != self._version:
                raise RuntimeError("a tensor needed to recompute an activation was changed in place")
            with torch.no_grad():
                value = self._compute(self._source if isinstance(self._source, Tensor) else self._source.value())
        self._kept = value if self._uses > 0 else None
        return value


class _Output:
    """An output with a recipe, while its block runs."""

    def __init__(self, tensor: Tensor, recipe: _Recipe) -> None:
        self.tensor, self.recipe, self._version = tensor, recipe, tensor._version

    def stands_for(self, saved: Tensor) -> bool:
        """Whether ``saved``, which shares its memory, is a view of it as it was computed."""
        return self.tensor._version == self._version and saved.dtype == self.tensor.dtype

    def is_also(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, which shares its memory, is all of it: FSDP2 hands on its modules' inputs as aliases."""
        places = [(one.size(), one.stride(), one.storage_offset()) for one in (self.tensor, tensor)]
        return self.stands_for(tensor) and places[0] == places[1]


class _Note:
    """What autograd saves in place of a view of a tensor that has a recipe."""

    def __init__(self, recipe: _Recipe, view: Tensor) -> None:
        recipe.add_use()
        self._recipe = recipe
        self._geometry = view.size(), view.stride(), view.storage_offset()

    def tensor(self) -> Tensor:
        return self._recipe.use().as_strided(*self._geometry)


class _BlockTape:
    """Lets autograd save notes instead of activations while one block runs forward."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    @property
    def running(self) -> bool:
        return self._hooks is not None

    def start(self) -> None:
        """Begin, if there will be a backward pass."""
        if torch.is_grad_enabled():
            self._hooks = torch.autograd.graph.saved_tensors_hooks(_pack(self._outputs), _unpack)
            self._hooks.__enter__()

    def stop(self) -> None:
        self._outputs.clear()
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__()

    def note(self, output: Tensor, source: Tensor, compute: _Compute) -> None:
        """``output`` is ``compute(source)``, whose kernels are the same without gradients."""
        if self.running:
            known = self._outputs.get(_address(source))
            recipe = _Recipe(known.recipe if known and known.is_also(source) else source.detach(), compute)
            self._outputs[_address(output)] = _Output(output, recipe)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _pack(outputs: dict[int, _Output]) -> Callable[[Tensor], Tensor | _Note]:
    def pack(tensor: Tensor) -> Tensor | _Note:
        known = outputs.get(_address(tensor))
        return tensor if known is None or not known.stands_for(tensor) else _Note(known.recipe, tensor)

    return pack


def _unpack(saved: Tensor | _Note) -> Tensor:
    return saved.tensor() if isinstance(saved, _Note) else saved


def recompute_activations(model: nn.Module) -> None:
    """From now on, training steps of the model recompute activations; nothing else of it changes."""
    for block in model.modules():
        if isinstance(block, Block):
            _apply(block)


def _apply(block: Block) -> None:
    tape = _BlockTape()
    block.register_forward_pre_hook(lambda *_: tape.start())
    block.register_forward_hook(lambda *_: tape.stop(), always_call=True)
    for part in block.modules():
        if isinstance(part, RMSNorm):
            part.register_forward_hook(partial(_after_norm, tape))
        elif isinstance(part, LatentAttention):
            _apply_to_attention(part, tape)
        elif isinstance(part, SwiGLU):
            _apply_to_swiglu(part, tape)
        elif isinstance(part, Router):
            part.register_forward_pre_hook(partial(_before_router, tape))


def _after_norm(tape: _BlockTape, norm: RMSNorm, args: tuple[Tensor], output: Tensor) -> None:
    # Weights are taken as they are now: in bf16 they are rounded copies that exist for this pass only.
    tape.note(output, args[0], partial(_norm_again, weight=norm.weight.detach(), eps=norm.eps))


def _norm_again(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps)


def _after_linear(tape: _BlockTape, linear: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
    tape.note(output, args[0], _forward_of(linear))


def _forward_of(linear: nn.Linear) -> _Compute:
    """The linear layer as it multiplies in this pass: FP8 puts another method in the place of ``forward``."""
    replaced = linear.__dict__.get("forward")
    return replaced if replaced is not None else partial(linear_as_here(), weight=linear.weight.detach())


def _apply_to_attention(attention: LatentAttention, tape: _BlockTape) -> None:
    up = attention.q if attention.config.q_lora_rank is None else attention.q_b
    for linear in (up, attention.kv_b):
        linear.register_forward_hook(partial(_after_linear, tape))
    projected, queries = _last_output(up, tape), attention._queries

    def noted_queries(x_BTD: Tensor, context: AttentionContext) -> Tensor:
        q_BTHK = queries(x_BTD, context)
        if projected:
            again = partial(_rotated, shape=q_BTHK.shape, cos_TP=context.cos_TP, sin_TP=context.sin_TP)
            tape.note(q_BTHK, projected.pop(), again)
        return q_BTHK

    attention._queries = noted_queries  # type: ignore[method-assign]


def _rotated(flat: Tensor, shape: torch.Size, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    return rotate_tail(flat.view(shape), cos_TP, sin_TP)


def _apply_to_swiglu(layer: SwiGLU, tape: _BlockTape) -> None:
    gate_up = _last_output(layer.gate_up, tape)

    def before_down(_: nn.Module, args: tuple[Tensor]) -> None:
        if gate_up:
            tape.note(args[0], gate_up.pop(), swiglu)

    layer.down.register_forward_pre_hook(before_down)


def _last_output(linear: nn.Linear, tape: _BlockTape) -> list[Tensor]:
    """A list that holds what the layer gave last within a running tape, until it is taken out."""
    last: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        if tape.running:
            last[:] = [output]

    linear.register_forward_hook(keep)
    return last


def _before_router(tape: _BlockTape, router: Router, args: tuple[Tensor]) -> tuple[Tensor]:
    """The router computes in fp32; its copy of a bf16 input is another that need not be kept."""
    precise = torch.promote_types(args[0].dtype, torch.float32)
    exact = args[0].to(precise)
    if exact is not args[0]:
        tape.note(exact, args[0], Tensor.float)
    return (exact,)
