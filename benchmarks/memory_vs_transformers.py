"""Peak memory of a training step beside Hugging Face transformers: the same sizes, batch and optimizer.

    pip install 'benthic[peers]'
    python benchmarks/memory_vs_transformers.py [RECIPE] [KEY=VALUE ...]

Each takes two steps in a process of its own, by default the recipe ``bench``: bench-108m, 8 sequences of 512 in
fp32 with AdamW. Peak memory is the most that the system ever held resident for the process, interpreter and libraries
included; beside it, how much of that came on top of what was resident before the model was built.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.train.memory import settle_memory

STEPS = 2
VARIANTS = {
    "transformers": [],
    "benthic": [],
    "recomputing": ["train.recompute=true"],
}


def run_one(name: str, config: RunConfig) -> None:
    """Train in this process and print its peak in bytes, what it was before, and the last step's seconds."""
    if name == "transformers":
        from train_vs_transformers import theirs as make_step
    else:
        from steps import training_step as make_step

        settle_memory()  # as training does
    before = peak_bytes()
    step = make_step(config)
    seconds = 0.0
    for _ in range(STEPS):
        tokens_BS = torch.randint(config.model.vocab_size, (config.train.batch_size, config.train.sequence_length + 1))
        start = time.perf_counter()
        step(tokens_BS)
        seconds = time.perf_counter() - start
    print(peak_bytes(), before, seconds)


def peak_bytes() -> int:
    """The most this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Prints the peak of each, and its share of transformers'."""
    recipe, *overrides = sys.argv[1:] or ["bench"]
    overrides.append("model.num_nextn_predict_layers=0")  # the peer has no MTP
    peaks: dict[str, int] = {}
    for name, extra in VARIANTS.items():
        command = [sys.executable, str(Path(__file__)), "--only", name, recipe, *overrides, *extra]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - this script
        peak, before, seconds = answer.splitlines()[-1].split()
        peaks[name] = int(peak)
        own = (int(peak) - int(before)) / 2**20
        share = int(peak) / peaks["transformers"]
        print(
            f"{name:12}  {int(peak) / 2**20:8,.0f} MiB, {own:8,.0f} of it the model's and the step's  "
            f"{share:5.2f} of transformers'  {float(seconds):6.2f} s a step"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        run_one(sys.argv[2], load_run_config(sys.argv[3], sys.argv[4:]))
    else:
        main()
