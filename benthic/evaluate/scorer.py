"""reasoning-gym's scorers in a process of their own, for some of them evaluate what a model wrote as an expression.

The process has little memory, cannot write files, and is ended when an answer takes too long. It is no prison: what
reads files or opens connections is not held back.

Requests and answers are JSON, a line each; nothing is unpickled.
"""

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benthic.errors import WorkFailed
from benthic.evaluate import match

SECONDS_TO_START = 120.0
SECONDS_AN_ANSWER = 10.0
MEMORY = 4 << 30
"""Bytes of address space."""
_LONGEST_REPLY = 64


class Scorer:
    """Scores answers, one at a time; a context manager. The process starts with the first.

    ``failures`` counts answers that ended the process or were not scored in time: they score 0.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._process: subprocess.Popen[bytes] | None = None

    def score(self, family: str, text: str, entry: Mapping[str, Any]) -> float:
        """From 0 to 1; arguments as for :func:`benthic.evaluate.match.reasoning_gym`.

        Raises:
            WorkFailed: the process does not start.
        """
        if self._process is None:
            self._process = self._started()
        request = json.dumps([family, text, entry]).encode() + b"\n"
        with suppress(BrokenPipeError):
            self._input.write(request)
            self._input.flush()
        reply = self._reply(SECONDS_AN_ANSWER)
        if reply is None:
            self.failures += 1
            self.close()
            return 0.0
        return reply

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _input(self) -> Any:
        assert self._process is not None
        return self._process.stdin

    def _started(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), home]))
        self._process = subprocess.Popen(
            # -P: what lies in the working directory is not imported.
            [sys.executable, "-P", "-m", "benthic.evaluate.scorer"], env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self._reply(SECONDS_TO_START) is None:
            self.close()
            raise WorkFailed("the process that scores answers does not start")
        return self._process

    def _reply(self, seconds: float) -> float | None:
        """The next line of the process as a number; None if it says nothing of the kind in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, reply = self._process.stdout.fileno(), b""
        while not reply.endswith(b"\n"):
            if len(reply) > _LONGEST_REPLY or not select.select([descriptor], [], [], seconds)[0]:
                return None
            if not (piece := os.read(descriptor, _LONGEST_REPLY)):
                return None
            reply += piece
        try:
            return float(reply)
        except ValueError:
            return None


def main() -> None:
    """The process: a score for each request, until there are no more."""
    # Standard output belongs to whatever an answer turns out to print.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    match.families()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(1.0, file=replies, flush=True)
    for line in sys.stdin:
        family, text, entry = json.loads(line)
        print(match.reasoning_gym(family, text, entry), file=replies, flush=True)


if __name__ == "__main__":
    main()
