"""What the benchmarks of training share: their arguments, and steps of several kinds in turns.

Steps of different kinds alternate within one process, so that a busy moment falls on all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

from benthic.config.load import load_run_config
from benthic.config.schema import RunConfig
from benthic.precision.compute import Compute
from benthic.train.trial import RandomSequences, Trial

WARM_UP_STEPS = 2
Step = Callable[[], None]


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a script whose docstring says how to call it."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def recipe_parser(doc: str | None, default: str = "bench", *, choose: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Of a script with ``[RECIPE] [KEY=VALUE ...]``, behind ``what`` if there is something to ``choose``."""
    parser = script_parser(doc)
    if choose:
        parser.add_argument("what", choices=choose)
    parser.add_argument("recipe", nargs="?", default=default, metavar="RECIPE", help=f"by default {default}")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the recipe's")
    return parser


def config_of(given: argparse.Namespace, *further: str, auto: Compute = "fp32") -> RunConfig:
    """The recipe that was given, with ``further`` settings over what was given besides.

    What ``precision.compute=auto`` would find out by measuring is ``auto``.
    """
    config = load_run_config(given.recipe, [*given.overrides, *further])
    if config.precision.compute != "auto":
        return config
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": auto})})


def compute_of(config: RunConfig) -> Compute:
    """The precision of a config of :func:`config_of`."""
    assert config.precision.compute != "auto"
    return config.precision.compute


def training_step(config: RunConfig) -> Step:
    """A step of a fresh model on random tokens, as `benthic train` takes it."""
    return Trial(config, RandomSequences(config), compute_of(config)).step


def seconds_in_turns(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Times of each step, after warming up; entry i of all is of one moment."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP_STEPS + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[WARM_UP_STEPS:] for name, times in seconds.items()}


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over moments of one step's time over another's: drift of the machine falls out."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
