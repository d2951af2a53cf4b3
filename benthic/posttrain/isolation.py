"""Running a program that nobody has read, such as one a model has written, so that it can do no harm.

It runs in namespaces of its own (see :mod:`benthic.posttrain.isolation_launcher`, whose limits these are), which Linux
gives to ordinary users too, unless its administrator has switched that off; then, and on other systems, nothing is run.
What it writes to standard output is all that comes back.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benthic.errors import InputError

_LAUNCHER = Path(__file__).with_name("isolation_launcher.py")
_GRACE_S = 5.0
"""Beyond the program's own limit, to build its world and to take it down."""
_MAX_REPORT = 4096


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """By the clock on the wall, from its start, whatever processes it leaves behind."""
    memory_mib: int = 512
    """Address space of each of its processes."""
    processes: int = 16
    """And threads, at once."""
    folder_mib: int = 16
    """Of files in its folder, which is in memory and vanishes with it."""
    output_bytes: int = 65536
    """What it writes after so much is not waited for: it is ended."""


@dataclass(frozen=True)
class Ran:
    """What became of a program."""

    outcome: Literal["ended", "timed out", "too much output"]
    exit_status: int | None
    """As :mod:`subprocess` gives it; None unless it ended by itself and left those that watch over it alone."""
    output: str
    """Its standard output, or the beginning of it; bytes that are no UTF-8 are replaced."""


class CannotIsolate(InputError):
    """Programs cannot be run here, for nothing would hold them; the message says what is missing."""


def run_isolated(program: str, stdin: str = "", limits: Limits | None = None) -> Ran:
    """Run a Python program (standard library alone) without network, on a folder of its own, for a limited time.

    Raises:
        CannotIsolate: this system does not allow it. Nothing has been run.
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise CannotIsolate("running programs: needs Linux, whose namespaces keep them apart")
    report, report_in = os.pipe()
    request = {
        "report": report_in, "program": program, "input": stdin, "seconds": limits.seconds, "python": _python(),
        "memory_bytes": limits.memory_mib << 20, "processes": limits.processes, "readable": _readable(),
        "folder_bytes": limits.folder_mib << 20,
    }  # fmt: skip
    with subprocess.Popen(  # noqa: S603 - arguments of our own
        [_python(), "-I", "-S", "-B", _LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, pass_fds=(report_in,), start_new_session=True, env={},
    ) as launcher:  # fmt: skip
        os.close(report_in)
        try:
            output, in_time = _exchange(launcher, json.dumps(request).encode(), limits)
        finally:
            launcher.kill()  # what is below it ends with it
    return _outcome(_read(report), output, in_time, limits)


def _exchange(launcher: "subprocess.Popen[bytes]", request: bytes, limits: Limits) -> tuple[bytes, bool]:
    """Hand the request over and read until the end, the limit of output, or time is up (then False)."""
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with suppress(BrokenPipeError), launcher.stdin as stdin:
        stdin.write(request)
    deadline, output = time.monotonic() + limits.seconds + _GRACE_S, b""
    with selectors.DefaultSelector() as selector:
        selector.register(launcher.stdout, selectors.EVENT_READ)
        while len(output) <= limits.output_bytes:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return output, False
            if not (piece := os.read(launcher.stdout.fileno(), 65536)):
                return output, True
            output += piece
    return output, True


def _outcome(report: dict[str, Any], output: bytes, in_time: bool, limits: Limits) -> Ran:
    if "refused" in report:
        raise CannotIsolate(f"running programs: this system does not allow what keeps them apart ({report['refused']})")
    text = output[: limits.output_bytes].decode(errors="replace")
    if len(output) > limits.output_bytes:
        return Ran("too much output", None, text)
    if not in_time or "timed_out" in report:
        return Ran("timed out", None, text)
    return Ran("ended", report.get("exit"), text)


def _read(report: int) -> dict[str, Any]:
    with os.fdopen(report, "rb") as file:
        content = file.read(_MAX_REPORT)
    found = json.loads(content) if content else {}
    return found if isinstance(found, dict) else {}


@cache
def _python() -> str:
    """The interpreter that a virtual environment is made from."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


@cache
def _readable() -> list[str]:
    """Paths that Python and the libraries it is linked to need, none within another."""
    system = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.base_exec_prefix)
    found: list[str] = []
    for path in (*system, str(Path(_python()).parent)):
        if Path(path).exists() and not any(Path(path).is_relative_to(other) for other in found):
            found.append(path)
    return found
