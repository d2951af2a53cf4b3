"""What is made of runs side by side: means and spreads, curves, a JSON file and drawings.

Of a study's directory, ``NAME.json`` has an entry for each side, and ``NAME.svg`` the drawing, where there is one.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benthic.errors import MissingExtra
from benthic.lab.compare import Outcome, Variant


class Point(NamedTuple):
    """A validation of one run, or the mean of those of several at the same step."""

    tokens: float
    seconds: float
    """Of processor time that training had taken."""
    bits_per_byte: float
    least: float
    most: float
    """Of the runs."""


def figures(runs: Sequence[Outcome]) -> dict[str, Any]:
    """What every study tells of one side, as JSON has it; ``runs`` differ by their seed."""
    return {
        "bits_per_byte": summary([run.bits_per_byte for run in runs]),
        "processor_seconds": summary([run.seconds for run in runs]),
        "wall_seconds": summary([sum(run.steps("seconds")) for run in runs]),
        "steps": len(runs[0].steps("loss")),
        "tokens": runs[0].steps("tokens")[-1],
        "curve": [point._asdict() for point in curve(runs)],
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (none of one value) and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def told(values: Sequence[float], digits: int = 4) -> str:
    """Mean and deviation in a line for people."""
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def windows(values: Sequence[float], length: int) -> list[float]:
    """Means of consecutive windows. What is left over at the end is left out; values fewer than one are one window."""
    length = min(length, len(values))
    return [statistics.fmean(values[end - length : end]) for end in range(length, len(values) + 1, length)]


def curve(outcomes: Sequence[Outcome]) -> list[Point]:
    """Mean validation curve of runs of the same length that differ by their seed."""
    points = []
    for validations in zip(*(_validations(outcome) for outcome in outcomes), strict=True):
        tokens, seconds, bits = (list(column) for column in zip(*validations, strict=True))
        mean = [statistics.fmean(column) for column in (tokens, seconds, bits)]
        points.append(Point(mean[0], mean[1], mean[2], min(bits), max(bits)))
    return points


def _validations(outcome: Outcome) -> list[tuple[float, float, float]]:
    """Tokens, seconds and bits per byte at each validation."""
    tokens, seconds = 0, 0.0
    found: list[tuple[float, float, float]] = []
    for row in outcome.rows:
        if "loss" in row:
            tokens, seconds = row["tokens"], seconds + row["processor_seconds"]
        elif "validation_bits_per_byte" in row:
            found.append((tokens, seconds, row["validation_bits_per_byte"]))
    return found


def draw_curves(path: Path, outcomes: Mapping[Variant, Sequence[Outcome]], title: str, against: Sequence[str]) -> None:
    """An SVG with validation curves, means as lines and all seeds' span as bands, against ``seconds`` or ``tokens``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = new_figure(len(against))
    figure.suptitle(title)
    curves = {variant.name: curve(runs) for variant, runs in outcomes.items()}
    labels = {"seconds": "processor seconds of training", "tokens": "tokens read"}
    for axes, key in zip(figure.axes, against, strict=True):
        for name, points in curves.items():
            x = [getattr(point, key) for point in points]
            (line,) = axes.plot(x, [point.bits_per_byte for point in points], label=name)
            span = [point.least for point in points], [point.most for point in points]
            axes.fill_between(x, *span, alpha=0.2, color=line.get_color())
        axes.set(xlabel=labels[key], ylabel="validation bits per byte")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


def new_figure(panels: int) -> Any:
    """A matplotlib figure with so many axes side by side.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "plots") from error
    mpl.rcParams.update({"svg.hashsalt": "benthic", "svg.fonttype": "none"})
    figure = Figure(figsize=(6 * panels, 4.5), layout="constrained")
    figure.subplots(1, panels)
    return figure
