"""What a person sees of a whole run: one display over all its stages, bars on a terminal and plain lines elsewhere.

Each line says which stage of how many it is, how far that has come, and how long it and the whole still take. For
stages to come, that is what was forecast; for the present one, what its last minute tells, or those of its parts that
are over.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from benthic.train.progress import clock

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 10.0
_WINDOW = 60.0
"""Seconds that the rate of a stage is taken from."""


class View(Protocol):
    """Where lines and positions go."""

    def show(self, where: str, done: int, total: int, text: str, *, last: bool) -> None:
        """The state of a stage."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """Nothing more will be shown."""


class Display:
    """A context manager over a run.

    Args:
        names: of all stages, in order.
        forecast: seconds that stages take, by name, asked for again when one begins; others are not known.
        stream: by default standard error.
    """

    def __init__(
        self, names: Sequence[str], forecast: Callable[[], Mapping[str, float]], stream: TextIO | None = None
    ) -> None:  # fmt: skip
        self._names, self._forecast = list(names), forecast
        self._stream = stream or sys.stderr
        self._view: View | None = None

    def __enter__(self) -> Self:
        self._view = Terminal(self._stream) if self._stream.isatty() else Lines(self._stream)
        return self

    def __exit__(self, *exception: object) -> None:
        self.view.close()

    @property
    def view(self) -> View:
        """There while the display is entered."""
        assert self._view is not None
        return self._view

    def note(self, text: str) -> None:
        """A line that stays."""
        self.view.note(text)

    def stage(self, name: str, total: int = 0) -> "StageProgress":
        """Begin to show a stage; with ``total``, one of so many steps."""
        expected = dict(self._forecast())
        place = self._names.index(name)
        known = [expected[later] for later in self._names[place + 1 :] if later in expected]
        return StageProgress(
            self.view, f"{place + 1}/{len(self._names)} {name}", total, expected.get(name), sum(known)
        )  # fmt: skip


class StageProgress:
    """One stage's part of the display; also what training and preparing report to."""

    def __init__(self, view: View, title: str, total: int, expected: float | None, after: float) -> None:
        self._view, self._title, self._total = view, title, total
        self._expected, self._after = expected, after
        self._begun = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, step: int, text: str, seconds_left: float | None = None) -> None:
        """Show that ``step`` steps are done; how long the rest takes is taken from the last minute, or as given."""
        now = time.monotonic()
        self._seen.append((now, step))
        while now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        if step > before:
            seconds_left = (now - then) / (step - before) * (self._total - step)
        self._show(step, self._total, text, seconds_left)

    def count(self, what: str, done: int, total: int | None) -> None:
        """Show what is being done within a stage that has no steps of its own."""
        spent = time.monotonic() - self._begun
        seconds_left = None if self._expected is None else max(0.0, self._expected - spent)
        self._show(done, total or 0, what, seconds_left)

    def passed(self, done: int, total: int) -> None:
        """So many of equal parts are over: from here on they, and no forecast, say how long the stage takes."""
        self._expected = (time.monotonic() - self._begun) * total / done

    def _show(self, done: int, total: int, text: str, seconds_left: float | None) -> None:
        if seconds_left is not None:
            both = "" if not self._after else f", {clock(seconds_left + self._after)} in all"
            text = "  ".join(filter(None, [text, f"{clock(seconds_left)} left{both}"]))
        self._view.show(self._title, done, total, text, last=bool(self._total) and done == self._total)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._view.note(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Lines:
    """Plain lines, at most one in ten seconds, and one for the beginning and the last step of a stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next, self._where = 0.0, ""

    def show(self, where: str, done: int, total: int, text: str, *, last: bool) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        if last or now >= self._next or where != self._where:
            self._next, self._where = now + SECONDS_BETWEEN_LINES, where
            self.note(f"{where} {_counted(done, total)}{text}")

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class Terminal:
    """A bar for the present stage, by rich; lines that stay go above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars: Bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"),
            console=Console(file=stream), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bars.add_task("", total=None, figures="")
        self._bars.start()

    def show(self, where: str, done: int, total: int, text: str, *, last: bool) -> None:
        """Move the bar."""
        figures = f"{_counted(done, total)}{text}".replace("[", r"\[")
        self._bars.update(self._task, description=where, completed=done, total=total or None, figures=figures)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """The bar stays as it was last."""
        self._bars.stop()


def _counted(done: int, total: int) -> str:
    return f"{done}/{total}  " if total else (f"{done}  " if done else "")
