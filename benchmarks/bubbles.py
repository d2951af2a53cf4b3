"""Pipeline schedules over stages that only wait: the share of time in which ranks are idle, and what is published.

    python benchmarks/bubbles.py [--stages 4 8] [--micro-batches 8] [--unit 0.2] [--times 1,1,1 2,2,1]

Each row is a step in real gloo processes, one a rank, on this machine: a stage's forward pass, the backward pass of
its input and that of its weights each sleep as long as --times say, in --unit seconds. `simulated` is the same by
arithmetic, with messages that take no time; `published` is the formula of github.com/deepseek-ai/DualPipe. Idle time
is a few units out of tens: with a shorter unit, or on a busy machine, messages and late wake-ups count for more.
"""

import argparse

from benthic.lab.bubbles import measure_idle
from benthic.parallel.stage_ranks import KINDS
from benthic.parallel.timeline import Times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--unit", type=float, default=0.2)
    parser.add_argument("--times", nargs="+", default=["1,1,1", "2,2,1"])
    parser.add_argument("--schedules", nargs="+", choices=KINDS, default=["1f1b", "zb1p", "dualpipev", "zbv"])
    arguments = parser.parse_args()
    print("| stages | F, I, W | schedule | ranks | measured | simulated | published | measured / published |")
    print("|---|---|---|---|---|---|---|---|")
    for stages in arguments.stages:
        for given in arguments.times:
            times = Times(*(float(number) * arguments.unit for number in given.split(",")))
            for schedule in arguments.schedules:
                idle = measure_idle(schedule, stages, arguments.micro_batches, times)
                beside = ("", "") if idle.published is None else (
                    f"{idle.published:.2%}", f"{idle.measured / idle.published:.3f}")  # fmt: skip
                ranks = stages // KINDS[schedule].stages_per_rank
                print(
                    f"| {stages} | {given} | {schedule} | {ranks} | {idle.measured:.2%} | {idle.simulated:.2%} | "
                    f"{beside[0]} | {beside[1]} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
