"""What a run does about a step in trouble, as a row for metrics.jsonl, and how often it does so before it gives up."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benthic.errors import WorkFailed
from benthic.files import read_json_object
from benthic.parallel.local import local
from benthic.train.checkpoint import committed, discard
from benthic.train.health import Health
from benthic.train.step import StepReport

MOST_SKIPPED = 3
"""Updates in a row."""
MOST_ROLL_BACKS = 3
"""To the same step."""


class Diverged(WorkFailed):
    """Steps in trouble did not end: several updates in a row were not taken, or several roll-backs of no use."""


def action(report: StepReport, health: Health) -> str:
    """What is done about a step with an incident."""
    assert report.incident is not None
    if report.updated:
        return "update kept" if report.incident.again else "update run again"
    spike = report.incident.again is not None and report.incident.again.finite
    return "rolled back" if spike and health.on_spike == "roll_back" else "update skipped"


def incident_row(report: StepReport, health: Health, step: int, sequences: range) -> dict[str, Any]:
    """The event, with loss and gradient norm as they were first and again."""
    incident = report.incident
    assert incident is not None
    return {
        "step": step,
        "event": action(report, health),
        "reason": incident.again or incident.trouble,
        "kind": incident.kind,
        "sequences": [sequences[0], sequences[-1]],
        "losses": [incident.loss, report.cross_entropy[0]],
        "grad_norms": [incident.grad_norm, report.grad_norm],
    }


def describe_incident(row: dict[str, Any]) -> str:
    """An incident's row as a line for people."""
    first, last = row["sequences"]
    return f"step {row['step']}: {row['reason']} ({row['kind']}) in sequences {first} to {last}, {row['event']}"


def give_up_on_skipping(row: dict[str, Any], skipped: int) -> None:
    """Raise Diverged if too many updates in a row were not taken."""
    if skipped >= MOST_SKIPPED:
        first, last = row["sequences"]
        raise Diverged(
            f"step {row['step']}: {row['reason']} {skipped} times in a row, last in sequences {first} to {last}; "
            f"try a lower learning rate"
        )


def refuse_weights_not_finite(step: int, bits_per_byte: float) -> None:
    """Raise Diverged if a validation gave no number: no step would mend the weights, and none should be saved."""
    if not math.isfinite(bits_per_byte):
        raise Diverged(f"step {step}: the validation is not finite, so the weights are damaged; nothing of it is saved")


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are: losses and gradients of a step tell of those before it only."""
    held = [part for weight in model.parameters() if (part := local(weight.detach())).numel()]  # of some, nothing
    return not held or all(math.isfinite(float(one)) for one in torch._foreach_norm(held, math.inf))


def roll_back_target(root: Path) -> Path | None:
    """The last checkpoint made on schedule, or none; those made since, by a signal, are deleted.

    A signal must not change the course of a run, so where it has saved is no place to go back to.
    """
    found = committed(root)
    while found and not read_json_object(found[-1] / "state.json").get("on_schedule"):
        discard(found.pop())
    return found[-1] if found else None


def roll_back_rows(row: dict[str, Any], metrics: list[dict[str, Any]], target_step: int) -> list[dict[str, Any]]:
    """Rows of all roll-backs to a step, to go into the metrics after its own.

    Args:
        row: the incident that leads back.
        metrics: all rows so far, those of earlier roll-backs to this step among them.
        target_step: the step gone back to.

    Raises:
        Diverged: this is the fourth roll-back to that step.
    """
    step = target_step + 1
    earlier = [old for old in metrics if old["step"] == step and old.get("event") == row["event"]]
    if len(earlier) == MOST_ROLL_BACKS:
        raise Diverged(
            f"step {row['step']}: {row['reason']} after {MOST_ROLL_BACKS} roll-backs to step {target_step}; "
            f"try a lower learning rate"
        )
    return [*earlier, {**row, "step": step, "rolled_back_from": row["step"]}]
