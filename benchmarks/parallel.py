"""Training by two processes of one thread each beside one process of two threads: how much of the speed is left.

    python benchmarks/parallel.py data|expert [RECIPE] [KEY=VALUE ...]

By default the recipe ``bench``. ``data`` is `parallel.shard=2` unless a setting says otherwise, ``expert``
`parallel.expert=2`. Both take steps in turns, `train.steps` rounds of them, so that a busy moment falls on both.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from steps import compute_of, config_of, recipe_parser

from benthic.config.schema import RunConfig
from benthic.console import mistakes_in_one_line

WARM_UP_ROUNDS = 1
PROCESSES = 2
_AXIS = {"data": "shard", "expert": "expert"}


class Workers:
    """Processes that each hold a model, or their part of one, and take a step when they are told to.

    They run ``script --worker CONFIG FURTHER``, which answers a line to each that it reads, after one to begin with.
    """

    def __init__(self, config: RunConfig, processes: int, threads: int, script: str = __file__, *further: str) -> None:
        command = [sys.executable, script, "--worker", config.model_dump_json(), *further]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self._running = [_start(command, _variables(processes, rank, threads, port)) for rank in range(processes)]
        self._told()

    def seconds(self, told: str = "step") -> float:
        """Of one step, which is done when all have done it."""
        start = time.perf_counter()
        for process in self._running:
            print(told, file=process.stdin, flush=True)
        self._told()
        return time.perf_counter() - start

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self._running:
            with process:  # closes its pipes, and waits
                process.kill()

    def _told(self) -> None:
        for process in self._running:
            if process.stdout is None or not process.stdout.readline():
                sys.exit("a process ended before its time; its error stands above")


def _variables(processes: int, rank: int, threads: int, port: int) -> Mapping[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"OMP_NUM_THREADS": str(threads)} | {key: str(value) for key, value in place.items()}


def _start(command: list[str], variables: Mapping[str, str]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **variables}, text=True, stdin=pipe, stdout=pipe)  # noqa: S603


def work(settings: str) -> None:
    """What a process does."""
    from benthic.parallel.open import open_world
    from benthic.train.memory import settle_memory
    from benthic.train.trial import RandomSequences, Trial

    config = RunConfig.model_validate_json(settings)
    settle_memory()
    with open_world(config) as world:
        trial = Trial(config, RandomSequences(config), compute_of(config), world=world)
        print("ready", flush=True)
        for _ in sys.stdin:
            trial.step()
            print("done", flush=True)


def compare(config: RunConfig, axis: str) -> tuple[list[float], list[float]]:
    """Seconds of steps by one process, and by two, in turns."""
    parallel = config.parallel
    if parallel.processes == 1:
        parallel = parallel.model_copy(update={axis: PROCESSES})
    several = Workers(config.model_copy(update={"parallel": parallel}), parallel.processes, 1)
    alone = Workers(config.model_copy(update={"parallel": type(parallel)()}), 1, parallel.processes)
    try:
        rounds = WARM_UP_ROUNDS + (config.train.steps or 5)
        pairs = [(alone.seconds(), several.seconds()) for _ in range(rounds)][WARM_UP_ROUNDS:]
    finally:
        alone.end()
        several.end()
    one, two = zip(*pairs, strict=True)
    return list(one), list(two)


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--worker"]:
        work(arguments[1])
        return
    given = recipe_parser(__doc__, choose=tuple(_AXIS)).parse_args(arguments)
    config = config_of(given)
    alone, several = compare(config, _AXIS[given.what])
    left = [one / two for one, two in zip(alone, several, strict=True)]
    print(f"one process      {statistics.median(alone):8.3f} s a step in {compute_of(config)}")
    print(f"several          {statistics.median(several):8.3f} s a step")
    print(f"speed that is left {statistics.median(left):6.3f}  (rounds: {json.dumps([round(one, 3) for one in left])})")


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
