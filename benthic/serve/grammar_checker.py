"""The process in which schemas are compiled first: a line of JSON in, a line out; it ends with its input.

Run by :mod:`benthic.serve.grammar` as ``python -m benthic.serve.grammar_checker ARGUMENTS``. It never imports PyTorch.
"""

import json
import resource
import signal
import sys

from benthic.serve.matcher import build_matcher, load_tokenizer

_MEMORY = 4 << 30


def main() -> None:
    """Answer ``fine``, or what is wrong, for each line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process when it ends
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    tokenizer = load_tokenizer(*json.loads(sys.argv[1]))
    _say("ready")
    for line in sys.stdin:
        result = build_matcher(tokenizer, line)
        _say(result if isinstance(result, str) else "fine")


def _say(answer: str) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
