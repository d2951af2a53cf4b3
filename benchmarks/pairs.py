"""Passes that DualPipeV pairs, in turns and one after the other, where messages to experts take their time.

    python benchmarks/pairs.py [KEY=VALUE ...] [--ms 20]

Four processes of one thread: `parallel.pipeline=2`, `parallel.expert=2`. On one machine the processors carry messages
themselves; as between machines, here each is waited for until at least --ms after it began. Steps of both kinds take
turns, `train.steps` rounds of them. The model is `tiny` with six layers, unless a setting says otherwise.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from parallel import WARM_UP_ROUNDS, Workers
from steps import compute_of, config_of, script_parser

from benthic.config.schema import RunConfig
from benthic.console import mistakes_in_one_line
from benthic.parallel.open import open_world
from benthic.parallel.turns import Turns
from benthic.train.memory import settle_memory
from benthic.train.trial import RandomSequences, Trial

LAYOUT = ("parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipev")
MODEL = ("model.preset=tiny", "model.num_hidden_layers=6", "train.micro_batch_size=1", "train.sequence_length=128")
KINDS = ("one after the other", "in turns")


class Slow:
    """A message that arrives no sooner than it would over a network."""

    def __init__(self, work: dist.Work, seconds: float) -> None:
        self._work, self._due = work, time.monotonic() + seconds

    def wait(self) -> None:
        """Until it is due."""
        self._work.wait()
        time.sleep(max(0.0, self._due - time.monotonic()))


def work(settings: str, milliseconds: str) -> None:
    """What a process does."""
    config = RunConfig.model_validate_json(settings)
    send = dist.all_to_all_single

    def slowly(*arguments: Any, **options: Any) -> Slow:
        message: Any = send(*arguments, **options)
        return Slow(message, float(milliseconds) / 1000)

    settle_memory()
    with open_world(config) as world, patch.object(dist, "all_to_all_single", slowly):
        trial = Trial(config, RandomSequences(config), compute_of(config), world=world)
        print("ready", flush=True)
        for line in sys.stdin:
            with one_after_the_other() if line.strip() == KINDS[0] else nullcontext():
                trial.step()
            print("done", flush=True)


def one_after_the_other() -> AbstractContextManager[Any]:
    """Passes of a pair wait for their own messages."""
    return patch.object(Turns, "hand_over", lambda _: None)


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--worker"]:
        work(*arguments[1:])
        return
    parser = script_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--ms", type=float, default=20.0, help="that a message takes at least; by default 20")
    given = parser.parse_args(arguments)
    given.recipe, given.overrides = "bench", [*MODEL, *LAYOUT, *given.overrides]
    config = config_of(given)
    workers = Workers(config, config.parallel.processes, 1, __file__, str(given.ms))
    try:
        rounds = WARM_UP_ROUNDS + (config.train.steps or 5)
        taken = [[workers.seconds(kind) for kind in KINDS] for _ in range(rounds)][WARM_UP_ROUNDS:]
    finally:
        workers.end()
    for kind, seconds in zip(KINDS, zip(*taken, strict=True), strict=True):
        print(f"{kind:<20} {statistics.median(seconds):8.3f} s a step")
    left = sorted(turns / one for one, turns in taken)
    print(f"of the time {statistics.median(left):6.3f}  (rounds: {', '.join(f'{share:.3f}' for share in left)})")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
