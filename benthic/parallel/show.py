"""A pipeline schedule to look at: its timeline as text, picture and numbers."""

import math
from typing import Any, NamedTuple

from benthic.errors import InputError
from benthic.parallel import timeline
from benthic.parallel.schedules import orders
from benthic.parallel.stage_ranks import KINDS, Schedule
from benthic.parallel.timeline import Times


class Shown(NamedTuple):
    """The same thing in three ways."""

    text: str
    svg: str
    figures: dict[str, Any]
    """``idle_share``, ``published_idle_share`` (null where there is no formula), and by rank the actions with times."""


def show(schedule: Schedule, ranks: int, micro_batches: int, durations: str) -> Shown:
    """A step of these micro-batches; ``durations`` as ``F,I,W``. Raises InputError if they are no three numbers."""
    times = _times(durations)
    stages = ranks * KINDS[schedule].stages_per_rank
    line = timeline.simulate(orders(schedule, ranks, micro_batches), stages, times)
    idle = timeline.idle_share(line)
    published = timeline.published_idle_share(schedule, stages, ranks, micro_batches, times)
    beside = "" if published is None else f", {published:.2%} published"
    title = f"{schedule}, {stages} stages on {ranks} processes, {micro_batches} micro-batches"
    rows = timeline.text(line, min(time for time in times if time))
    actions = {str(rank): [[str(span.action), span.start, span.end] for span in spans] for rank, spans in line.items()}
    figures = {"idle_share": idle, "published_idle_share": published, "actions": actions}
    return Shown(f"{title}: {idle:.2%} idle{beside}\n{rows}", timeline.svg(line, title), figures)


def _times(durations: str) -> Times:
    try:
        forward, backward_input, backward_weight = map(float, durations.split(","))
    except ValueError:
        raise InputError(f"--times {durations}: must be three numbers, such as 1,1,1") from None
    times = Times(forward, backward_input, backward_weight)
    if not all(math.isfinite(time) and time > 0 for time in times):
        raise InputError(f"--times {durations}: must be above 0")
    return times
