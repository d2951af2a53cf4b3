"""Peak memory of a training step beside Hugging Face transformers: the same sizes, batch and optimizer.

    pip install 'benthic[peers]'
    python benchmarks/memory_vs_transformers.py [RECIPE] [KEY=VALUE ...]

Each takes two steps in a process of its own, by default the recipe ``bench``: bench-108m, 8 sequences of 512 in fp32
with AdamW; ``precision.compute=bf16`` puts all in bf16. Peak memory is the most that the system ever held resident for
the process, interpreter and libraries included; beside it, how much of that came on top of what was resident before
the model was built.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from steps import config_of, recipe_parser, training_step
from transformers_peer import WITHOUT_MTP, peer_step, refuse_what_it_lacks

from benthic.config.schema import RunConfig
from benthic.console import mistakes_in_one_line
from benthic.train.memory import settle_memory

STEPS = 2
VARIANTS = {
    "transformers": [],
    "benthic": [],
    "recomputing": ["train.recompute=true"],
}


def run_one(name: str, config: RunConfig) -> None:
    """Train in this process and print its peak in bytes, what it was before, and the last step's seconds."""
    if name != "transformers":
        settle_memory()  # as training does
    before = peak_bytes()
    step = peer_step(config) if name == "transformers" else training_step(config)
    seconds = 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    print(peak_bytes(), before, seconds)


def peak_bytes() -> int:
    """The most this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(recipe: str, overrides: list[str]) -> None:
    """Prints the peak of each, and its share of transformers'."""
    peaks: dict[str, int] = {}
    for name, extra in VARIANTS.items():
        command = [sys.executable, str(Path(__file__)), "--only", name, recipe, *overrides, *extra]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this script
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        peak, before, seconds = done.stdout.splitlines()[-1].split()
        peaks[name] = int(peak)
        own = (int(peak) - int(before)) / 2**20
        share = int(peak) / peaks["transformers"]
        print(
            f"{name:12}  {int(peak) / 2**20:8,.0f} MiB, {own:8,.0f} of it the model's and the step's  "
            f"{share:5.2f} of transformers'  {float(seconds):6.2f} s a step"
        )


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = config_of(given, WITHOUT_MTP)
    refuse_what_it_lacks(config)
    if given.only:
        run_one(given.only, config)
    else:
        compare(given.recipe, given.overrides)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
