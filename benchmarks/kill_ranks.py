"""Training under a real torchrun whose processes are killed while it goes on, each time another, as chance has it.

    python benchmarks/kill_ranks.py RECIPE --out DIR [--processes 4] [--kills 10] [--seed 0]

DIR must hold what ``benthic data`` has prepared, and RECIPE's ``parallel`` must fit the processes. torchrun starts all
of them again after each kill; what they say goes to ``DIR.log``. Compare the outcome with that of ``--kills 0`` in
another directory: the same bits. ``tests/distributed/test_elastic.py`` does.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def start(processes: int, recipe: Path, out: Path, *, restarts: int = 0) -> subprocess.Popen[str]:
    """``torchrun ... benthic train``; what all processes say goes to ``OUT.log``."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", "benthic", "train", str(recipe)),
        *("--out", str(out)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with _log(out).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, start_new_session=True)  # noqa: S603


def _log(out: Path) -> Path:
    return out.with_suffix(".log")


def said(out: Path) -> str:
    """All that was said by the last run in a directory."""
    return _log(out).read_text()[-8000:]


def workers(torchrun: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes that are alive, by rank."""
    found = {}
    for process in psutil.Process(torchrun.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found[int(process.environ()["RANK"])] = process
    return [process for _, process in sorted(found.items())]


def rows(out: Path) -> int:
    """How many rows the metrics have."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], torchrun: subprocess.Popen[str], seconds: float = 1200) -> bool:
    """Whether it came to be before the run ended."""
    end = time.monotonic() + seconds
    while not condition():
        if torchrun.poll() is not None:
            return False
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.02)
    return True


def kill_random_ranks(torchrun: subprocess.Popen[str], out: Path, times: int, rng: random.Random) -> list[int]:
    """SIGKILL of a random process, so many times, each some rows after training has begun anew; the ranks."""
    return [kill_one(torchrun, out, rng) for _ in range(times)]


def kill_one(torchrun: "subprocess.Popen[str]", out: Path, rng: random.Random) -> int:
    """Kills a rank after some steps, and waits until others run in its place; which it was."""
    ready = rows(out)
    # A restarted run drops the rows after its checkpoint, and then adds some.
    assert wait_for(lambda: rows(out) != ready, torchrun), said(out)
    enough = rows(out) + rng.randint(1, 6)
    assert wait_for(lambda: rows(out) >= enough, torchrun), said(out)
    time.sleep(rng.uniform(0, 0.1))
    alive = workers(torchrun)
    rank = rng.randrange(len(alive))
    alive[rank].send_signal(signal.SIGKILL)
    pids = {process.pid for process in alive}
    assert wait_for(lambda: not pids & {process.pid for process in workers(torchrun)}, torchrun), said(out)
    return rank


def stop(torchrun: subprocess.Popen[str]) -> None:
    """End a run with all of its processes, also stopped ones."""
    family = [psutil.Process(torchrun.pid), *psutil.Process(torchrun.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    torchrun.wait()


def main() -> int:
    """Run, kill, and wait for the end."""
    parser = argparse.ArgumentParser(description="Train under torchrun, and kill random processes of it.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("processes", 4), ("kills", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torchrun = start(given.processes, given.recipe, given.out, restarts=given.kills)
    try:
        ranks = kill_random_ranks(torchrun, given.out, given.kills, random.Random(given.seed))
        print(f"killed ranks {', '.join(map(str, ranks))}; waiting for the end")
        status = torchrun.wait()
    finally:
        if torchrun.poll() is None:
            stop(torchrun)
    print(f"torchrun ended with status {status} after {rows(given.out)} rows of metrics")
    return status


if __name__ == "__main__":
    sys.exit(main())
