"""Pipeline schedules as data: what each rank computes, one action after another.

The lists come from torch.distributed.pipelining's schedules and are made of its actions, ``3F7`` for the forward pass
of micro-batch 7 through stage 3: F forward, B backward, or apart I for the gradient of the stage's input and W for
those of its weights. Nothing here communicates, so lists can be printed, timed and tested without processes.
"""

from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules as torch_schedules

from benthic.parallel.stage_ranks import KINDS, Schedule, stages_of_rank

Action = torch_schedules._Action
Computation = torch_schedules._ComputationType

Orders = dict[int, list[Action]]
"""By rank, its actions."""


def orders(schedule: Schedule, ranks: int, micro_batches: int) -> Orders:
    """What each rank computes in a step of so many micro-batches, of which any number will do.

    1F1B (arXiv 2006.09503), interleaved (arXiv 2104.04473), ZB1P and ZBV (arXiv 2401.10241), DualPipeV
    (github.com/deepseek-ai/DualPipe). Two of them do not take every number: with fewer micro-batches than stages,
    DualPipeV, whose stages lie as ZBV's do, is run as ZBV; with a number that does not divide into rounds,
    interleaved runs all forward passes first.
    """
    if schedule == "1f1b":
        return {rank: _one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)}
    if schedule == "dualpipev" and micro_batches < 2 * ranks:
        schedule = "zbv"
    class_of: dict[str, Any] = {
        "zb1p": torch_schedules.ScheduleInterleavedZeroBubble,
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "zbv": torch_schedules.ScheduleZBVZeroBubble,
        "dualpipev": torch_schedules.ScheduleDualPipeV,
    }
    found = class_of[schedule]
    if schedule in ("interleaved", "zb1p") and micro_batches % max(1, micro_batches // ranks):
        found = torch_schedules.ScheduleLoopedBFS
    stages_per_rank = KINDS[schedule].stages_per_rank
    # All that a schedule asks of its stages before it runs them.
    stage = SimpleNamespace(num_stages=ranks * stages_per_rank, group_size=ranks, group_rank=0, submod=None)
    made = found([stage] * stages_per_rank, micro_batches)
    return {rank: [action for action in actions if action] for rank, actions in made.pipeline_order.items()}


def forward_orders(schedule: Schedule, ranks: int, micro_batches: int) -> Orders:
    """Forward passes alone: each micro-batch goes through all of a rank's stages as early as it can."""
    held = {rank: stages_of_rank(schedule, ranks, rank) for rank in range(ranks)}
    return {
        rank: [
            Action(stage, Computation.FORWARD, micro_batch)
            for micro_batch, stage in sorted(
                ((m, s) for m in range(micro_batches) for s in stages), key=lambda place: (sum(place), place[1])
            )
        ]
        for rank, stages in held.items()
    }


def parts(action: Action) -> tuple[Action, ...]:
    """The forward and the backward pass of a pair that overlaps, or the action itself."""
    return action.sub_actions or (action,)


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Torch's own list begins the last rank with micro-batch 1, so its class runs 1F1B without one."""
    ahead = min(micro_batches, ranks - 1 - rank)
    forward, backward = (
        [Action(rank, computation, micro_batch) for micro_batch in range(micro_batches)]
        for computation in (Computation.FORWARD, Computation.FULL_BACKWARD)
    )
    alternating = [action for pair in zip(forward[ahead:], backward, strict=False) for action in pair]
    return forward[:ahead] + alternating + backward[micro_batches - ahead :]
