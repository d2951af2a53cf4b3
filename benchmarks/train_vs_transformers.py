"""Training beside Hugging Face transformers: the same sizes, batch and optimizer, step by step in turn.

    pip install 'benthic[peers]'
    python benchmarks/train_vs_transformers.py [RECIPE] [KEY=VALUE ...]

A step is forward, loss, backward, clipping and AdamW on random tokens, by default of the recipe ``bench``: bench-108m,
8 sequences of 512, in fp32; ``precision.compute=bf16`` puts both in bf16. Steps alternate so that a busy moment falls
on all. transformers is measured twice: as it comes, which groups the experts' products, and with its eager attention
and experts. Each runs in a process of its own, as it would for a user: how training keeps memory holds for a process.
"""

import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

from steps import Step, compute_of, config_of, ratio, recipe_parser, seconds_in_turns, training_step
from transformers_peer import WITHOUT_MTP, peer_library, peer_step, refuse_what_it_lacks

from benthic.config.schema import RunConfig
from benthic.console import mistakes_in_one_line
from benthic.plan.flops import training_flops
from benthic.plan.machine import measure_gemm_gflops
from benthic.precision.compute import compute_dtype
from benthic.train.memory import settle_memory

Maker = Callable[[RunConfig], Step]


def benthic(config: RunConfig) -> Step:
    settle_memory()  # as training does
    return training_step(config)


def eager(config: RunConfig) -> Step:
    return peer_step(config, attn_implementation="eager", experts_implementation="eager")


MAKERS: dict[str, Maker] = {"benthic": benthic, "transformers": peer_step, "eager": eager}


def main() -> None:
    """Prints tokens per second, share of the GEMM peak, and the ratios."""
    config = config_of(recipe_parser(__doc__).parse_args(), WITHOUT_MTP)
    refuse_what_it_lacks(config)
    peer_library()  # missing, it is said once
    steps = {name: in_its_own_process(name, config) for name in MAKERS}
    times = seconds_in_turns(steps, config.train.steps or 5)
    gemm_gflops = measure_gemm_gflops(compute_dtype(compute_of(config)))
    gflops = training_flops(config.model, config.train.sequence_length) / 1e9
    tokens = config.train.batch_size * config.train.sequence_length
    for name, seconds in times.items():
        speed = tokens / statistics.median(seconds)
        share = speed * gflops / gemm_gflops
        print(f"{name:12}  {speed:8,.0f} tokens/s  {share:6.1%} of {gemm_gflops:.0f} GFLOP/s in {compute_of(config)}")
    for name in ("transformers", "eager"):
        print(f"{ratio(times[name], times['benthic']):8.2f} times {name}")


def in_its_own_process(name: str, config: RunConfig) -> Step:
    """A step that a child process takes while this one waits; it ends with this process."""
    here, there = get_context("spawn").Pipe()
    get_context("spawn").Process(target=take_steps, args=(name, config, there), daemon=True).start()
    there.close()

    def step() -> None:
        try:
            here.send(None)
            here.recv()
        except (EOFError, BrokenPipeError):
            sys.exit(2)  # it has said why

    return step


def take_steps(name: str, config: RunConfig, parent: Connection) -> None:
    """A step for every message, and a message after each, until the other side has gone."""
    with mistakes_in_one_line(), suppress(EOFError):
        step = MAKERS[name](config)
        while True:
            parent.recv()
            step()
            parent.send(None)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
