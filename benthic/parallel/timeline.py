"""When each action of a pipeline schedule runs, if its durations are known; printed as text or drawn as SVG.

An action begins when its rank is free and what it needs has arrived; sending takes no time.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benthic.parallel.schedules import Action, Computation, Orders, parts
from benthic.parallel.stage_ranks import Schedule

_COLOURS = {"F": "#4e79a7", "B": "#f28e2b", "I": "#e9b44c", "W": "#59a14f"}
_MEANING = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}


class Times(NamedTuple):
    """Durations of a stage's passes over a micro-batch, in any unit."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    def of(self, action: Action) -> float:
        """How long an action takes that is not a pair."""
        return {
            Computation.FORWARD: self.forward,
            Computation.BACKWARD_INPUT: self.backward_input,
            Computation.BACKWARD_WEIGHT: self.backward_weight,
            Computation.FULL_BACKWARD: self.backward_input + self.backward_weight,
        }[action.computation_type]

    @property
    def backward(self) -> float:
        """The whole backward pass."""
        return self.backward_input + self.backward_weight


class Span(NamedTuple):
    """An action, not a pair, and when it ran."""

    action: Action
    start: float
    end: float


Timeline = dict[int, list[Span]]
"""By rank, what it ran in order."""


def simulate(orders: Orders, stages: int, times: Times) -> Timeline:
    """When actions run. Raises ValueError if the lists wait for one another without end."""
    done: dict[tuple[str, int, int | None], float] = {}
    lines: Timeline = {rank: [] for rank in orders}
    left = {rank: list(actions) for rank, actions in orders.items()}
    while any(left.values()):
        before = sum(map(len, left.values()))
        for rank, actions in left.items():
            while actions and all(need in done for need in _needs(actions[0], stages)):
                free = lines[rank][-1].end if lines[rank] else 0.0
                start = max([free, *(done[need] for need in _needs(actions[0], stages))])
                for part in parts(actions.pop(0)):
                    lines[rank].append(Span(part, start, start := start + times.of(part)))
                    done[_result(part)] = start
        if sum(map(len, left.values())) == before:
            waiting = ", ".join(f"rank {rank} before {actions[0]}" for rank, actions in left.items() if actions)
            raise ValueError(f"the schedule does not go on: {waiting}")
    return lines


def _result(action: Action) -> tuple[str, int, int | None]:
    kind = "I" if action.computation_type == Computation.FULL_BACKWARD else action.computation_type.value
    return kind, action.stage_index, action.microbatch_index


def _needs(action: Action, stages: int) -> list[tuple[str, int, int | None]]:
    """Results of other actions that an action, or both of a pair, cannot begin without."""
    needs = []
    for _, computation, micro_batch, stage in (
        (part, part.computation_type, part.microbatch_index, part.stage_index) for part in parts(action)
    ):
        if computation == Computation.FORWARD:
            needs += [("F", stage - 1, micro_batch)] if stage else []
        elif computation == Computation.BACKWARD_WEIGHT:
            needs.append(("I", stage, micro_batch))
        else:
            needs += [("F", stage, micro_batch)] + ([("I", stage + 1, micro_batch)] if stage < stages - 1 else [])
    return needs


def idle_share(timeline: Timeline) -> float:
    """Share of the ranks' time, from the first start to the last end, in which they run nothing."""
    return idle_share_between([[(span.start, span.end) for span in line] for line in timeline.values()])


def idle_share_between(busy: Sequence[Sequence[tuple[float, float]]]) -> float:
    """The same of each rank's busy times alone, from when to when."""
    times = [time for line in busy for time in line]
    length = max(end for _, end in times) - min(start for start, _ in times)
    return 1 - sum(end - start for start, end in times) / (length * len(busy))


def published_idle(schedule: Schedule, stages: int, times: Times) -> float | None:
    """Idle time of a rank in a step by the table of github.com/deepseek-ai/DualPipe; None if that has no line for it.

    Args:
        stages: of the pipeline, the table's PP; DualPipeV has them on half as many ranks, and a pair of passes that
            overlap takes as long here as both in turn.
    """
    forward, backward, weight = times.forward, times.backward, times.backward_weight
    if schedule == "1f1b":
        return (stages - 1) * (forward + backward)
    if schedule == "zb1p":
        return (stages - 1) * (forward + backward - 2 * weight)
    if schedule == "dualpipev":
        return (stages / 2 - 1) * (forward + backward + backward - 3 * weight)
    return None


def published_idle_share(schedule: Schedule, stages: int, ranks: int, micro_batches: int, times: Times) -> float | None:
    """What :func:`published_idle` makes of the length of a step."""
    idle = published_idle(schedule, stages, times)
    work = micro_batches * stages / ranks * (times.forward + times.backward)
    return None if idle is None else idle / (idle + work)


def text(timeline: Timeline, unit: float) -> str:
    """A line a rank, a column for each ``unit`` of time: ``3F7`` is micro-batch 7 forward through stage 3."""
    width = max(len(str(span.action)) for line in timeline.values() for span in line) + 1
    rows = []
    for rank, line in timeline.items():
        cells = [""] * round(max(span.end for span in line) / unit)
        for span in line:
            first, after = round(span.start / unit), round(span.end / unit)
            cells[first:after] = [str(span.action)] + ["-" * (width - 1)] * (after - first - 1)
        rows.append(f"rank {rank}: " + "".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(rows)


def svg(timeline: Timeline, title: str, width: int = 1200) -> str:
    """A picture with a row a rank; darker stages are later ones. A micro-batch's number is written where it fits."""
    row, head = 28, 56
    last = max(span.end for line in timeline.values() for span in line)
    stages = 1 + max(span.action.stage_index for line in timeline.values() for span in line)
    scale = (width - 80) / last
    shapes = [
        f'<text x="8" y="18" font-size="14">{title}: {idle_share(timeline):.1%} idle</text>',
        *_legend(),
    ]
    for number, (rank, line) in enumerate(timeline.items()):
        top = head + number * row
        shapes.append(f'<text x="8" y="{top + 17}">rank {rank}</text>')
        for span in line:
            left, length = 64 + span.start * scale, (span.end - span.start) * scale
            opacity = 1 - 0.5 * (1 - (span.action.stage_index + 1) / stages)
            shapes.append(
                f'<rect x="{left:.1f}" y="{top}" width="{length:.1f}" height="{row - 4}" stroke="white" '
                f'fill="{_COLOURS[span.action.computation_type.value]}" fill-opacity="{opacity:.2f}">'
                f"<title>{span.action}</title></rect>"
            )
            if length > 14:
                shapes.append(
                    f'<text x="{left + length / 2:.1f}" y="{top + 16}" text-anchor="middle" fill="white" '
                    f'pointer-events="none">{span.action.microbatch_index}</text>'
                )
    height = head + len(timeline) * row + 8
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _legend() -> list[str]:
    shapes = []
    for number, (letter, meaning) in enumerate(_MEANING.items()):
        left = 64 + 130 * number
        shapes += [
            f'<rect x="{left}" y="28" width="14" height="14" fill="{_COLOURS[letter]}"/>',
            f'<text x="{left + 20}" y="39">{meaning}</text>',
        ]
    return shapes
