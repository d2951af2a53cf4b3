"""The quickstart's recipe beside a dense multi-head transformer, at equal training time.

    pip install 'benthic[quickstart,plots]'
    OMP_NUM_THREADS=1 python benchmarks/dense.py DIR [--minutes 9 | --steps N] [--seeds 3] [--set KEY=VALUE ...]
    OMP_NUM_THREADS=1 python benchmarks/dense.py DIR --tune [--minutes 9 | --steps N]

Both are trained by the same trainer on the same data. A step of each is timed first, in turn, and each gets as many
steps as fit into the minutes (or as the recipe's --steps take), so that its schedule ends where its time does. Time is
the processor time of training steps. Runs are kept in DIR: called again after an interruption, the script goes on where
it stopped. It writes DIR/dense.json and DIR/dense.svg.

--tune, in a directory of its own, trains the recipe and candidates for the baseline's sizes and rate instead, one seed
of each, each for as much time.
"""

import argparse

from benthic.console import mistakes_in_one_line
from benthic.lab.compare import KEPT_SHORT, Study, Variant, positive, study_parser
from benthic.lab.dense import Dense, DenseSizes
from benthic.lab.figures import draw_curves, figures, told

VALIDATIONS = 16
RECIPE = Variant("recipe")
BASELINE = (192, 2, 576, 5e-3)
"""Width, layers, width of the feed-forward and Muon's rate, as :data:`CANDIDATES` are."""
CANDIDATES = (
    (192, 2, 576, 5e-3), (192, 3, 576, 5e-3), (192, 3, 576, 1e-2), (192, 5, 576, 5e-3),
    (256, 3, 768, 5e-3), (256, 5, 768, 5e-3), (384, 3, 1152, 5e-3),
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
    length.add_argument("--minutes", type=minutes, default=9.0, help="of training, for each run; by default 9")
    length.add_argument("--steps", type=positive, help="of the recipe; others get as many as take the same time")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*KEPT_SHORT, *arguments.settings))
    variants = [RECIPE, baseline(*BASELINE, "dense")]
    if arguments.tune:
        variants = [RECIPE, *(baseline(*candidate) for candidate in CANDIDATES)]
    variants = at_equal_time(study, variants, arguments.minutes, arguments.steps)
    report(study, variants, seeds=1 if arguments.tune else arguments.seeds)


def minutes(text: str) -> float:
    """An option's minutes."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return value


def at_equal_time(study: Study, variants: list[Variant], minutes: float, steps: int | None) -> list[Variant]:
    """Each variant with its number of steps."""
    seconds = study.step_seconds(variants)
    budget = 60 * minutes if steps is None else steps * seconds[RECIPE.name]
    return [variant.lasting(max(1, round(budget / seconds[variant.name])), VALIDATIONS) for variant in variants]


def report(study: Study, variants: list[Variant], seeds: int) -> None:
    outcomes = study.compare(variants, seeds)
    sides = {variant: figures(runs) for variant, runs in outcomes.items()}
    study.write("dense", sides)
    draw_curves(study.directory / "dense.svg", outcomes, "Validation at equal training time", ["seconds"])
    for variant, told_of in sides.items():
        bits, seconds = (told(told_of[key]["values"]) for key in ("bits_per_byte", "processor_seconds"))
        print(f"{variant.name}: {bits} bits per byte after {seconds} s, {told_of['tokens']} tokens")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
