"""Functions run by several gloo processes at once: what each returned, or one error with what all of them said."""

import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.01
_GRACE_SECONDS = 5.0
"""After one process has failed, for the others to say how, before they are killed."""
_PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "benthic.parallel.pipeline", "benthic.train.loop"]


class ProcessFailed(AssertionError):
    """A process raised, died or did not end in time."""


def run_processes(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    timeout: float = 240.0,
    environment: Mapping[str, str] | None = None,
    group: bool = True,
) -> list[Any]:
    """``function(rank, *arguments)`` in ``world`` processes within a gloo group; what each returned, by rank.

    The function must be one that a file has by name. Each process has one thread and the variables that torchrun would
    set. They are forked from a server that has imported what is slow to import, once a session.

    Args:
        timeout: seconds, for all.
        environment: further variables.
        group: whether the processes find themselves in a gloo group; otherwise they may form one by themselves.

    Raises:
        ProcessFailed: with what each process said.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        Path(folder, "call").write_bytes(pickle.dumps((_place_of(function), arguments)))
        port = str(_free_port())
        running = [
            server.Process(
                target=_main,
                args=(folder, rank, {**_variables(world, rank, port), **(environment or {})}, group),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in running:
            process.start()
        try:
            _wait(running, timeout)
            return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world)]
        except ProcessFailed as error:
            said = "\n".join(f"--- rank {rank}:\n{_said(Path(folder), rank)}" for rank in range(world))
            raise ProcessFailed(f"{error}\n{said}") from None
        finally:
            for process in running:
                process.kill()
                process.join()


def _place_of(function: Callable[..., Any]) -> tuple[str, str]:
    """The file that defines it, and its name."""
    return str(Path(sys.modules[function.__module__].__file__ or "").resolve()), function.__qualname__


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _variables(world: int, rank: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _wait(running: Sequence[BaseProcess], timeout: float) -> None:
    """Until all have ended, or one has failed and the others have had time to say so."""
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in running) and time.monotonic() < end:
        if any(process.exitcode for process in running):
            end = min(end, time.monotonic() + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    codes = [process.exitcode for process in running]
    if any(code != 0 for code in codes):
        raise ProcessFailed(f"exit statuses by rank, after at most {timeout:g} s (None: did not end): {codes}")


def _said(folder: Path, rank: int) -> str:
    log = folder / f"{rank}.log"
    return log.read_text(errors="replace")[-4000:] if log.exists() else "nothing"


def _main(folder: str, rank: int, variables: Mapping[str, str], group: bool) -> None:
    """What one process does."""
    log = os.open(str(Path(folder, f"{rank}.log")), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(variables)
    try:
        result = _call(Path(folder, "call"), rank, group)
    except SystemExit as stop:
        traceback.print_exc()
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:  # also what pytest raises
        traceback.print_exc()
        _leave(1)
    Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
    _leave(0)


def _leave(status: int) -> None:
    """At once: after a failure, threads of the group may wait for others that are no more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _call(call: Path, rank: int, group: bool) -> Any:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    (file, name), arguments = pickle.loads(call.read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    found: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    for part in name.split("."):
        found = getattr(found, part)
    if group:
        dist.init_process_group("gloo")
    result = found(rank, *arguments)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result
