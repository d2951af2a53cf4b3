"""What a checkpoint written in the background costs training: windows of steps with and without one, in turns.

    python benchmarks/checkpoint_cost.py [RECIPE] [KEY=VALUE ...]

By default the recipe ``quickstart``, its sizes, batch and micro-batch, on random tokens, with all that a checkpoint may
hold: the optimizer's state of MTP modules, which the quickstart runs in some of its later steps, and the average of the
weights where the recipe keeps one. ``precision.compute=auto`` stands for bf16. A window with a checkpoint begins with
one and is long enough for it to be on disk, hashed, before the window ends. What such a window takes longer is the cost
of one checkpoint, the wait for the copy and the work beside the steps together; shares are of so many steps' time.
"""

import statistics
import tempfile
import time
from pathlib import Path

from steps import compute_of, config_of, recipe_parser

from benthic.config.schema import RunConfig
from benthic.console import mistakes_in_one_line
from benthic.train.background import BackgroundWriter
from benthic.train.checkpoint import committed
from benthic.train.memory import settle_memory
from benthic.train.trial import RandomSequences, Trial

WINDOW_STEPS = 12
PAIRS = 6
CADENCES = (500, 100)


class Training:
    """Steps of a run on random tokens, with or without a checkpoint at the start of a window of them."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        self.trial = Trial(config, RandomSequences(config), compute_of(config))
        self.writer = BackgroundWriter(root)
        self.waits: list[float] = []
        """Seconds that training waited for a checkpoint to be copied."""

    def window(self, *, checkpoint: bool) -> float:
        """Seconds of a window's steps."""
        state, start = self.trial.state, time.perf_counter()
        if checkpoint:
            self.writer.save(state.step, state.to_checkpoint({}, on_schedule=True), 2)
            self.waits.append(time.perf_counter() - start)
        for _ in range(WINDOW_STEPS):
            self.trial.step()
        self.writer.wait()
        return time.perf_counter() - start


def main() -> None:
    """Prints the time of a step, of a checkpoint, and the share of a checkpoint in each cadence."""
    config = config_of(recipe_parser(__doc__, "quickstart").parse_args(), auto="bf16")
    compute = compute_of(config)
    settle_memory()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, Path(folder))
        training.window(checkpoint=False)  # to warm up, and for the optimizer to have a state
        training.window(checkpoint=True)
        training.waits.clear()
        pairs = [(training.window(checkpoint=True), training.window(checkpoint=False)) for _ in range(PAIRS)]
        written = sum(file.stat().st_size for file in committed(Path(folder))[-1].iterdir())
    step = statistics.median(plain for _, plain in pairs) / WINDOW_STEPS
    cost = statistics.median(with_one - plain for with_one, plain in pairs)
    print(f"a step in {compute}: {1e3 * step:.0f} ms; a checkpoint of {written / 2**20:.0f} MiB: {1e3 * cost:.0f} ms,")
    print(f"of which training waits {1e3 * statistics.median(training.waits):.0f} ms for the copy")
    for cadence in CADENCES:
        print(f"every {cadence} steps: {cost / (cadence * step):.2%} of step time")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
