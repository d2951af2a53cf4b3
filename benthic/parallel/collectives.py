"""FSDP2's messages, counted: what a rank sends if they go round in a ring, as large ones do.

They go through memory where all ranks of a group share it, and else as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from benthic.parallel.segments import Segments, segments_of
from benthic.parallel.traffic import Traffic


class Ways:
    """How messages go in each group: found out at its first, which all of its ranks take part in."""

    def __init__(self) -> None:
        self._segments: dict[dist.ProcessGroup, Segments | None] = {}

    def through_memory(self, group: dist.ProcessGroup) -> Segments | None:
        """What the group's ranks share, if they do."""
        if group not in self._segments:
            self._segments[group] = segments_of(group)
        return self._segments[group]


class _Counted:
    def __init__(self, traffic: Traffic, ways: Ways) -> None:
        self._traffic, self._ways = traffic, ways

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a message."""
        return torch.empty(*size, dtype=dtype, device=device)


class CountedAllGather(_Counted, AllGather):
    """Every rank's part, to all."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Send and receive."""
        self._traffic.add("weights", (group.size() - 1) * input_tensor.nbytes)
        if segments := self._ways.through_memory(group):
            segments.all_gather(output_tensor, input_tensor)
            return None
        work: dist.Work | None = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class CountedReduceScatter(_Counted, ReduceScatter):
    """Every rank's part of the sum, to that rank."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Send, receive and add up."""
        self._traffic.add("gradients", (group.size() - 1) * output_tensor.nbytes)
        if segments := self._ways.through_memory(group):
            assert op == dist.ReduceOp.SUM
            segments.reduce_scatter(output_tensor, input_tensor)
            return None
        work: dist.Work | None = dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )
        return work


def ring_all_reduce_bytes(size: int, ranks: int) -> float:
    """What each rank sends of a message of ``size`` bytes that all sum up."""
    return 2 * size * (ranks - 1) / ranks
