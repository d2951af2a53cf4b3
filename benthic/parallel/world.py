"""The processes of a run as the training loop sees them. This is a run of one process: there is nobody to agree with.

:class:`benthic.parallel.group.Group` is one of several. All that differs between the two is behind these methods, so
that the loop need not ask which it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from benthic.model.memory import give_memory
from benthic.parallel.board import Board
from benthic.parallel.pieces import Holding
from benthic.precision.compute import Compute

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

Tensors = dict[str, dict[str, Tensor]]
"""Named tensors in named groups, as checkpoints have them."""


class Stop(Protocol):
    """Whether this process was asked to stop."""

    signal: int | None


class World:
    """One process."""

    rank = 0
    main = True
    """Whether this process writes files and speaks to people; one of a run does."""
    processes = 1

    def spread(self, objective: nn.Module, compute: Compute, length: int) -> None:
        """Divide a model among the processes; ``compute`` is what its steps are computed in, of such sequences.

        It is on the meta device, before and after: no process could hold all of a large one.
        """

    def materialise(self, objective: nn.Module) -> None:
        """Give memory, whose content is not set, to what this process has of a model that was spread."""
        give_memory(objective)

    def rows(self, batch: int, micro_batch: int) -> range:
        """The rows of a batch that this process learns from."""
        return range(batch)

    def passes(self, batch: int, micro_batch: int) -> int:
        """How many passes every process makes over its rows, some maybe without any."""
        return -(-batch // micro_batch)

    def begin_pass(self, objective: nn.Module, *, last: bool) -> None:
        """Called before each pass of a step."""

    def total(self, numbers: Tensor) -> Tensor:
        """Their sum over those that share out the batch."""
        return numbers

    def agree(self, losses: Tensor, grad_norm: Tensor, load_ME: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, gradient norm and experts' loads of a step, of which each process knows its part."""
        return losses, grad_norm, load_ME

    def stopped_by(self, stop: Stop) -> int | None:
        """The signal that all processes stop for, as of the step just taken."""
        return stop.signal

    def listen(self, stop: Stop) -> None:
        """Tell the others from now on if this process is asked to stop."""

    def evaluating(self, objective: nn.Module, compute: Compute) -> AbstractContextManager[None]:
        """Within it, parts of the model are run by themselves, without gradients."""
        return nullcontext()

    def share(self, items: Iterable[_Item]) -> Iterator[tuple[_Item, bool]]:
        """The items that this process works on, and whether each counts: all processes get equally many."""
        return ((item, True) for item in items)

    def first(self, function: Callable[[], _Answer]) -> _Answer:
        """What the function returned on the one process that it was called on; an error is raised on all.

        The answer must be something that JSON has.
        """
        return function()

    def whole(self, model: nn.Module, tensors: Tensors) -> Tensors:
        """Whole tensors, on the main process, of what each holds; empty groups on others."""
        return tensors

    def holdings(self, model: nn.Module) -> list[Holding] | None:
        """What every process holds of the parameters and buffers of a model; nothing where one has all of it."""
        return None

    def board(self) -> Board | None:
        """A new board for messages beside those of training, which all processes ask for in one order."""
        return None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag

    def together(self, function: Callable[[], _Answer]) -> _Answer:
        """What the function returned here; an error of one process is raised on all."""
        return function()

    def watched(self, out: Path) -> AbstractContextManager[None]:
        """Within it, a process that has stopped ends all of them; where each was then is written into ``out``."""
        return nullcontext()

    def compare(self, tensors: Tensors, holdings: Sequence[Holding]) -> None:
        """Raise CopiesDiffer on all processes if any two that should hold the same numbers do not."""

    def figures(self) -> dict[str, Any]:
        """What there is to say of the last step, for ``metrics.jsonl``."""
        return {}


ALONE = World()
