"""Weights, gradients and optimizer state divided among data ranks by FSDP2 (``fully_shard``), applied from outside.

Each block, each MTP module and the experts of each are gathered and reduced as one; the rest (embedding, head, last
norm) goes with the objective itself. Gradients are summed, not averaged: each rank's loss is its part of the whole
batch's. ZeRO (arXiv 1910.02054) comes in three steps: optimizer state alone is divided; or gradients too, which are
then reduced after every pass; or weights too, which are then gathered for each block anew, forward and backward.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from benthic.model.moe import Experts, Router
from benthic.model.mtp import MTPModule
from benthic.model.transformer import Block
from benthic.parallel.collectives import CountedAllGather, CountedReduceScatter, Ways, ring_all_reduce_bytes
from benthic.parallel.mesh import Mesh
from benthic.parallel.traffic import Traffic
from benthic.precision.compute import Compute

_Part = TypeVar("_Part")


def shard(objective: nn.Module, mesh: Mesh, zero: int, compute: Compute, traffic: Traffic) -> None:
    """Divide all weights of an objective, whose experts are this rank's own already, and which may be without memory.

    :func:`materialise` is to follow.

    Args:
        zero: 1, 2 or 3.
        compute: what steps are computed in; :func:`computing` says otherwise for a while.
    """
    layout = mesh.layout
    if layout.data_ranks == 1:
        return
    experts_are_whole = layout.shard * layout.replicate == 1
    whole = {p for part in _parts(objective, Experts) for p in part.parameters()} if experts_are_whole else set()
    ways = Ways()
    for part in units(objective, experts=not experts_are_whole, routers=compute == "bf16"):
        divided = fully_shard(
            part,
            mesh=mesh.experts if isinstance(part, Experts) else mesh.weights,
            reshard_after_forward=zero == 3 and part is not objective,
            mp_policy=_policy("fp32" if isinstance(part, Router) else compute),
            ignored_params=whole,
        )
        _sum_gradients(divided, layout.replicate, traffic, ways)


def materialise(objective: nn.Module, device: torch.device | str) -> None:
    """Give memory, whose content is not set, to what this process has of an objective on the meta device."""
    objective.to_empty(device=device)
    if isinstance(objective, FSDPModule):
        # The first module to run becomes the root: it shall be this one, also where validation comes first.
        objective._get_fsdp_state()._lazy_init()


def is_sharded(module: nn.Module) -> bool:
    """Whether it or a part of it went through :func:`shard`."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def names_rounded_when_gathered(module: nn.Module) -> set[str]:
    """Names of a module's weights that come in the precision of :func:`computing`; none unless it is sharded."""
    if not is_sharded(module):
        return set()
    whole = {
        f"{prefix}.{name}"
        for prefix, part in module.named_modules()
        if isinstance(part, Experts) and not isinstance(part, FSDPModule)
        for name, _ in part.named_parameters()
    }
    return {name for name, _ in module.named_parameters()} - whole


def reduce_in_pass(objective: nn.Module, zero: int, *, last: bool) -> None:
    """Say whether the gradients of the pass that begins are reduced with those before it: under ZeRO-1 in the last."""
    if zero == 1 and isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
        objective.set_reshard_after_backward(last)


@contextmanager
def whole_for_step(objective: nn.Module) -> Iterator[None]:
    """A pipeline's step: weights stay gathered from its beginning, and gradients are reduced once, at its end.

    Parts of the objective are run by themselves within, forward and backward, for one micro-batch before another.
    """
    if not isinstance(objective, FSDPModule):
        yield
        return
    _reduce_from_now_on(objective, False)
    for part in _parts(objective, FSDPModule):
        part.unshard()
    yield
    _reduce_from_now_on(objective, True)
    state = objective._get_fsdp_state()
    for part in state._state_ctx.all_states:
        for group in part._fsdp_param_groups:
            group.post_backward()
    state._root_post_backward_final_callback()


@contextmanager
def one_end(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A backward pass within, through some parts of the objective, ends for FSDP2 when all of this does.

    By itself it would end at once for all parts, also for those that another pass is just running forward: it would
    take their weights away, to gather them once more.
    """
    state = next((module._get_fsdp_state() for module in modules if isinstance(module, FSDPModule)), None)
    if state is None:
        yield
        return
    state._state_ctx.post_backward_final_callback_queued = True
    yield
    state._root_post_backward_final_callback()


def _reduce_from_now_on(objective: FSDPModule, reduce: bool) -> None:
    objective.set_is_last_backward(reduce)
    objective.set_reshard_after_backward(reduce)
    objective.set_requires_gradient_sync(reduce)


@contextmanager
def gathered(objective: nn.Module, compute: Compute) -> Iterator[None]:
    """Within it, parts of the model run by themselves, without gradients, in this precision; weights stay as they are.

    Nothing may change the weights within.
    """
    if not isinstance(objective, FSDPModule):
        yield
        return
    usual = _set_policy(objective, _policy(compute))
    objective.unshard()
    try:
        yield
    finally:
        for part in _parts(objective, FSDPModule):
            part.reshard()
        _set_policy(objective, usual)


def units(objective: nn.Module, *, experts: bool, routers: bool) -> Iterator[nn.Module]:
    """What is gathered as one, inner ones first."""
    inside = {block for module in _parts(objective, MTPModule) for block in _parts(module, Block)}
    for part in objective.modules():
        if isinstance(part, MTPModule) or (isinstance(part, Block) and part not in inside):
            yield from _parts(part, Experts) if experts else ()
            yield from _parts(part, Router) if routers else ()
            yield part
    yield objective


def _parts(module: nn.Module, kind: type[_Part]) -> list[_Part]:
    return [part for part in module.modules() if isinstance(part, kind)]


def _policy(compute: Compute) -> MixedPrecisionPolicy:
    """Weights are gathered in bf16 to compute in it; gradients are reduced, and added up, in fp32 always."""
    if compute == "bf16":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def _set_policy(objective: nn.Module, policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Gather by another policy from now on; returns the one before. Routers, gathered by themselves, keep theirs."""
    before = policy
    for part in _parts(objective, FSDPModule):
        for group in part._get_fsdp_state()._fsdp_param_groups:
            if isinstance(part, Router) or group.mp_policy == policy:
                continue
            before, group.mp_policy = group.mp_policy, policy
            group._init_mp_dtypes()
            for weight in group.fsdp_params:
                # Made for the other dtype; the next gathering makes them anew.
                weight.all_gather_outputs = []
                if hasattr(weight, "_unsharded_param"):  # not before the first gathering
                    del weight._unsharded_param
    return before


def _sum_gradients(part: FSDPModule, copies: int, traffic: Traffic, ways: Ways) -> None:
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)
    part.set_custom_all_gather(CountedAllGather(traffic, ways))
    part.set_custom_reduce_scatter(CountedReduceScatter(traffic, ways))
    if copies > 1:

        def count(reduced: Tensor) -> None:
            traffic.add("copies", ring_all_reduce_bytes(reduced.nbytes, copies))

        part.set_all_reduce_hook(count)
