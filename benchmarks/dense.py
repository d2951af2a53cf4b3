"""The quickstart's recipe beside a dense multi-head transformer, at equal training time.

    pip install 'benthic[quickstart,plots]'
    OMP_NUM_THREADS=1 python benchmarks/dense.py DIR [--minutes 9 | --steps N] [--seeds 3] [--set KEY=VALUE ...]
    OMP_NUM_THREADS=1 python benchmarks/dense.py DIR --tune [--minutes 3]

Both are trained by the same trainer on the same data. A step of each is timed first, in turn, and each gets as many
steps as fit into the minutes (or as the recipe's --steps take), so that its schedule ends where its time does. Time is
the processor time of training steps. Runs are kept in DIR: called again after an interruption, the script goes on where
it stopped. It writes DIR/dense.json and DIR/dense.svg.

--tune, in a directory of its own, trains candidates for the baseline's sizes and rate instead, one seed of each, for as
many minutes of training each.
"""

import json
from pathlib import Path

from benthic.files import write_atomically
from benthic.lab.compare import Outcome, Study, Variant, curve, draw_curves, study_parser, summary, told
from benthic.lab.dense import Dense, DenseSizes

ALL = ("train.checkpoint_every=250", "train.keep_checkpoints=1")
VALIDATIONS = 16
RECIPE = Variant("recipe")
WIDTH, LAYERS, HIDDEN, RATE = 256, 5, 768, 5e-3
CANDIDATES = (
    (256, 5, 768, 5e-3), (256, 5, 768, 1e-2), (192, 5, 576, 5e-3),
    (256, 3, 768, 5e-3), (320, 4, 960, 5e-3), (384, 3, 1152, 5e-3),
)  # fmt: skip


def baseline(width: int, layers: int, hidden: int, rate: float, name: str = "") -> Variant:
    """The dense model with heads of 64, trained as the recipe is but for Muon's rate."""
    sizes = DenseSizes(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        head_dim=64,
        intermediate_size=hidden,
    )
    settings = ("model.num_nextn_predict_layers=0", f"train.optimizer.matrix_learning_rate={rate}")
    return Variant(name or f"dense-{width}x{layers}x{hidden}-{rate:g}", settings, Dense(sizes))


def main() -> None:
    parser = study_parser(__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=9.0)
    length.add_argument("--steps", type=int, help="of the recipe; the baseline gets as many as take the same time")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*ALL, *arguments.settings))
    variants = [RECIPE, baseline(WIDTH, LAYERS, HIDDEN, RATE, "dense")]
    if arguments.tune:
        variants = [RECIPE, *(baseline(*candidate) for candidate in CANDIDATES)]
    variants = at_equal_time(study, variants, arguments.minutes, arguments.steps)
    outcomes: dict[str, list[Outcome]] = {variant.name: [] for variant in variants}
    for seed in range(1 if arguments.tune else arguments.seeds):
        for variant in variants:
            outcomes[variant.name].append(study.run(variant, seed))
    report(arguments.directory, outcomes)


def at_equal_time(study: Study, variants: list[Variant], minutes: float, steps: int | None) -> list[Variant]:
    """Each variant with its number of steps."""
    seconds = study.step_seconds(variants)
    budget = 60 * minutes if steps is None else steps * seconds[RECIPE.name]
    return [timed(variant, budget / seconds[variant.name]) for variant in variants]


def timed(variant: Variant, steps: float) -> Variant:
    count = max(1, round(steps))
    return variant.but(f"train.steps={count}", f"train.validate_every={max(1, count // VALIDATIONS)}")


def report(directory: Path, outcomes: dict[str, list[Outcome]]) -> None:
    figures = {
        name: {
            "bits_per_byte": summary([run.bits_per_byte for run in runs]),
            "processor_seconds": summary([run.seconds for run in runs]),
            "wall_seconds": summary([sum(run.steps("seconds")) for run in runs]),
            "steps": len(runs[0].steps("loss")),
            "tokens": runs[0].steps("tokens")[-1],
            "curve": [point._asdict() for point in curve(runs)],
        }
        for name, runs in outcomes.items()
    }
    write_atomically(directory / "dense.json", json.dumps(figures, indent=1))
    curves = {name: curve(runs) for name, runs in outcomes.items()}
    draw_curves(directory / "dense.svg", curves, "Validation at equal training time", ["seconds"])
    for name, runs in outcomes.items():
        bits, seconds = (told(values, 4) for values in ([r.bits_per_byte for r in runs], [r.seconds for r in runs]))
        print(f"{name}: {bits} bits per byte after {seconds} s, {figures[name]['tokens']} tokens")


if __name__ == "__main__":
    main()
