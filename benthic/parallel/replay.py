"""Recorded expert loads played back over placements: how evenly GPUs would have been loaded.

A placement can only be made from loads already seen. So each window of a recording is judged under the placement made
from the window before it, beside experts in their order, and beside what the same algorithm would have done had it
known the window itself.

Shapes: T records, M MoE layers, E experts, W windows.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benthic.errors import InputError
from benthic.parallel.placement import Placement, balanced, in_order

KEY = "expert_load"
"""Of rows of ``metrics.jsonl``: tokens by layer and expert, MTP modules behind the layers."""
_LINE_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Balance:
    """Busiest over average, 1 being perfect: averaged over layers and windows, and the worst of all."""

    gpu_mean: float
    """Of the tokens that a GPU's experts compute, which are also those it receives in the all-to-all."""
    gpu_worst: float
    node_mean: float
    """Of the tokens that a node's experts receive."""
    node_worst: float


@dataclass(frozen=True)
class Replay:
    """One recording under three placements."""

    windows: int
    """Judged; the first one only serves the second."""
    before: Balance | None
    """Experts in their order without replicas; none if they cannot be dealt equally to the GPUs."""
    after: Balance
    """Placed by the window before."""
    hindsight: Balance
    """Placed by the window itself."""
    moved: float
    """Share of slots that get another expert from one placement to the next, all layers and windows together."""


def read_loads(path: Path) -> Tensor:
    """Loads (T, M, E) of a run's ``metrics.jsonl``, or of any JSON-lines file with ``expert_load`` in some rows.

    Layers that only some rows have are left out: an MTP module that is trained late has no load before.

    Raises:
        InputError: no row has it, or rows differ in their experts, or a load is not a number from 0.
    """
    records: list[Tensor] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_LIMIT + 1), b""), start=1):
            record = _record(line, f"{path}: line {number}")
            if record is None:
                continue
            if records and record.shape[1] != records[0].shape[1]:
                raise InputError(
                    f"{path}: line {number}: {KEY} is of {record.shape[1]} experts: must be {records[0].shape[1]} as "
                    "before"
                )
            records.append(record)
    if not records:
        raise InputError(f"{path}: no row has {KEY}; train with --set train.expert_load_every=1")
    layers = min(map(len, records))
    return torch.stack([record[:layers] for record in records])


def replay(load_TME: Tensor, *, window: int, slots: int, gpus: int, nodes: int = 1, groups: int = 1) -> Replay:
    """Places experts by each window of records and judges the placement on the next.

    Args:
        load_TME: tokens each expert received, record after record.
        window: records a placement is made from, and used for.
        slots: replicas in all, as the rest for :func:`~benthic.parallel.placement.balanced`.
        gpus: that hold them.
        nodes: that hold the GPUs.
        groups: of experts.

    Raises:
        InputError: there are fewer than two windows, or the numbers do not fit each other.
    """
    if window < 1:
        raise InputError(f"window={window}: must be at least 1")
    load_WME = load_TME[: len(load_TME) // window * window].double().unflatten(0, (-1, window)).sum(1)
    if len(load_WME) < 2:
        raise InputError(f"window={window}: the recording's {len(load_TME)} records must be at least two windows")
    placements = [balanced(load_ME, slots=slots, gpus=gpus, nodes=nodes, groups=groups) for load_ME in load_WME]
    layers, experts = load_WME.shape[1:]
    static = in_order(layers, experts, gpus=gpus, nodes=nodes) if experts % gpus == 0 else None
    judged = load_WME[1:]
    return Replay(
        windows=len(judged),
        before=None if static is None else _balance(judged, lambda _: static),
        after=_balance(judged, lambda index: placements[index]),
        hindsight=_balance(judged, lambda index: placements[index + 1]),
        moved=_moved(placements),
    )


def _balance(load_WME: Tensor, placement: Callable[[int], Placement]) -> Balance:
    gpu = torch.stack([_ratio(placement(i).gpu_load(load)) for i, load in enumerate(load_WME)])
    node = torch.stack([_ratio(placement(i).node_load(load)) for i, load in enumerate(load_WME)])
    return Balance(float(gpu.mean()), float(gpu.max()), float(node.mean()), float(node.max()))


def _ratio(load_MD: Tensor) -> Tensor:
    """Busiest over average of D devices, for each layer (M,); 1 where there is nothing to do."""
    mean_M = load_MD.mean(-1)
    return torch.where(mean_M > 0, load_MD.amax(-1) / mean_M, 1.0)


def _moved(placements: list[Placement]) -> float:
    """A GPU's slots are a set: an expert that changes its place within a GPU does not move."""
    changed, total = 0, 0
    for old, new in itertools.pairwise(placements):
        per_gpu = old.expert_MS.shape[-1] // old.gpus
        for before, after in zip(old.expert_MS.view(-1, per_gpu), new.expert_MS.view(-1, per_gpu), strict=True):
            left = before.tolist()
            for expert in after.tolist():
                if expert in left:
                    left.remove(expert)
            changed, total = changed + len(left), total + per_gpu
    return changed / total


def _record(line: bytes, where: str) -> Tensor | None:
    if len(line) > _LINE_LIMIT:
        raise InputError(f"{where}: longer than {_LINE_LIMIT} bytes")
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or KEY not in row:
            return None
        load_ME = torch.tensor(row[KEY], dtype=torch.float64)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {KEY} must be rows of numbers in JSON: {error}") from error
    if load_ME.dim() != 2 or not load_ME.numel() or not bool((load_ME >= 0).all() & load_ME.isfinite().all()):
        raise InputError(f"{where}: {KEY} must be one row of numbers from 0 for each MoE layer")
    return load_ME
