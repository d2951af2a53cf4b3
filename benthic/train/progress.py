"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, Self, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Shows a run's course; a context manager."""

    def update(self, step: int, text: str, seconds_left: float | None = None) -> None:
        """Show that ``step`` steps are done, and about how long the rest takes."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


Opener = Callable[[str, int], Progress]
"""Called with a stage's name and its number of steps."""


def open_progress(title: str, steps: int, stream: TextIO | None = None) -> Progress:
    """A bar if ``stream`` (by default standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return TerminalProgress(title, steps, stream) if stream.isatty() else PlainProgress(title, steps, stream)


def describe(row: dict[str, Any], bits_per_byte: float | None) -> str:
    """The figures of a metrics row that matter to a person watching."""
    parts = [f"loss {row['loss']:.3f}"]
    if bits_per_byte is not None:
        parts.append(f"{bits_per_byte:.3f} bits/byte")
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"{row['share_of_gemm_peak']:.0%} of GEMM peak")
    return "  ".join(parts)


class PlainProgress:
    """Lines, at most one in ten seconds, and one for the last step."""

    def __init__(self, title: str, steps: int, stream: TextIO) -> None:
        self._title, self._steps, self._stream = title, steps, stream
        self._next = 0.0

    def update(self, step: int, text: str, seconds_left: float | None = None) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        if now >= self._next or step == self._steps:
            self._next = now + _SECONDS_BETWEEN_LINES
            self.note(f"{self._title} {step}/{self._steps}  {text}{left(seconds_left)}")

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class TerminalProgress:
    """A bar by rich."""

    def __init__(self, title: str, steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=stream),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(title, total=steps, figures="")

    def update(self, step: int, text: str, seconds_left: float | None = None) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, figures=f"{text}{left(seconds_left)}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def left(seconds: float | None) -> str:
    """How long something still takes, behind other figures; nothing if that is not known."""
    return "" if seconds is None else f"  {clock(seconds)} left"


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours from the first one on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
