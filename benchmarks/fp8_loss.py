"""What FP8 costs in loss: the quickstart's model and data, trained in fp32 and in emulated FP8 from the same weights.

    pip install 'benthic[quickstart]'
    OMP_NUM_THREADS=1 python benchmarks/fp8_loss.py DIR [--steps 1000] [--seeds 3] [--set KEY=VALUE ...]

Both precisions see the same batches in the same order. A difference is relative to fp32's loss; training losses are
first averaged over windows of 50 steps, whose noise would hide it.

What differs from the quickstart is pinned below. AdamW is the published optimizer, in whose bf16 moments a part of
FP8's cost may lie; Muon would take over most weights. Its rate is the same on both sides and tuned for neither.
Emulated FP8 is slow, so a step has no more than 4 x 128 tokens, and nothing is validated before the end. --set goes
over all of it.

Runs are kept in DIR: called again after an interruption, the script goes on where it stopped. It writes DIR/fp8.json.
"""

from statistics import fmean
from typing import NamedTuple

from benthic.console import mistakes_in_one_line
from benthic.lab.compare import Outcome, Study, Variant, positive, study_parser
from benthic.lab.figures import figures, summary, windows

WINDOW = 50
SETTINGS = (
    "model.num_hidden_layers=4",
    "model.q_lora_rank=96",
    "model.kv_lora_rank=48",
    "train.embedding_std=0.02",
    "train.batch_size=4",
    "train.sequence_length=128",
    "train.validate_every=1000000",
    "train.optimizer.name=adamw",
    "train.optimizer.learning_rate=1e-3",
    "train.optimizer.embedding_learning_rate=1e-3",
    "precision.compute=fp32",
)
FP32, FP8 = Variant("fp32"), Variant("fp8", ("precision.compute=fp8",))


class Cost(NamedTuple):
    """FP8 relative to fp32, of one seed."""

    training: float
    """Of the training loss over the whole run."""
    at_the_end: float
    """Of the training loss in its last window."""
    validation: float
    """Of bits per byte."""

    def __str__(self) -> str:
        training, end, validation = (f"{part:+.3%}" for part in self)
        return f"training loss {training}, at the end {end}; validation {validation}"


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=1000)
    arguments = parser.parse_args()
    study = Study(arguments.directory, (*SETTINGS, f"train.steps={arguments.steps}", *arguments.settings))
    outcomes = study.compare([FP32, FP8], arguments.seeds)
    costs = [cost(*pair) for pair in zip(outcomes[FP8], outcomes[FP32], strict=True)]
    columns = dict(zip(Cost._fields, zip(*costs, strict=True), strict=True))
    study.write("fp8", {
        FP32: figures(outcomes[FP32]),
        FP8: {**figures(outcomes[FP8]), "over_fp32": {name: summary(column) for name, column in columns.items()}},
    })  # fmt: skip
    for seed, of_seed in enumerate(costs):
        print(f"seed {seed}: {of_seed}")
    print(f"mean:   {Cost(*map(fmean, columns.values()))}")


def cost(fp8: Outcome, fp32: Outcome) -> Cost:
    """Of two runs of the same steps."""
    losses = zip(windows(fp8.steps("loss"), WINDOW), windows(fp32.steps("loss"), WINDOW), strict=True)
    differences = [ours / exact - 1 for ours, exact in losses]
    return Cost(fmean(differences), differences[-1], fp8.bits_per_byte / fp32.bits_per_byte - 1)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
