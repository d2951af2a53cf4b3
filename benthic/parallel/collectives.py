"""FSDP2's messages as they are, and counted: what a rank sends if they go round in a ring, as large ones do."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from benthic.parallel.traffic import Traffic


class _Counted:
    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

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
        work: dist.Work | None = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class CountedReduceScatter(_Counted, ReduceScatter):
    """Every rank's part of the sum, to that rank."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Send, receive and add up."""
        self._traffic.add("gradients", (group.size() - 1) * output_tensor.nbytes)
        work: dist.Work | None = dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )
        return work


def ring_all_reduce_bytes(size: int, ranks: int) -> float:
    """What each rank sends of a message of ``size`` bytes that all sum up."""
    return 2 * size * (ranks - 1) / ranks
