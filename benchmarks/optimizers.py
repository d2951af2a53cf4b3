"""Muon for hidden matrices beside AdamW for everything, at equal tokens and at equal training time.

    pip install 'benthic[quickstart,plots]'
    OMP_NUM_THREADS=1 python benchmarks/optimizers.py DIR [--steps 1000] [--seeds 3] [--tune-steps 250]

The quickstart's recipe with either. Rates are chosen first, each in short runs of another seed (--tune-steps): Muon's
rate for matrices, AdamW's for all. Then `muon` and `adamw` take --steps steps; `adamw, equal time` takes as many as fit
into Muon's time, a step of each having been timed in turn. Time is the processor time of training steps.

Runs are kept in DIR: called again, the script goes on where it stopped. It writes DIR/optimizers.json and
DIR/optimizers.svg. --set KEY=VALUE changes any setting of all runs.
"""

from benthic.console import mistakes_in_one_line
from benthic.lab.compare import KEPT_SHORT, Study, Variant, positive, study_parser
from benthic.lab.figures import draw_curves, figures, told

VALIDATIONS = 12
TUNE_SEED = 100
MUON = Variant("muon", ("train.optimizer.name=muon",))
ADAMW = Variant("adamw", ("train.optimizer.name=adamw",))
RATES = {
    MUON: ("train.optimizer.matrix_learning_rate", (2.5e-3, 5e-3, 1e-2, 2e-2)),
    ADAMW: ("train.optimizer.learning_rate", (1e-3, 2e-3, 4e-3, 8e-3)),
}


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=1000)
    parser.add_argument("--tune-steps", type=positive, default=250)
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*KEPT_SHORT, *arguments.settings))
    muon, adamw = (tuned(study, variant, arguments.tune_steps) for variant in (MUON, ADAMW))
    seconds = study.step_seconds([muon, adamw])
    longer = max(1, round(arguments.steps * seconds["muon"] / seconds["adamw"]))
    report(study, [
        muon.lasting(arguments.steps, VALIDATIONS),
        adamw.lasting(arguments.steps, VALIDATIONS),
        adamw.but(name="adamw, equal time").lasting(longer, VALIDATIONS),
    ], arguments.seeds)  # fmt: skip


def tuned(study: Study, variant: Variant, steps: int) -> Variant:
    """The variant with the rate that ended a short run at the fewest bits per byte."""
    key, rates = RATES[variant]
    bits = {}
    for rate in rates:
        trial = variant.but(f"{key}={rate}", name=f"tune-{variant.name}-{rate:g}").lasting(steps)
        bits[rate] = study.run(trial, TUNE_SEED).bits_per_byte
        print(f"{variant.name}, rate {rate:g}: {bits[rate]:.4f} bits per byte after {steps} steps")
    return variant.but(f"{key}={min(bits, key=lambda rate: bits[rate])}")


def report(study: Study, variants: list[Variant], seeds: int) -> None:
    outcomes = study.compare(variants, seeds)
    sides = {variant: figures(runs) for variant, runs in outcomes.items()}
    study.write("optimizers", sides)
    draw_curves(study.directory / "optimizers.svg", outcomes, "Validation by optimizer", ["tokens", "seconds"])
    for variant, told_of in sides.items():
        bits, seconds = told(told_of["bits_per_byte"]["values"]), told(told_of["processor_seconds"]["values"], 0)
        print(f"{variant.name}: {bits} bits per byte after {told_of['tokens']} tokens, {seconds} s")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
