"""Muon for hidden matrices beside AdamW for everything, at equal tokens and at equal training time.

    pip install 'benthic[quickstart,plots]'
    OMP_NUM_THREADS=1 python benchmarks/optimizers.py DIR [--steps 1000] [--seeds 3] [--tune-steps 250]

The quickstart's recipe with either. Rates are chosen first, each in short runs of another seed (--tune-steps): Muon's
rate for matrices, AdamW's for all. Then `muon` and `adamw` take --steps steps; `adamw, equal time` takes as many as fit
into Muon's time, a step of each having been timed in turn. Time is the processor time of training steps.

Runs are kept in DIR: called again, the script goes on where it stopped. It writes DIR/optimizers.json and
DIR/optimizers.svg. --set KEY=VALUE changes any setting of all runs.
"""

import json
from pathlib import Path

from benthic.files import write_atomically
from benthic.lab.compare import Outcome, Study, Variant, curve, draw_curves, study_parser, summary, told

ALL = ("train.checkpoint_every=250", "train.keep_checkpoints=1")
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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tune-steps", type=int, default=250)
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*ALL, *arguments.settings))
    muon, adamw = (tuned(study, variant, arguments.tune_steps) for variant in (MUON, ADAMW))
    seconds = study.step_seconds([muon, adamw])
    longer = round(arguments.steps * seconds["muon"] / seconds["adamw"])
    variants = [
        lasting(muon, arguments.steps),
        lasting(adamw, arguments.steps),
        lasting(adamw.but(name="adamw, equal time"), longer),
    ]
    outcomes: dict[str, list[Outcome]] = {variant.name: [] for variant in variants}
    for seed in range(arguments.seeds):
        for variant in variants:
            outcomes[variant.name].append(study.run(variant, seed))
    report(arguments.directory, {variant.name: variant.settings for variant in variants}, outcomes)


def lasting(variant: Variant, steps: int) -> Variant:
    return variant.but(f"train.steps={steps}", f"train.validate_every={max(1, steps // VALIDATIONS)}")


def tuned(study: Study, variant: Variant, steps: int) -> Variant:
    """The variant with the rate that ended a short run at the fewest bits per byte."""
    key, rates = RATES[variant]
    bits = {}
    for rate in rates:
        trial = variant.but(f"{key}={rate}", f"train.steps={steps}", f"train.validate_every={steps}")
        bits[rate] = study.run(trial._replace(name=f"tune-{variant.name}-{rate:g}"), TUNE_SEED).bits_per_byte
        print(f"{variant.name}, rate {rate:g}: {bits[rate]:.4f} bits per byte after {steps} steps")
    return variant.but(f"{key}={min(bits, key=lambda rate: bits[rate])}")


def report(directory: Path, settings: dict[str, tuple[str, ...]], outcomes: dict[str, list[Outcome]]) -> None:
    figures = {
        name: {
            "settings": settings[name],
            "bits_per_byte": summary([run.bits_per_byte for run in runs]),
            "processor_seconds": summary([run.seconds for run in runs]),
            "tokens": runs[0].steps("tokens")[-1],
            "curve": [point._asdict() for point in curve(runs)],
        }
        for name, runs in outcomes.items()
    }
    write_atomically(directory / "optimizers.json", json.dumps(figures, indent=1))
    curves = {name: curve(runs) for name, runs in outcomes.items()}
    draw_curves(directory / "optimizers.svg", curves, "Validation by optimizer", ["tokens", "seconds"])
    for name, runs in outcomes.items():
        bits, seconds = told([run.bits_per_byte for run in runs]), told([run.seconds for run in runs], 0)
        print(f"{name}: {bits} bits per byte after {figures[name]['tokens']} tokens, {seconds} s")


if __name__ == "__main__":
    main()
