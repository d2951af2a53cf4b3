"""Messages of any shape: what JSON has."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast(message: Any, source: int = 0) -> Any:
    """What the source has, on all processes."""
    text = json.dumps(message).encode()
    size = torch.tensor(len(text))
    dist.broadcast(size, source)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == source:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(data, source)
    return json.loads(bytes(data.tolist()))


def gather(message: Any) -> list[Any]:
    """What every process has, on all, by rank."""
    text = json.dumps(message).encode()
    sizes = gather_numbers(torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    data = torch.zeros(longest, dtype=torch.uint8)
    data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    found = gather_numbers(data)
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(found, sizes, strict=True)]


def gather_numbers(numbers: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Tensors of one shape, of every process of a group or of all, on all of them."""
    found = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, numbers, group=group)
    return found
