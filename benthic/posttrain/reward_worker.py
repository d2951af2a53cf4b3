"""The process in which rewards are computed: a line of JSON in, a line out; it ends with its input.

Run by :mod:`benthic.posttrain.judge` as ``python -m benthic.posttrain.reward_worker NAMES``. What a reward prints goes
to standard error.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

from benthic.posttrain.rewards import Reward, find_reward, is_reward

_MEMORY = 4 << 30
"""Of data, beyond which a reward gets a MemoryError."""
_LONGEST_WHY = 300


def main() -> None:
    """Answer each ``[number of the reward, prompt, answer, problem]`` with its value, or with what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process when it ends
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        try:
            rewards = [find_reward(name) for name in json.loads(sys.argv[1])]
        except ValueError as error:
            print(json.dumps({"mistake": str(error)}), file=replies, flush=True)
            return
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            number, *of = json.loads(line)
            print(json.dumps(_reply(rewards[number], of)), file=replies, flush=True)


def _reply(reward: Reward, of: list[Any]) -> dict[str, Any]:
    try:
        value = reward(*of)
    except BaseException as error:  # whatever a user's function does, the next answer is judged
        return {"trouble": "raised", "why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_WHY]}
    if not is_reward(value):
        return {"trouble": "not a number", "why": " ".join(repr(value).split())[:_LONGEST_WHY]}
    return {"value": float(value)}


if __name__ == "__main__":
    main()
