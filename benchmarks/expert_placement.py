"""Balance of GPUs under recorded expert loads, before and after experts are replicated and placed by load.

    benthic train RECIPE --out RUN --set train.expert_load_every=1
    python benchmarks/expert_placement.py RUN/metrics.jsonl --gpus 8 --nodes 2 --groups 4 --redundant 8 [--json]

Every figure is busiest over average, 1 being perfect. "after" is online: each window is judged under the placement made
from the window before. docs/placement.md explains the rest.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benthic.console import mistakes_in_one_line
from benthic.parallel.replay import Balance, Replay, read_loads, replay


def main(arguments: list[str]) -> Replay:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loads", type=Path, help="metrics.jsonl of a run, or JSON lines with expert_load")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--groups", type=int, default=1, help="of experts; if nodes divide them, they stay on a node")
    parser.add_argument("--redundant", type=int, default=0, help="slots beyond one for each expert")
    parser.add_argument("--window", type=int, default=16, help="records a placement is made from, and used for")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    load_TME = read_loads(given.loads)
    slots = load_TME.shape[-1] + given.redundant
    result = replay(load_TME, window=given.window, slots=slots, gpus=given.gpus, nodes=given.nodes, groups=given.groups)
    if given.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        report(result)
    return result


def report(result: Replay) -> None:
    print(f"{result.windows} windows; {100 * result.moved:.0f}% of slots change from one to the next")
    print(f"{'busiest / average':<28}{'GPU':>8}{'worst':>8}{'node':>8}{'worst':>8}")
    rows: dict[str, Balance | None] = {
        "in order, no replicas": result.before, "placed by the window before": result.after,
        "placed in hindsight": result.hindsight,
    }  # fmt: skip
    for name, balance in rows.items():
        if balance is not None:
            figures = "".join(f"{figure:>8.3f}" for figure in asdict(balance).values())
            print(f"{name:<28}{figures}")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
