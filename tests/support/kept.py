"""What a forward pass keeps for its backward pass, in bytes of distinct storages."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from benthic.precision.fp8 import Quantised
from benthic.train import recompute


def kept_bytes(
    forward: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, besides: Callable[[], Iterable[Tensor]] = tuple
) -> int:
    """Bytes that autograd keeps after ``forward()``; storages of what is then ``besides``, as weights, do not count.

    Tensors that have a note in their place (``benthic/train/recompute.py``) count by what the note keeps. What custom
    functions hold outside autograd's hooks, such as FP8 copies, is found by going through the graph. Copies of weights
    that are made for the pass are not activations: of FP8 only those with blocks one row high count.
    """
    kept: dict[int, Tensor] = {}
    pack_of = recompute._pack

    def keep(saved: Any) -> Any:
        tensor = saved._recipe if isinstance(saved, recompute._Note) else saved
        while isinstance(tensor, recompute._Recipe):
            tensor = tensor._source
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return saved

    def watched(outputs: Any) -> Any:
        pack = pack_of(outputs)
        return lambda tensor: keep(pack(tensor))

    monkeypatch.setattr(recompute, "_pack", watched)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = forward()
    monkeypatch.setattr(recompute, "_pack", pack_of)
    for value in _held_by_functions(results):
        if isinstance(value, Tensor):
            keep(value)
        elif isinstance(value, Quantised) and value.block[0] == 1:
            keep(value.numbers)
            keep(value.scales)
    for tensor in besides():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _held_by_functions(results: Any) -> list[Any]:
    nodes = [x.grad_fn for x in results if isinstance(x, Tensor) and x.grad_fn is not None]
    seen, found = set(nodes), []
    while nodes:
        node = nodes.pop()
        for value in getattr(node, "__dict__", {}).values():
            found += value if isinstance(value, tuple) else (value,)
        further = [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen.update(further)
        nodes += further
    return found
