"""On which rank each stage of a pipeline lies, by schedule. Pure arithmetic, which needs no torch."""

from typing import Literal, NamedTuple

Schedule = Literal["1f1b", "zb1p", "interleaved", "zbv", "dualpipev"]


class Kind(NamedTuple):
    """How a schedule lays stages on ranks."""

    stages_per_rank: int
    v_shaped: bool = False
    """The second half of the stages runs back over the ranks: the first rank has the first stage and the last."""


KINDS: dict[Schedule, Kind] = {
    "1f1b": Kind(1),
    "zb1p": Kind(1),
    "interleaved": Kind(2),
    "zbv": Kind(2, v_shaped=True),
    "dualpipev": Kind(2, v_shaped=True),
}


def ranks_of_stages(schedule: Schedule, ranks: int) -> list[int]:
    """The rank of each stage."""
    kind = KINDS[schedule]
    stages = range(ranks * kind.stages_per_rank)
    return [2 * ranks - 1 - stage if kind.v_shaped and stage >= ranks else stage % ranks for stage in stages]


def stages_of_rank(schedule: Schedule, ranks: int, rank: int) -> list[int]:
    """The stages that a rank holds, in order."""
    return [stage for stage, holder in enumerate(ranks_of_stages(schedule, ranks)) if holder == rank]
