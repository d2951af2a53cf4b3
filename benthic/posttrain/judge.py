"""Rewards for many answers, whatever the functions that give them do.

They run in a process of their own, with a limit of time for each answer. An answer whose reward raises, hangs, takes
too much memory or is no finite number gets 0, and is counted.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, Self

from benthic.errors import InputError, WorkFailed
from benthic.posttrain.rewards import Problem

Trouble = Literal["raised", "not a number", "timed out", "ended"]

_START_S = 120.0


class Weighted(NamedTuple):
    """One of the rewards that are added up."""

    name: str
    """As :func:`~benthic.posttrain.rewards.find_reward` takes it."""
    weight: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    value: float
    """Weighted sum of the parts."""
    parts: dict[str, float]
    """Of each reward, by name; 0 where there was trouble."""
    troubles: dict[str, Trouble] = field(default_factory=dict)
    """By the reward's name."""
    why: str = ""
    """Of the last trouble, in a few words."""


class Case(NamedTuple):
    """An answer to be judged."""

    prompt: str
    answer: str
    problem: Problem
    rewards: Sequence[Weighted]


class Judge:
    """Gives answers their rewards, in another process, which ends with this object or with :meth:`close`.

    Args:
        names: of the rewards that it will be asked for.
        seconds: for one reward of one answer.

    Raises:
        InputError: a reward does not exist.
    """

    def __init__(self, names: Sequence[str], seconds: float = 30.0) -> None:
        self._names, self._seconds = list(dict.fromkeys(names)), seconds
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def judge(self, case: Case) -> Verdict:
        """The rewards of one answer."""
        parts, troubles, why = dict[str, float](), dict[str, Trouble](), ""
        for reward in case.rewards:
            reply = self._ask([self._names.index(reward.name), case.prompt, case.answer, case.problem])
            parts[reward.name] = reply.get("value", 0.0)
            if "trouble" in reply:
                troubles[reward.name], why = reply["trouble"], f"{reward.name}: {reply['why']}"
        value = sum(reward.weight * parts[reward.name] for reward in case.rewards)
        return Verdict(value, parts, troubles, why)

    def judge_all(self, cases: Sequence[Case]) -> list[Verdict]:
        """The rewards of several answers.

        Raises:
            WorkFailed: not one of them could be judged, so that there is nothing to learn from; the message says why.
        """
        verdicts = [self.judge(case) for case in cases]
        judged = [verdict for verdict in verdicts if verdict.parts]
        if judged and all(len(verdict.troubles) == len(verdict.parts) for verdict in judged):
            raise WorkFailed(f"rewards: none of {len(judged)} answers could be judged: {judged[-1].why}")
        return verdicts

    def _ask(self, question: list[Any]) -> dict[str, Any]:
        if not self._worker.alive:
            self._start()
        return self._worker.ask(json.dumps(question), self._seconds)

    def _start(self) -> None:
        self._worker = _Worker(self._names)
        weakref.finalize(self, self._worker.close)


class _Worker:
    """The process, and a thread that reads what it says."""

    def __init__(self, names: Sequence[str]) -> None:
        self._closed = False
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", "benthic.posttrain.reward_worker", json.dumps(list(names))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._replies: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        started = self._reply(_START_S)
        if "ready" not in started:
            self.close()
            if "mistake" in started:
                raise InputError(started["mistake"])
            raise WorkFailed(f"rewards: their process did not start ({started['why']})")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        reply = self._reply(seconds)
        if reply.get("trouble") in ("timed out", "ended"):
            self.close()
        return reply

    def close(self) -> None:
        """End the process and what it has started, if that has not been done."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)  # something that the reward left behind may still hold the pipe
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(json.loads(line))
        self._replies.put(None)

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            reply = self._replies.get(timeout=seconds)
        except Empty:
            return {"trouble": "timed out", "why": f"not done within {seconds:g} s"}
        return reply or {"trouble": "ended", "why": "its process has ended"}
