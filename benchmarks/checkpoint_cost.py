"""What a checkpoint written in the background costs training: windows of steps with and without one, in turns.

    python benchmarks/checkpoint_cost.py [RECIPE] [KEY=VALUE ...]

By default the recipe ``quickstart``, its sizes and batch, on random tokens. A window with a checkpoint begins with one
and is long enough for it to be on disk, hashed, before the window ends. What such a window takes longer is the cost of
one checkpoint, the wait for the copy and the work beside the steps together; shares are of so many steps' time.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.precision.compute import Compute
from benthic.train.background import BackgroundWriter
from benthic.train.memory import settle_memory
from benthic.train.schedule import Course
from benthic.train.state import TrainState
from benthic.train.step import train_step

WINDOW_STEPS = 12
PAIRS = 6
CADENCES = (500, 100)


class Training:
    """Steps of a run on random tokens, with or without a checkpoint at the start of a window of them."""

    def __init__(self, config: RunConfig, compute: Compute, root: Path) -> None:
        self.state, self.config, self.compute = TrainState(config), config, compute
        self.settings = Course(config.train.schedule, 100, config.train.batch_size).at(50)
        self.writer = BackgroundWriter(root)
        self.waits: list[float] = []
        """Seconds that training waited for a checkpoint to be copied."""

    def step(self) -> None:
        """One optimizer step."""
        size = (self.config.train.batch_size, self.config.train.sequence_length + self.state.objective.predictions)
        batch = Batch(torch.randint(self.config.model.vocab_size, size), None)
        train_step(
            self.state.objective, self.state.optimizer, batch, self.settings,
            micro_batch_size=self.config.train.batch_size, compute=self.compute,
        )  # fmt: skip
        self.state.step += 1

    def window(self, *, checkpoint: bool) -> float:
        """Seconds of a window's steps."""
        start = time.perf_counter()
        if checkpoint:
            self.writer.save(self.state.step, self.state.to_checkpoint({}, on_schedule=True), 2)
            self.waits.append(time.perf_counter() - start)
        for _ in range(WINDOW_STEPS):
            self.step()
        self.writer.wait()
        return time.perf_counter() - start


def main() -> None:
    """Prints the time of a step, of a checkpoint, and the share of a checkpoint in each cadence."""
    recipe, *overrides = sys.argv[1:] or ["quickstart"]
    config = load_run_config(recipe, overrides)
    compute = "bf16" if config.precision.compute == "auto" else config.precision.compute
    settle_memory()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, compute, Path(folder))
        training.window(checkpoint=True)
        training.waits.clear()
        pairs = [(training.window(checkpoint=True), training.window(checkpoint=False)) for _ in range(PAIRS)]
        written = sum(file.stat().st_size for file in next(Path(folder).glob("step-*")).iterdir())
    step = statistics.median(plain for _, plain in pairs) / WINDOW_STEPS
    cost = statistics.median(with_one - plain for with_one, plain in pairs)
    print(f"a step in {compute}: {1e3 * step:.0f} ms; a checkpoint of {written / 2**20:.0f} MiB: {1e3 * cost:.0f} ms,")
    print(f"of which training waits {1e3 * statistics.median(training.waits):.0f} ms for the copy")
    for cadence in CADENCES:
        print(f"every {cadence} steps: {cost / (cadence * step):.2%} of step time")


if __name__ == "__main__":
    main()
