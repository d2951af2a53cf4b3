"""What FP8 costs in loss: the quickstart's model and data, trained in fp32 and in emulated FP8 from the same weights.

    pip install 'benthic[quickstart]'
    python benchmarks/fp8_loss.py DIR [--steps 1000] [--seeds 3] [KEY=VALUE ...]

Both precisions see the same batches in the same order. A difference is relative to fp32's loss; training losses are
first averaged over windows of 50 steps, whose noise would hide it. Runs are kept in DIR: called again after an
interruption, the script goes on where it stopped. At the default size, 4 x 128 tokens a step, 1000 steps over three
seeds take about an hour on two cores.
"""

import argparse
from pathlib import Path
from statistics import fmean

from benthic.config.load import load_run_config
from benthic.data.prepare import prepare
from benthic.train.loop import train
from benthic.train.metrics import read_metrics

WINDOW = 50
SETTINGS = (
    "train.batch_size=4",
    "train.sequence_length=128",
    "train.validate_every=1000000",
    "train.optimizer.name=adamw",
    "train.optimizer.learning_rate=1e-3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = (*SETTINGS, f"train.steps={arguments.steps}", *arguments.settings)
    results = [compare(arguments.directory, seed, settings) for seed in range(arguments.seeds)]
    for seed, (mean, last, validation) in enumerate(results):
        print(f"seed {seed}: training loss {mean:+.3%}, at the end {last:+.3%}; validation {validation:+.3%}")
    mean, last, validation = (fmean(column) for column in zip(*results, strict=True))
    print(f"mean:   training loss {mean:+.3%}, at the end {last:+.3%}; validation {validation:+.3%}")


def compare(directory: Path, seed: int, settings: tuple[str, ...]) -> tuple[float, float, float]:
    """FP8 relative to fp32: training loss over the whole run and in its last window, validation bits per byte."""
    (fp32, fp32_bits), (fp8, fp8_bits) = (
        losses(directory, (*settings, f"train.seed={seed}", f"precision.compute={compute}"), f"{compute}-{seed}")
        for compute in ("fp32", "fp8")
    )
    differences = [ours / exact - 1 for ours, exact in zip(windows(fp8), windows(fp32), strict=True)]
    return fmean(differences), differences[-1], fp8_bits / fp32_bits - 1


def losses(directory: Path, settings: tuple[str, ...], name: str) -> tuple[list[float], float]:
    """Loss of every step of one run, and bits per byte at its end."""
    config = load_run_config("quickstart", settings)
    out = directory / name
    out.mkdir(parents=True, exist_ok=True)
    if not (directory / "data" / "manifest.json").exists():
        prepare(config.data, config.model.vocab_size, directory)
    for part in ("data", "tokenizer"):
        if not (out / part).exists():
            (out / part).symlink_to((directory / part).resolve())
    bits_per_byte = train(config, out).bits_per_byte
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row], bits_per_byte


def windows(values: list[float]) -> list[float]:
    """Means of consecutive windows; a run shorter than one is one window."""
    return [fmean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]


if __name__ == "__main__":
    main()
