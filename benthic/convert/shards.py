"""Writing weights as the published checkpoints are: safetensors shards of bounded size and an index over them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from benthic.convert.checkpoint import INDEX
from benthic.errors import WorkFailed
from benthic.files import usual_mode

PRODUCER = "benthic"
"""What the index says wrote it."""
Purpose = Literal["export", "training", "import"]
"""What it was written for, as the index says: an export is replaced only by another, and the result of a training by
that of its next; an import, which may exist nowhere else, by nothing."""


def write_shards(
    folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], max_shard_bytes: int, purpose: Purpose
) -> int:
    """Writes every tensor and the index; holds one shard at a time. Returns the number of shards.

    Raises WorkFailed, before anything is written, if the disk has too little room.

    Args:
        folder: the files go here.
        sizes: bytes of each tensor, in the order they are written.
        read: gives a tensor by its name.
        max_shard_bytes: of a file, unless a single tensor is larger.
        purpose: what may later replace it.
    """
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise WorkFailed(
            f"{folder.parent}: weights of {total / 1e9:,.1f} GB, but the disk has {free / 1e9:,.1f} GB free"
        )
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Clones: tensors that share memory, as views of one parameter do, are refused.
        with usual_mode(folder / file):
            save_file({name: read(name).clone() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    metadata = {"total_size": total, "producer": PRODUCER, "purpose": purpose}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    return len(shards)


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into runs of at most ``max_shard_bytes``; a larger tensor has a run of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, value: Any) -> None:
    """An object as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
