"""What the command line shows: progress on a terminal and plain lines off one, tables, JSON."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from benthic.errors import InputError, WorkFailed
from benthic.terminal import without_controls
from benthic.torchrun import rank
from benthic.train.progress import clock
from benthic.train.signals import Interrupted

if TYPE_CHECKING:
    from benthic.evaluate.records import EvaluationRecord
    from benthic.evaluate.score import Score
    from benthic.run.whole import Row
    from benthic.train.planned import RunPlan

LINE_EVERY = 5.0
"""Seconds between plain lines of progress."""
USER_PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def write_any_text() -> None:
    """What an output's encoding lacks is written as an escape, rather than ending the work with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Within it, a user's mistake ends the program with a line and status 2, work that failed with status 1.

    Only a mistake of Benthic's own has a traceback. For programs: the command line, and scripts in ``benchmarks/``.
    """
    try:
        yield
    except Interrupted as stop:
        print(stop.message, file=sys.stderr)
        raise
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        fail(*told)


def _told(error: Exception) -> tuple[str, int] | None:
    """The line that tells of an error, and the exit status; None for a mistake of Benthic's own."""
    if isinstance(error, USER_PATH_ERRORS):
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, WorkFailed | OSError):  # such as a full disk
        return str(error), 1
    # PyTorch's allocators raise RuntimeErrors.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory: take a smaller model, batch or context", 1
    return None


def fail(line: str, status: int) -> NoReturn:
    """End the program, saying why."""
    if line:  # a command without arguments has printed its help instead
        # Names out of a file from anywhere may be among it.
        said_by = f"rank {rank()}: " if rank() else ""
        print(f"{said_by}error: {without_controls(' '.join(line.split()))}", file=sys.stderr)
    sys.exit(status)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    ascii_alone = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    print(json.dumps(data, indent=2, ensure_ascii=ascii_alone))


def print_stream(pieces: Iterable[str]) -> None:
    """Text as it comes, and a line's end; a model may produce any byte, so no control characters for a terminal."""
    show = without_controls if sys.stdout.isatty() else str
    for piece in pieces:
        print(show(piece), end="", flush=True)
    print()


def print_notes(notes: Iterable[str]) -> None:
    """What somebody should know who did not ask, a line each on standard error."""
    for note in notes:
        print(f"note: {without_controls(note)}", file=sys.stderr)


def print_figures(figures: dict[str, Any]) -> None:
    """Named figures, one a line, for people."""
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {value:,.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")


def print_lines(lines: Iterable[str]) -> None:
    """Text as it is."""
    for line in lines:
        print(line)


def print_plan(plan: "RunPlan") -> None:
    """A plan as a table: parts with their share of the parameters, what a token costs, what training takes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("Parameters", "", "Share", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, number in plan.parameters.items():
        table.add_row(part.replace("_", " "), f"{number:,}", f"{number / plan.total_parameters:.1%}")
    table.add_section()
    for name, value in asdict(plan).items():
        if name not in ("parameters", "parallel", "phases"):
            table.add_row(name.replace("_", " "), _shown(value), "")
    Console().print(table)
    print("layout: " + ", ".join(f"{axis} {size}" for axis, size in plan.parallel.items()))
    for phase in plan.phases:
        print(
            f"{phase.name}: {phase.steps:,} steps of {phase.step_seconds:.4g} s at {phase.sequence_length} tokens, "
            f"{phase.tokens:,} tokens, {phase.gpu_hours:,.4g} GPU hours, {phase.memory_per_gpu_gib:,.1f} GiB a GPU"
        )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_scores(scores: "Mapping[str, Score]") -> None:
    """Scores of tasks as a table, with their intervals; nothing if there are none."""
    if not scores:
        return
    rows = [("task", "metric", "value", "95% interval", "", "n")]
    for name, score in scores.items():
        interval = "{:.4f} to {:.4f}".format(*score.ci95) if score.ci95 else "none"
        rows.append((name, score.metric, f"{score.value:.4f}", interval, score.interval or "", str(score.n)))
    _print_columns(rows)


def print_evaluations(records: "Sequence[EvaluationRecord]") -> None:
    """What stages of a run have led to, a column each; nothing if nothing was measured."""
    names = dict.fromkeys(name for record in records for name in record.scores)
    depths = max((len(record.acceptance) for record in records), default=0)
    rows = [[name, *(_short(record.scores.get(name)) for record in records)] for name in names]
    for depth in range(depths):
        scores = [record.acceptance[depth] if depth < len(record.acceptance) else None for record in records]
        rows.append([f"drafts accepted, depth {depth + 1}", *map(_short, scores)])
    if rows:
        _print_columns([["", *(record.stage for record in records)], *rows])


def _short(score: "Score | None") -> str:
    return "" if score is None else f"{score.value:.4f}"


def print_forecast(rows: "Sequence[Row]", price_per_hour: float | None) -> None:
    """The stages of a run with the time, energy and money they take, as far as that is known."""
    table = [["stage", "what", "time", "", "energy", "cost"]]
    total = kwh = money = 0.0
    for name, forecast, state in rows:
        left = state != "done"
        seconds = forecast.seconds if left else 0.0
        total += seconds or 0.0
        kwh += forecast.kwh if left else 0.0
        cost = forecast.cost(price_per_hour) if left else None
        money += cost or 0.0
        time = "?" if seconds is None else duration(seconds)
        table.append([
            name, forecast.what, time if left else "", state or forecast.how,
            f"{forecast.kwh:,.4f} kWh" if left else "", "" if cost is None else f"${cost:,.4f}",
        ])  # fmt: skip
    in_all = "" if price_per_hour is None else f"${money:,.4f}"
    _print_columns([*table, ["", "in all", duration(total), "", f"{kwh:,.4f} kWh", in_all]])
    print("energy is estimated from the processor's design power")
    if price_per_hour is None:
        print("no cost: give the price of an hour of this machine with --set train.price_per_hour=DOLLARS")


def duration(seconds: float) -> str:
    """For people, in the unit that fits."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return clock(seconds)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(without_controls("  ".join(map(str.ljust, row, widths)).rstrip()))


@contextmanager
def counting() -> Iterator[Callable[[str, int, int | None], None]]:
    """Progress of work that counts: called with what is being done, how much is done, and of how much if known.

    Bars on a terminal; elsewhere a line every few seconds, so that quick work says nothing. All of it on standard
    error: standard output holds results alone.
    """
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(work: str, done: int, total: int | None) -> None:
            if work not in tasks:
                tasks[work] = progress.add_task(work, total=total)
            progress.update(tasks[work], completed=done, total=total)

        yield report


def _lines() -> Callable[[str, int, int | None], None]:
    last = time.monotonic()

    def report(work: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            print(f"{work}: {done}{f' of {total}' if total else ''}", file=sys.stderr, flush=True)
            last = time.monotonic()

    return report
