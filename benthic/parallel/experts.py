"""Routed experts divided among the ranks of a group, applied to a model from outside.

Each rank keeps its share of every layer's experts, whole and in order. What a layer's experts are called with goes to
the ranks that have them first, through hooks; so experts compute as they do on one process, in whatever precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

from benthic.model.moe import Experts
from benthic.parallel.dispatch import Dispatch, Sender

_DISPATCH = "_dispatch"


def divide_experts(model: nn.Module, sender: Sender, *, fp8: bool = False) -> None:
    """Keep this rank's share of all experts, and let tokens travel. Their number must be a multiple of the ranks.

    Args:
        fp8: send what experts read in FP8; for experts that multiply in FP8, which then compute the same.
    """
    for experts in model.modules():
        if isinstance(experts, Experts):
            _keep_share(experts, sender.group.rank(), sender.group.size())
            _let_tokens_travel(experts, Dispatch(sender, len(experts.down), fp8=fp8))


def senders_of(experts: Experts) -> list[int] | None:
    """How many of the rows that divided experts are called with came from each rank; nothing if they are whole."""
    dispatch = experts.__dict__.get(_DISPATCH)
    return None if dispatch is None else dispatch.pairs_of_senders


def _keep_share(experts: Experts, rank: int, ranks: int) -> None:
    for name, weight in list(experts.named_parameters()):
        size = len(weight) // ranks
        share = weight.detach()[rank * size : (rank + 1) * size]
        # Cloned, so that the others' memory is freed.
        setattr(experts, name, nn.Parameter(torch.empty_like(share) if share.is_meta else share.clone()))


def _let_tokens_travel(experts: Experts, dispatch: Dispatch) -> None:
    def before(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return dispatch.send(*args)

    def after(_: nn.Module, __: Any, out_PD: Tensor) -> Tensor:
        return dispatch.bring_back(out_PD)

    experts.__dict__[_DISPATCH] = dispatch
    experts.register_forward_pre_hook(before)
    experts.register_forward_hook(after)
