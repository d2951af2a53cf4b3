"""The process in which schemas are compiled first: a line of JSON in, a line out; it ends with its input.

Run by :mod:`benthic.serve.grammar` as ``python -m benthic.serve.grammar_checker ARGUMENTS``. It never imports PyTorch.
The server ends it when something takes too long. Lest it go on for ever once the server has been killed, a signal that
nothing can put off ends it, too.
"""

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benthic.serve.matcher import build_matcher, load_tokenizer

_MEMORY = 4 << 30
_START_SECONDS = 120.0


def main() -> None:
    """Answer ``fine``, or what is wrong, for each line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process when it ends
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    *arguments, seconds = json.loads(sys.argv[1])
    with _at_most(_START_SECONDS):
        tokenizer = load_tokenizer(*arguments)
    _say("ready")
    for line in sys.stdin:
        with _at_most(2 * seconds):  # the server's own limit comes first
            result = build_matcher(tokenizer, line)
        _say(result if isinstance(result, str) else "fine")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM, which by default ends a process whatever it is at
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _say(answer: str) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
