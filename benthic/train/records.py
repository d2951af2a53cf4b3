"""What a stage of training writes down and shows. One process of a run does; the others go through the same motions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from benthic.config.schema import RunConfig
from benthic.parallel.world import World
from benthic.train.background import BackgroundWriter, Together
from benthic.train.joint import JointSaves
from benthic.train.ledger import Ledger
from benthic.train.metrics import MetricsLog
from benthic.train.progress import Opener, Progress
from benthic.train.shares import Shares
from benthic.train.track import open_trackers


def open_shown(show: Opener, title: str, steps: int, world: World) -> Progress:
    """What people see."""
    return show(title, steps) if world.main else Silent()


def open_writer(root: Path, world: World, shares: Shares | None) -> BackgroundWriter:
    """What writes checkpoints: all processes do."""
    board = world.board()
    if board is None or shares is None:
        return BackgroundWriter(root)
    return BackgroundWriter(root, Together(shares, JointSaves(board), world.any))


def open_ledger(out: Path, stage: str, price_per_hour: float | None, world: World) -> "Ledger | Silent":
    """What adds up time and money, of all processes."""
    if not world.main:
        return Silent()
    return Ledger(out, stage, price_per_hour=price_per_hour, devices=world.processes)


def open_metrics(
    out: Path, stage: str, step: int, earlier: Mapping[str, int], config: RunConfig, world: World,
    note: Callable[[str], None],
) -> "Metrics":  # fmt: skip
    """metrics.jsonl as it was after ``step``, and trackers; ``earlier`` stages have so many steps."""
    if not world.main:
        return Silent()
    settings = config.model_dump(mode="json")
    trackers = open_trackers(config.train.track, out, sum(earlier.values()) + step, settings, note)
    kept = step or -1  # what is validated before the first step is so again
    return MetricsLog(out / "metrics.jsonl", stage, kept, earlier=earlier, trackers=trackers)


class Silent:
    """Stands in the place of all of these, and does nothing."""

    def update(self, *_: Any) -> None:
        """Progress, or tokens and operations."""

    def note(self, text: str) -> None:
        """A line for people."""

    def write(self, row: dict[str, Any] | None = None) -> None:
        """A row of metrics, or the ledger."""

    def rewind(self, step: int) -> None:
        """Rows to be dropped."""

    def sync(self) -> None:
        """Rows to be pushed to the disk."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


Metrics = MetricsLog | Silent
