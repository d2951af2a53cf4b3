"""Bytes that a process sends to others, counted at torch.distributed's own functions and where ranks share memory.

Collectives count as a ring sends them, which is what large messages cost: each process sends on, in every round, a
part of the whole.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.pipelining import schedules

from benthic.parallel.segments import Segments


def _ranks(group: Any) -> int:
    return dist.get_world_size(group)


def _all_to_all(out: Any, x: Any, receive: Any = None, send: Any = None, group: Any = None, **_: Any) -> float:
    here = dist.get_rank(group)
    rows = list(send) if send is not None else [len(x) // _ranks(group)] * _ranks(group)
    return sum(count for rank, count in enumerate(rows) if rank != here) * (x.nbytes // max(len(x), 1))


def _gather(output_tensor: Any, input_tensor: Any, group: Any = None, **_: Any) -> float:
    return (_ranks(group) - 1) * input_tensor.nbytes


def _scatter(output: Any, *_: Any, group: Any = None, **__: Any) -> float:
    return (_ranks(group) - 1) * output.nbytes


def _reduce(tensor: Any, *_: Any, group: Any = None, **__: Any) -> float:
    return 2 * tensor.nbytes * (_ranks(group) - 1) / _ranks(group)


def _p2p(ops: Any, **_: Any) -> float:
    return sum(op.tensor.nbytes for op in ops if op.op is dist.isend)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Within it, bytes are added up by kind: all_to_all, all_gather, reduce_scatter, all_reduce, point_to_point."""
    sent: Counter[str] = Counter()

    def watch(name: str, kind: str, size: Any, where: Any = dist) -> Any:
        usual = getattr(where, name)

        def called(*args: Any, **named: Any) -> Any:
            sent[kind] += round(size(*args, **named))
            return usual(*args, **named)

        return patch.object(where, name, called)

    def collective(names: tuple[str, ...], kind: str, size: Any) -> list[Any]:
        return [watch(name, kind, size) for name in names]

    watched = [
        watch("all_to_all_single", "all_to_all", _all_to_all),
        *collective(("all_gather_single", "all_gather_into_tensor"), "all_gather", _gather),
        *collective(("reduce_scatter_single", "reduce_scatter_tensor"), "reduce_scatter", _scatter),
        watch("all_gather", "all_gather", lambda _, out, x: out.nbytes - x.nbytes, Segments),
        watch("reduce_scatter", "reduce_scatter", lambda _, out, x: x.nbytes - out.nbytes, Segments),
        watch("all_reduce", "all_reduce", _reduce),
        watch("send", "point_to_point", lambda tensor, *_, **__: tensor.nbytes),
        watch("_batch_p2p", "point_to_point", _p2p, schedules),
    ]
    with ExitStack() as stack:
        for one in watched:
            stack.enter_context(one)
        yield sent
