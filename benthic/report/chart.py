"""Charts as SVG within HTML, drawn here so that a report needs no library and follows the reader's colours and width.

Lines are stretched to whatever space there is; labels are HTML beside them, so that they keep their size on a phone.
All that comes from outside, names for instance, is escaped by Markup's own formatting.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from benthic.report.words import clean, figure

SIDE = 1000
"""Units of a chart's width and height."""
LEAST_SHARE = 0.14
"""Of the width, for a stage however short it is."""
COLOURS = 8
"""Lines that can be told from each other."""
NARROW = 0.3
"""Share of the width from which on a segment has more than one label below it."""


class Segment(NamedTuple):
    """A stretch of the horizontal axis: a stage with its steps."""

    name: str
    first: float
    last: float


class Point(NamedTuple):
    """A value, and what is shaded around it."""

    x: float
    y: float
    low: float
    high: float


class Line(NamedTuple):
    """One curve, by the segments it goes through."""

    name: str
    points: Mapping[str, Sequence[Point]]


def line_chart(
    title: str, segments: Sequence[Segment], lines: Sequence[Line], *, unit: str, below: str = "step",
    logarithmic: bool = False, whole_bands: bool = False, mark: float | None = None,
) -> Markup:  # fmt: skip
    """Curves over one or more segments that stand side by side.

    Args:
        title: above the chart.
        segments: their names stand above them if there are several.
        lines: those with no point at all are left out; no more than :data:`COLOURS` are drawn, and this is told.
        unit: what the vertical axis counts.
        below: what the horizontal axis counts.
        logarithmic: a vertical axis of powers of ten, on which only values above 0 can stand.
        whole_bands: make room for all that is shaded; else for the curves alone.
        mark: where a vertical line stands, on the horizontal axis of a single segment.
    """
    shown = [_visible(line, logarithmic=logarithmic) for line in lines]
    shown = [line for line in shown if line.points]
    left_out, shown = len(shown) - COLOURS, shown[:COLOURS]
    if not shown:
        return Markup('<p class="absent">{}: nothing was recorded.</p>').format(clean(title))
    across = _Across(segments)
    points = [point for line in shown for part in line.points.values() for point in part]
    bounds = [(point.low, point.high) if whole_bands else (point.y, point.y) for point in points]
    up = _Up(min(low for low, _ in bounds), max(high for _, high in bounds), logarithmic=logarithmic)
    drawn = Markup("").join(_drawn(line, number, across, up) for number, line in enumerate(shown))
    grid = Markup("").join(Markup('<path class="grid" d="M0 {}h{}"/>').format(_n(up(y)), SIDE) for y in up.ticks)
    walls = [across.start(segment.name) for segment in segments[1:]]
    walls += [across(segments[0].name, mark)] if mark is not None else []
    grid += Markup("").join(Markup('<path class="wall" d="M{} 0v{}"/>').format(_n(x), SIDE) for x in walls)
    labels = Markup("").join(
        Markup('<span class="y" style="top:{}%">{}</span>').format(_n(up(y) / 10), up.told(y)) for y in up.ticks
    )
    labels += across.labels()
    legend = Markup("").join(_legend(line, number) for number, line in enumerate(shown))
    more = Markup('<li class="faint">{} more are not drawn</li>').format(left_out) if left_out > 0 else ""
    return Markup(
        '<figure class="chart"><figcaption>{title} <span class="faint">{unit}, by {below}</span></figcaption>'
        '<ul class="legend">{legend}{more}</ul><div class="plot{named}"><svg viewBox="0 0 {side} {side}" '
        'preserveAspectRatio="none" role="img" aria-label="{title}">{grid}{drawn}</svg>{labels}</div></figure>'
    ).format(
        title=clean(title), unit=clean(unit), below=below, legend=legend, more=more, side=SIDE, grid=grid,
        drawn=drawn, labels=labels, named=" named" if len(segments) > 1 else "",
    )  # fmt: skip


def heat_map(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], bounds: Sequence[float], levels: Sequence[str],
    *, below: str, ends: tuple[str, str],
) -> Markup:  # fmt: skip
    """Rows of coloured cells.

    Args:
        title: above it.
        rows: a name and the values of each; rows may be of different lengths, and NaN leaves a cell empty.
        bounds: rising, between the levels.
        levels: what each is called, one more than bounds; the legend leaves out those without a name.
        below: what the cells of a row are.
        ends: labels of the first and the last of them.
    """
    width, height = max(len(values) for _, values in rows), len(rows)
    cells: list[list[str]] = [[] for _ in levels]
    for y, (_, values) in enumerate(rows):
        for x, value in enumerate(values):
            if math.isnan(value):
                continue
            cells[sum(value >= bound for bound in bounds)].append(f"M{x} {y}h1v1h-1z")
    drawn = Markup("").join(
        Markup('<path class="heat h{}" d="{}"/>').format(level, "".join(paths))
        for level, paths in enumerate(cells)
        if paths
    )
    every = -(-height // 24)
    labels = Markup("").join(
        Markup('<span class="y" style="top:{}%">{}</span>').format(_n(100 * (y + 0.5) / height), clean(name))
        for y, (name, _) in enumerate(rows)
        if y % every == 0
    )
    labels += Markup('<span class="x first">{}</span><span class="x last">{}</span>').format(*map(clean, ends))
    legend = Markup("").join(
        Markup('<li><span class="cell h{}"></span>{}</li>').format(level, name)
        for level, name in enumerate(levels)
        if name
    )
    return Markup(
        '<figure class="chart"><figcaption>{title} <span class="faint">by {below}</span></figcaption>'
        '<ul class="legend">{legend}</ul><div class="plot map" style="height:{rem}rem">'
        '<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{title}">{drawn}</svg>'
        "{labels}</div></figure>"
    ).format(
        title=clean(title), below=clean(below), legend=legend, rem=_n(min(24.0, max(3.0, 1.3 * height))), width=width,
        height=height, drawn=drawn, labels=labels,
    )  # fmt: skip


def interval_mark(low: float, value: float, high: float, least: float, most: float) -> Markup:
    """A value's interval as a bar on a scale from ``least`` to ``most``."""
    span = (most - least) or 1.0
    left, middle, right = (100 * min(1.0, max(0.0, (x - least) / span)) for x in (low, value, high))
    return Markup(
        '<span class="mark" aria-hidden="true"><span class="bar" style="left:{}%;width:{}%"></span>'
        '<span class="dot" style="left:{}%"></span></span>'
    ).format(_n(left), _n(right - left), _n(middle))


class _Across:
    """The horizontal axis."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        total = sum(segment.last - segment.first for segment in segments) or 1.0
        widths = [max(LEAST_SHARE, (segment.last - segment.first) / total) for segment in segments]
        self._segments, self._starts, self._widths = segments, dict[str, float](), dict[str, float]()
        start = 0.0
        for segment, width in zip(segments, widths, strict=True):
            share = SIDE * width / sum(widths)
            self._starts[segment.name], self._widths[segment.name] = start, share
            start += share

    def start(self, name: str) -> float:
        return self._starts[name]

    def __call__(self, name: str, x: float) -> float:
        segment = next(one for one in self._segments if one.name == name)
        span = (segment.last - segment.first) or 1.0
        return self._starts[name] + self._widths[name] * (x - segment.first) / span

    def labels(self) -> Markup:
        found = Markup('<span class="x first">{}</span>').format(figure(self._segments[0].first))
        for segment in self._segments:
            width = self._widths[segment.name]
            if len(self._segments) > 1:
                found += Markup('<span class="stage" style="left:{}%;width:{}%">{}</span>').format(
                    _n(self._starts[segment.name] / 10), _n(width / 10), clean(segment.name)
                )
            if width > NARROW * SIDE:
                for x in _round_between(segment.first, segment.last, 3)[1:]:
                    at = self(segment.name, x)
                    # Not where it would stand beside the segment's end.
                    if self._starts[segment.name] + 0.1 * SIDE < at < self._starts[segment.name] + 0.72 * width:
                        found += Markup('<span class="x" style="left:{}%">{}</span>').format(_n(at / 10), figure(x))
            end = self(segment.name, segment.last)
            place = "last" if end > 0.99 * SIDE else "end"
            found += Markup('<span class="x {}" style="left:{}%">{}</span>').format(
                place, _n(end / 10), figure(segment.last)
            )
        return found


class _Up:
    """The vertical axis: from a value to units below the top."""

    def __init__(self, least: float, most: float, *, logarithmic: bool) -> None:
        self._logarithmic = logarithmic
        if logarithmic:
            bottom, top = math.floor(math.log10(least)), math.ceil(math.log10(most))
            self._bottom, self._top = float(bottom), float(max(top, bottom + 1))
            every = -(-(int(self._top) - bottom) // 6)
            self.ticks = [10.0**power for power in range(bottom, int(self._top) + 1, every)]
            self._decimals = 0
            return
        if least == most:
            pad = abs(least) / 10
            least, most = least - pad, most + (pad or 1.0)
        room = 0.04 * (most - least)
        # Nothing that cannot be negative is shown as if it could.
        self._bottom = max(0.0, least - room) if least >= 0 else least - room
        self._top = most + room
        self.ticks = _round_between(self._bottom, self._top, 4)
        # As many as tell one label from the next.
        apart = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        self._decimals = next((digits for digits in range(12) if round(apart, digits) == round(apart, 12)), 12)

    def __call__(self, value: float) -> float:
        y = math.log10(max(value, 1e-300)) if self._logarithmic else value
        return SIDE * (self._top - y) / (self._top - self._bottom)

    def told(self, value: float) -> str:
        if self._logarithmic:
            return f"{value:.0e}"
        return f"{value:,.{self._decimals}f}" if abs(value) < 1e6 else figure(value)


def _round_between(low: float, high: float, about: int) -> list[float]:
    """Some round numbers from ``low`` to ``high``."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if span / (power * times) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _visible(line: Line, *, logarithmic: bool) -> Line:
    parts = {
        name: [point for point in points if math.isfinite(point.y) and (point.y > 0 or not logarithmic)]
        for name, points in line.points.items()
    }
    return Line(line.name, {name: points for name, points in parts.items() if points})


def _drawn(line: Line, number: int, across: _Across, up: _Up) -> Markup:
    found = Markup("")
    for name, points in line.points.items():
        at = [_n(across(name, point.x)) for point in points]
        if any(point.low != point.high for point in points):
            there = [f"{x} {_n(up(point.high))}" for x, point in zip(at, points, strict=True)]
            back = [f"{x} {_n(up(point.low))}" for x, point in zip(at, points, strict=True)]
            found += Markup('<path class="band c{}" d="M{}z"/>').format(number, "L".join([*there, *back[::-1]]))
        path = "L".join(f"{x} {_n(up(point.y))}" for x, point in zip(at, points, strict=True))
        # A line of no length, with round ends, is a dot.
        found += Markup('<path class="line c{}{}" d="M{}{}"/>').format(
            number, " only" if len(points) == 1 else "", path, "h0" if len(points) == 1 else ""
        )
    return found


def _legend(line: Line, number: int) -> Markup:
    parts = [points for points in line.points.values() if points]
    first, last = parts[0][0].y, parts[-1][-1].y
    several = len(parts) > 1 or len(parts[0]) > 1
    told = f"{figure(first)} to {figure(last)}" if several else figure(last)
    return Markup('<li><span class="key c{}"></span>{} <span class="faint">{}</span></li>').format(
        number, clean(line.name), told
    )


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{min(max(value, -1e6), 1e6):.2f}".rstrip("0").rstrip(".")
