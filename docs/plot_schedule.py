"""Draws the course of a recipe over its tokens: learning rate, sequences, bias speed and MTP weight, stage after stage.

python docs/plot_schedule.py v3-671b docs/schedule.svg
"""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.config.stages import Stage, stages
from benthic.train.schedule import Course

POINTS = 1000


def curves(config: RunConfig) -> dict[str, list[float]]:
    """Trillions of tokens read, and what is in force then, at evenly spaced steps of every stage."""
    lines: dict[str, list[float]] = {}
    read = 0
    for stage in stages(config):
        points, tokens = _curves_of_stage(stage, read)
        read += tokens
        for name, values in points.items():
            lines.setdefault(name, []).extend(values)
    # The last step ends where nothing follows it.
    for name, values in lines.items():
        values.append(read / 1e12 if name == "trillion tokens" else values[-1])
    return lines


def _curves_of_stage(stage: Stage, read: int) -> tuple[dict[str, list[float]], int]:
    """A stage's part of the curves, ``read`` tokens into the run, and its tokens."""
    train = stage.config.train
    assert train.steps is not None
    course = Course(train.schedule, train.steps, train.batch_size, train.micro_batch_size or 1)
    steps = [course.at(number * (train.steps - 1) // (POINTS - 1)) for number in range(POINTS)]
    length = train.sequence_length
    points = {
        "trillion tokens": [(read + step.first_sequence * length) / 1e12 for step in steps],
        "learning rate": [train.optimizer.learning_rate * step.learning_rate_factor for step in steps],
        "tokens in a sequence": [float(length)] * POINTS,
        "sequences in a batch": [float(step.batch_size) for step in steps],
        "bias update speed": [step.bias_speed for step in steps],
        "weight of the MTP loss": [step.mtp_weight for step in steps],
    }
    return points, course.sequences * length


def draw(config: RunConfig, title: str) -> Figure:
    """A panel for each curve, above one axis of tokens."""
    lines = curves(config)
    tokens = lines.pop("trillion tokens")
    figure = Figure(figsize=(8, 9), layout="constrained")
    figure.suptitle(title)
    for axes, (name, values) in zip(figure.subplots(len(lines), sharex=True), lines.items(), strict=True):
        axes.plot(tokens, values, drawstyle="steps-post")
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel("trillion tokens read")
    return figure


def main(recipe: str, out: str) -> None:
    """Write the drawing as SVG, the same file every time."""
    mpl.rcParams.update({"svg.hashsalt": "benthic", "svg.fonttype": "none"})
    draw(load_run_config(recipe), f"The course of {Path(recipe).stem}").savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
