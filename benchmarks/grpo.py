"""Learning from rewards with several seeds, from one fine-tuned model: how often it is right before and after.

    pip install 'benthic[quickstart,rl,plots]'
    benthic run quickstart --out runs/quickstart
    python benchmarks/grpo.py DIR --run runs/quickstart [--seeds 3] [--recipe quickstart] [--set KEY=VALUE ...]

Every seed begins with the weights that fine-tuning in the run ended with, whatever followed there, and draws answers of
its own to the same problems. Accuracy is that on problems of every source that are held out, of the likeliest answers
(greedy) and of answers at the stage's temperature (sampled), before and after by the same functions. Intervals are 95%
ones, of all problems of one seed. Besides: bits per byte of the answers that fine-tuning held out, and the share of
wall time that sampling took.

Runs are kept in DIR: called again, the script goes on where it stopped. It writes DIR/grpo.json and DIR/grpo.svg.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benthic import api
from benthic.config.load import load_posttrain_config, load_run_config
from benthic.config.stages import stages
from benthic.console import mistakes_in_one_line
from benthic.convert.huggingface import save_hf
from benthic.convert.resolve import find_tokenizer, load_checkpoint, model_config
from benthic.errors import InputError
from benthic.files import write_atomically
from benthic.lab.compare import study_parser
from benthic.lab.figures import new_figure, summary, told, windows
from benthic.train.checkpoint import latest
from benthic.train.metrics import read_metrics

KINDS = {"greedy": "accuracy", "sampled": "sampled_accuracy"}
WINDOW = 10
Row = dict[str, Any]


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run with a stage of fine-tuning")
    parser.add_argument("--recipe", default="quickstart", help="its [posttrain.rl] is used")
    given = parser.parse_args()
    start = fine_tuned(given.run, given.directory / "start")
    runs = [
        learnt(given.recipe, [*given.settings, f"posttrain.rl.seed={seed}"], start, given.directory / f"seed-{seed}")
        for seed in range(given.seeds)
    ]
    found = figures(runs)
    write_atomically(given.directory / "grpo.json", json.dumps(found, indent=1))
    draw(given.directory / "grpo.svg", runs)
    tell(found)


def fine_tuned(run: Path, out: Path) -> Path:
    """A directory with the model that fine-tuning in a run ended with, and with what it held out."""
    if (out / "model").exists():
        return out
    stage = next((stage for stage in stages(load_run_config(run / "config.toml")) if stage.kind == "sft"), None)
    newest = latest(run / "checkpoints" / "sft")
    if stage is None or newest is None:
        raise InputError(f"{run}: has not been fine-tuned; give a run with [posttrain.sft]")
    out.mkdir(parents=True, exist_ok=True)
    for part in ("sft", "data"):
        if (run / part).is_dir() and not (out / part).exists():
            (out / part).symlink_to((run / part).resolve())
    model, config = load_checkpoint(stage.config.model, newest)
    save_hf(model, config, find_tokenizer(run), out / "model")
    return out


def learnt(recipe: str, settings: list[str], start: Path, out: Path) -> list[Row]:
    """Metrics of a stage that begins with this model; it is run, or goes on, unless it has ended."""
    config = load_posttrain_config(recipe, settings, str(start), model_config(start), "rl")
    api.train(config, out)
    return read_metrics(out / "metrics.jsonl", "rl")


def figures(runs: list[list[Row]]) -> dict[str, Any]:
    """What is told of all seeds."""
    found: dict[str, Any] = {kind: accuracies(runs, key) for kind, key in KINDS.items()}
    bits = [[row["answer_bits_per_byte"] for row in rows if "answer_bits_per_byte" in row] for rows in runs]
    found["answer_bits_per_byte"] = {"before": [one[0] for one in bits], "after": [one[-1] for one in bits]}
    steps = [[row for row in rows if "rollout_seconds" in row] for rows in runs]
    found["rollout_share"] = [
        sum(row["rollout_seconds"] for row in rows) / sum(row["seconds"] for row in rows) for rows in steps
    ]
    found["reward"] = [[row["reward"] for row in rows] for rows in steps]
    return found


def accuracies(runs: list[list[Row]], key: str) -> dict[str, Any]:
    """Of each source, and of all: what is measured first and last with each seed, and the gain."""
    validated = [[row[key] for row in rows if key in row] for rows in runs]
    found = {}
    for source in validated[0][0]:
        before, after = ([rows[end][source] for rows in validated] for end in (0, -1))
        gains = [b["value"] - a["value"] for a, b in zip(before, after, strict=True)]
        lowest, highest = min(one["ci95"][0] for one in after), max(one["ci95"][1] for one in before)
        found[source] = {"before": before, "after": after, "gain": summary(gains), "apart": lowest > highest}
    return found


def tell(found: dict[str, Any]) -> None:
    """A table of accuracies, and the rest in a line."""
    for kind in KINDS:
        for source, sides in found[kind].items():
            before, after = ([side["value"] for side in sides[end]] for end in ("before", "after"))
            gain, apart = told(sides["gain"]["values"], 3), "apart" if sides["apart"] else "NOT apart"
            print(f"{kind:8}{source:20} {fmean(before):.3f} to {fmean(after):.3f}, gain {gain}, intervals {apart}")
    bits = found["answer_bits_per_byte"]
    cost = [after / before - 1 for before, after in zip(bits["before"], bits["after"], strict=True)]
    print(f"bits per byte of held-out answers: {max(cost):+.2%} at most")
    print(f"share of wall time that sampling took: {max(found['rollout_share']):.0%} at most")


def draw(path: Path, runs: list[list[Row]]) -> None:
    """Reward, a line for each seed, and accuracy on problems held out, the mean of seeds."""
    figure = new_figure(2)
    reward, accuracy = figure.axes
    for seed, rows in enumerate(runs):
        values = windows([row["reward"] for row in rows if "reward" in row], WINDOW)
        reward.plot([WINDOW * (index + 0.5) for index in range(len(values))], values, label=f"seed {seed}")
    for kind, key in KINDS.items():
        validations = [[row for row in rows if key in row] for rows in runs]
        for source in validations[0][0][key]:
            means = [fmean(row[key][source]["value"] for row in rows) for rows in zip(*validations, strict=True)]
            steps = [row["step"] for row in validations[0]]
            accuracy.plot(steps, means, label=f"{source}, {kind}", linestyle="-" if kind == "greedy" else ":")
    reward.set(xlabel="step", ylabel="mean reward", title="Problems to learn from")
    accuracy.set(xlabel="step", ylabel="accuracy", title="Problems held out")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
