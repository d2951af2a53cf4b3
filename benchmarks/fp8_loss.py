"""What FP8 costs in loss: the quickstart's model and data, trained in fp32 and in emulated FP8 from the same weights.

    pip install 'benthic[quickstart]'
    python benchmarks/fp8_loss.py DIR [--steps 1000] [--seeds 3] [--set KEY=VALUE ...]

Both precisions see the same batches in the same order. A difference is relative to fp32's loss; training losses are
first averaged over windows of 50 steps, whose noise would hide it. Runs are kept in DIR: called again after an
interruption, the script goes on where it stopped. At the default size, 4 x 128 tokens a step, 1000 steps over three
seeds take about an hour on two cores.
"""

from statistics import fmean

from benthic.lab.compare import Study, Variant, study_parser, windows

WINDOW = 50
SETTINGS = (
    "train.batch_size=4",
    "train.sequence_length=128",
    "train.validate_every=1000000",
    "train.optimizer.name=adamw",
    "train.optimizer.learning_rate=1e-3",
    "precision.compute=fp32",
)
FP32, FP8 = Variant("fp32"), Variant("fp8", ("precision.compute=fp8",))


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*SETTINGS, f"train.steps={arguments.steps}", *arguments.settings))
    results = [compare(study, seed) for seed in range(arguments.seeds)]
    for seed, (mean, last, validation) in enumerate(results):
        print(f"seed {seed}: training loss {mean:+.3%}, at the end {last:+.3%}; validation {validation:+.3%}")
    mean, last, validation = (fmean(column) for column in zip(*results, strict=True))
    print(f"mean:   training loss {mean:+.3%}, at the end {last:+.3%}; validation {validation:+.3%}")


def compare(study: Study, seed: int) -> tuple[float, float, float]:
    """FP8 relative to fp32: training loss over the whole run and in its last window, validation bits per byte."""
    fp32, fp8 = study.run(FP32, seed), study.run(FP8, seed)
    losses = zip(windows(fp8.steps("loss"), WINDOW), windows(fp32.steps("loss"), WINDOW), strict=True)
    differences = [ours / exact - 1 for ours, exact in losses]
    return fmean(differences), differences[-1], fp8.bits_per_byte / fp32.bits_per_byte - 1


if __name__ == "__main__":
    main()
