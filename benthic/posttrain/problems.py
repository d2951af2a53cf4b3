"""Problems whose answers can be judged: families of reasoning-gym's, each problem from a seed, and files.

Of each source some are held out for validation. A problem is told from another by what it asks, not by its seed, so
that none of those held out is ever trained on, however small a family is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benthic.config.posttrain import ProblemsConfig
from benthic.data.chat_template import Message
from benthic.data.text_files import RecordError, read_records
from benthic.errors import InputError, MissingExtra
from benthic.files import sha256
from benthic.posttrain.judge import Weighted

HELD_OUT_SEED = 10**9
"""Seeds of reasoning-gym's problems from here on are those held out, lower ones those trained on."""
NO_PROMPT = 'no text under "prompt", and no list of {"role", "content"} that ends with the user under "messages"'
_TRIES = 50
"""Seeds that are looked at for each problem that is wanted."""


@dataclass(frozen=True)
class Problem:
    """A prompt, and what is known of it."""

    source: str
    """The family, or the file's name without its ending."""
    messages: tuple[Message, ...]
    facts: Mapping[str, Any]
    """What rewards are given."""
    rewards: tuple[Weighted, ...]

    @property
    def prompt(self) -> str:
        """What rewards are told of the prompt: its last message."""
        return str(self.messages[-1]["content"])


class Family:
    """One of reasoning-gym's families with its settings.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        InputError: it has no such family, or the family no such settings.
    """

    def __init__(self, config: ProblemsConfig, held_out: int) -> None:
        assert config.family is not None
        self.name, self._count = config.family, held_out
        self.rewards = _rewards(config, "reasoning_gym")
        self._data = _dataset(config)
        self.fingerprint = json.dumps([config.family, config.settings, held_out], sort_keys=True, default=list)

    @cached_property
    def held_out(self) -> list[Problem]:
        """Problems that all ask something else. Raises InputError if the family has too few."""
        if not self._count:
            return []
        found: dict[str, Problem] = {}
        for number in range(_TRIES * self._count):
            problem = self._problem(HELD_OUT_SEED + number)
            found.setdefault(problem.prompt, problem)
            if len(found) == self._count:
                return list(found.values())
        raise InputError(
            f"posttrain.rl: {self.name} has {len(found)} different problems among {_TRIES * self._count}; with these "
            f"settings held_out can be at most that, and less, for some must be left to learn from"
        )

    def training(self, number: int) -> Problem:
        """One to learn from. Raises InputError if all that it could be are held out."""
        for attempt in range(_TRIES):
            # Seeds that are passed over belong to no other number.
            problem = self._problem(number * _TRIES % HELD_OUT_SEED + attempt)
            if problem.prompt not in self._known:
                return problem
        raise InputError(f"posttrain.rl: {self.name} has hardly a problem that is not among the {self._count} held out")

    @cached_property
    def _known(self) -> set[str]:
        return {problem.prompt for problem in self.held_out}

    def _problem(self, seed: int) -> Problem:
        # As itself JSON: so it goes to the process that judges.
        entry = json.loads(json.dumps(self._data[seed], default=str))
        return Problem(self.name, ({"role": "user", "content": entry["question"].strip()},), entry, self.rewards)


class File:
    """A file of problems, the last of which are held out. Raises InputError that names the line."""

    def __init__(self, config: ProblemsConfig, held_out: int) -> None:
        path = Path(config.file or "")
        if not path.is_file():
            raise InputError(f"posttrain.rl.problems: {path}: no such file; give a .jsonl file")
        self.name, self.rewards = path.stem, _rewards(config, "exact")
        problems = read_problems(path, self.rewards)
        if len(problems) <= held_out:
            raise InputError(
                f"{path}: {len(problems)} different problems; held_out = {held_out} of them leave none to learn from"
            )
        self._problems, self.held_out = problems[:-held_out], problems[-held_out:]
        self.fingerprint = json.dumps([sha256(path), held_out])

    def training(self, number: int) -> Problem:
        """They come round again."""
        return self._problems[number % len(self._problems)]


Source = Family | File


def open_sources(problems: Sequence[ProblemsConfig], held_out: int) -> list[Source]:
    """All sources. Raises InputError as :class:`Family` and :class:`File`, and if two have one name."""
    sources = [(Family if config.family is not None else File)(config, held_out) for config in problems]
    for number, source in enumerate(sources):
        if source.name in (other.name for other in sources[:number]):
            raise InputError(f"posttrain.rl.problems: {source.name} is there twice; results are told by name")
    return sources


def order(weights: Sequence[float], start: int, count: int) -> list[tuple[int, int]]:
    """Which source each of ``count`` prompts from ``start`` on is of, and its number within that source.

    Every stretch holds them in proportion to their weights: the next is always the one that is furthest behind.
    """
    total, taken, found = sum(weights), [0] * len(weights), list[tuple[int, int]]()
    for place in range(start + count):
        behind = [(place + 1) * weight / total - have for weight, have in zip(weights, taken, strict=True)]
        source = max(range(len(weights)), key=behind.__getitem__)
        if place >= start:
            found.append((source, taken[source]))
        taken[source] += 1
    return found


def read_problems(path: Path, rewards: tuple[Weighted, ...]) -> list[Problem]:
    """The different problems of a file. Raises InputError that names the place of what is none."""
    found: dict[str, Problem] = {}
    for item in read_records(path, lambda record: _of_record(record, path.stem, rewards)):
        if not isinstance(item, Problem):
            raise InputError(f"{path}: byte {item.offset}: {item.reason}")
        found.setdefault(json.dumps(item.messages), item)
    return list(found.values())


def _rewards(config: ProblemsConfig, default: str) -> tuple[Weighted, ...]:
    return tuple(Weighted(reward.name, reward.weight) for reward in config.rewards) or (Weighted(default),)


def _dataset(config: ProblemsConfig) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingExtra("reasoning-gym", "rl") from None
    if config.family not in DATASETS:
        raise InputError(
            f"posttrain.rl.problems: family = {config.family!r}: reasoning-gym has no such family; "
            f"it has {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(config.family, seed=0, size=2 * HELD_OUT_SEED, **config.settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise InputError(f"posttrain.rl.problems: {config.family}: settings: {error}") from None


def _of_record(record: Any, source: str, rewards: tuple[Weighted, ...]) -> Problem:
    if not isinstance(record, dict):
        raise RecordError("not an object")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    if not are_messages(messages):
        raise RecordError(
            'neither a text under "prompt" nor a list of {"role", "content"} under "messages", the last the user\'s'
        )
    return Problem(source, tuple(messages), record, rewards)


def are_messages(messages: Any) -> bool:
    """Whether this is a conversation that ends with the user."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) for message in messages)
        and all(message.get("role") in ("system", "user", "assistant") for message in messages)
        and all(isinstance(message.get("content"), str) for message in messages)
        and messages[-1]["role"] == "user"
    )
