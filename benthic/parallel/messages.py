"""Small messages of any shape: what JSON has."""

import json
from typing import Any

import torch
import torch.distributed as dist


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
