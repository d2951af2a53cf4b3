"""Experts balanced by the routers' bias, as published, beside an auxiliary loss: how even the load, at what loss.

    pip install 'benthic[quickstart,plots]'
    OMP_NUM_THREADS=1 python benchmarks/balance.py DIR [--steps 1000] [--seeds 3] [--losses batch-loss sequence-loss]

Variants of the quickstart's recipe over the same data: `bias` is the recipe as it is; `batch-loss` has no bias but an
auxiliary loss over each batch, the classical one, and `sequence-loss` one within each sequence. The weight of a loss is
chosen first, in short runs of another seed (--tune-steps): the one with the fewest bits per byte among those that
balance as well as the bias does there (5% more load allowed), or else the one that balances best.

Load is the tokens of a layer's busiest expert over the mean of its experts, in each step. Once a layer has trained for
a tenth of the run's steps, its warm-up, the figure is the highest, over layers and windows of 50 steps, of a window's
mean. (The load summed over a window is never less even than that.) The MTP module's layer begins late in the run, with
a router and a bias as they were made; `worst_with_late_warm_up` is the same figure with that layer's first steps in it.
Besides: the mean over steps and layers, and the 99th percentile of single steps.

Runs are kept in DIR: called again, the script goes on where it stopped. It writes DIR/balance.json and DIR/balance.svg.
--set KEY=VALUE changes any setting of all runs.
"""

from pathlib import Path
from statistics import fmean, quantiles
from typing import TypeVar

from benthic.console import mistakes_in_one_line
from benthic.lab.batch_balance import BatchBalance
from benthic.lab.compare import KEPT_SHORT, Outcome, Study, Variant, positive, study_parser
from benthic.lab.figures import figures, new_figure, summary, told, windows

WARM_UP, WINDOW = 0.1, 50
BAR = 1.5
WEIGHTS = (1e-3, 3e-3, 1e-2, 3e-2)
TUNE_SEED = 100
MTP_IN_EACH = "train.schedule.mtp_every=1"
"""Else the MTP layer would end with its warm-up."""
NO_BIAS = "train.schedule.bias_update_speed=0"
BIAS = Variant("bias")
LOSSES = {
    "batch-loss": Variant("batch-loss", (NO_BIAS,), BatchBalance()),
    "sequence-loss": Variant("sequence-loss", (NO_BIAS,)),
}

_Trial = TypeVar("_Trial")


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--tune-steps", type=positive, default=250)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["batch-loss"])
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*KEPT_SHORT, MTP_IN_EACH, *arguments.settings))
    variants = [BIAS, *(tuned(study, LOSSES[name], arguments.tune_steps) for name in arguments.losses)]
    report(study, [variant.lasting(arguments.steps) for variant in variants], arguments.seeds)


def tuned(study: Study, loss: Variant, steps: int) -> Variant:
    """The variant with the weight that short runs speak for."""

    def trial(variant: Variant, name: str) -> Outcome:
        return study.run(variant.but(name=f"tune-{name}").lasting(steps), TUNE_SEED)

    aim = 1.05 * load(trial(BIAS, BIAS.name))["mean"]
    trials: dict[Variant, tuple[float, float]] = {}
    for weight in WEIGHTS:
        weighed = loss.but(f"train.schedule.balance_loss_weight={weight}")
        outcome = trial(weighed, f"{loss.name}-{weight:g}")
        trials[weighed] = load(outcome)["mean"], outcome.bits_per_byte
        found, bits = trials[weighed]
        print(f"{loss.name}, weight {weight:g}: load {found:.3f} (aim {aim:.3f}), {bits:.4f} bits per byte")
    return chosen(trials, aim)


def chosen(trials: dict[_Trial, tuple[float, float]], aim: float) -> _Trial:
    """By (load, bits per byte): of those with at most this load the one with the fewest bits, or the evenest of all."""
    even = {key: bits for key, (found, bits) in trials.items() if found <= aim}
    if even:
        return min(even, key=lambda key: even[key])
    return min(trials, key=lambda key: trials[key][0])


def load(outcome: Outcome) -> dict[str, float]:
    """Load of the busiest expert over the mean, after warm-up."""
    loads = outcome.steps("expert_load_max_over_mean")
    warm_up = round(WARM_UP * len(loads))
    layers = [layer[warm_up:] for layer in by_layer(loads)]
    steps = [step for layer in layers for step in layer]
    return {
        "worst_window": worst_window(layers),
        "worst_with_late_warm_up": worst_window(by_layer(loads[warm_up:])),
        "mean": fmean(steps),
        "percentile_99": quantiles(steps, n=100)[98],
    }


def worst_window(layers: list[list[float]]) -> float:
    """The highest mean of a window in any layer that is past its warm-up."""
    return max(max(windows(layer, WINDOW)) for layer in layers if layer)


def by_layer(loads: list[list[float]]) -> list[list[float]]:
    """Each layer's loads over the steps in which it ran; the last layers may not run in all."""
    return [[step[index] for step in loads if index < len(step)] for index in range(max(map(len, loads)))]


def report(study: Study, variants: list[Variant], seeds: int) -> None:
    outcomes = study.compare(variants, seeds)
    loads = {variant: [load(run) for run in runs] for variant, runs in outcomes.items()}
    study.write("balance", {
        variant: {
            **figures(outcomes[variant]),
            **{key: summary([run[key] for run in loads[variant]]) for key in loads[variant][0]},
        }
        for variant in variants
    })  # fmt: skip
    draw(study.directory / "balance.svg", outcomes)
    for variant, runs in outcomes.items():
        worst, mean = ([run[key] for run in loads[variant]] for key in ("worst_window", "mean"))
        verdict = "within" if max(worst) <= BAR else "ABOVE"
        print(
            f"{variant.name}: load in the worst window {told(worst, 3)} ({verdict} {BAR}), on average {told(mean, 3)}; "
            f"{told([run.bits_per_byte for run in runs])} bits per byte"
        )


def draw(path: Path, outcomes: dict[Variant, list[Outcome]]) -> None:
    """Load over the run, mean over layers and seeds, and its worst layer and seed."""
    figure = new_figure(1)
    (axes,) = figure.axes
    for variant, runs in outcomes.items():
        loads = [run.steps("expert_load_max_over_mean") for run in runs]
        everywhere = min(len(step) for steps in loads for step in steps)
        layers = [windows(layer, WINDOW) for steps in loads for layer in by_layer(steps)[:everywhere]]
        x = [WINDOW * (index + 0.5) for index in range(len(layers[0]))]
        (line,) = axes.plot(x, [fmean(column) for column in zip(*layers, strict=True)], label=variant.name)
        axes.plot(x, [max(column) for column in zip(*layers, strict=True)], color=line.get_color(), linestyle=":")
    axes.axhline(BAR, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="busiest expert over the mean", title="Mean and (dotted) worst of layers and seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
