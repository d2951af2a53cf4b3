"""Metrics sent on to trackers of experiments: TensorBoard, wandb, trackio.

``metrics.jsonl`` is the record; a tracker shows a copy of its numbers, under the same names.
"""

import importlib
import math
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from benthic.errors import InputError, MissingExtra
from benthic.files import read_json_object, write_atomically

TrackerName = Literal["tensorboard", "wandb", "trackio"]

_PROJECT = "benthic"


class Tracker(Protocol):
    """Takes the numbers of one step at a time."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by name."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the run's ``tensorboard/``."""

    def __init__(self, run: Path, step: int) -> None:
        # What a killed run logged after the step it goes on from is not shown.
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Send what is left."""
        self._writer.close()


class Wandb:
    """A run of wandb; where and whether it is sent is for wandb's own settings to say."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        name = _run_name(run)
        self._run = importlib.import_module("wandb").init(
            project=_PROJECT, id=name, name=name, dir=str(run), config=settings, resume="allow"
        )
        # Its own count of steps cannot go back, as a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by name."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, kept on this machine."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        self._run = importlib.import_module("trackio").init(
            project=_PROJECT, name=_run_name(run), config=settings, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by name."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def require_trackers(names: Iterable[TrackerName]) -> None:
    """Raise MissingExtra for the first whose library is not installed."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingExtra(name, "track") from error


def open_trackers(
    names: Iterable[TrackerName], run: Path, step: int, settings: dict[str, Any], note: Callable[[str], None]
) -> list[Tracker]:
    """Trackers that go on after ``step``. Those that keep a run's settings are given them.

    Raises InputError if one cannot begin. One that fails later is told of through ``note``, and left out from then on.
    """
    trackers: list[Tracker] = []
    for name in names:
        try:
            trackers.append(Optional(name, _open(name, run, step, settings), note))
        except Exception as error:  # libraries that talk to services, each with errors of its own
            for earlier in trackers:
                earlier.close()
            raise InputError(f"train.track: {name} does not start: {_line(error)}") from error
    return trackers


class Optional:
    """A tracker that a run can do without: what it shows is in metrics.jsonl too."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._tracker: Tracker | None = tracker

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show numbers by name, if it still works."""
        if self._tracker is not None:
            self._attempt(self._tracker.log, step, values)

    def close(self) -> None:
        """Send what is left, if it still works."""
        if self._tracker is not None:
            self._attempt(self._tracker.close)

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._tracker = None
            self._note(f"{self._name} failed, and is left out from here on: {_line(error)}; metrics.jsonl has all")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open(name: TrackerName, run: Path, step: int, settings: dict[str, Any]) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(run, step)
    return Wandb(run, settings) if name == "wandb" else Trackio(run, settings)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a metrics row but its step; those of a list as ``name/0``, ``name/1``."""
    flat = {
        f"{key}/{place}" if isinstance(value, list | tuple) else key: item
        for key, value in row.items()
        for place, item in enumerate(value if isinstance(value, list | tuple) else [value])
    }
    return {
        key: item
        for key, item in flat.items()
        if key != "step" and isinstance(item, int | float) and math.isfinite(item)
    }


def _run_name(run: Path) -> str:
    """The run's folder and a random part, the same whenever the run goes on."""
    path = run / "track.json"
    if not path.exists():
        write_atomically(path, f'{{"name": "{uuid.uuid4().hex[:8]}"}}')
    return f"{run.resolve().name}-{read_json_object(path).get('name')}"
