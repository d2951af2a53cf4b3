"""Problems of a recipe as files for other stages: right answers to fine-tune on first, and task files to measure by.

A model that never gives a right answer learns nothing from rewards. One that has seen some, with the same words around
them, has something to begin with.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benthic.config.posttrain import RlConfig
from benthic.errors import InputError
from benthic.files import write_atomically
from benthic.posttrain.problems import Problem, Source, open_sources

FOLDER = "problems"
"""Of a run, where it has such problems."""
ANSWERED = "answered.jsonl"
_FIRST = 10_000_000
"""Numbers of training problems from here on are those whose answers are told; a stage would take years to get there."""
_VERIFIERS = ("exact", "numeric")


def write_problems(rl: RlConfig, out: Path, count: int) -> list[Path]:
    """Write ``answered.jsonl``, conversations for fine-tuning with ``count`` problems of each source, if any, and for
    each source whose answers `benthic eval --tasks` can judge a task file of the problems held out. Returns their
    paths.

    Raises:
        InputError: as :func:`benthic.posttrain.problems.open_sources`; or a problem has no answer to be told.
    """
    sources = open_sources(rl.problems, rl.held_out)
    out.mkdir(parents=True, exist_ok=True)
    files = {ANSWERED: [line for source in sources for line in _answered(source, count)]} if count else {}
    for source in sources:
        if tasks := list(_tasks(source, rl.max_new_tokens)):
            files[f"{source.name}.jsonl"] = tasks
    for name, lines in files.items():
        write_atomically(out / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [out / name for name in files]


def _answered(source: Source, count: int) -> Iterator[dict[str, Any]]:
    """Different problems with their answers, as many as there are of so many that are looked at."""
    seen = set[str]()
    for number in range(_FIRST, _FIRST + count):
        problem = source.training(number)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield {"messages": [*problem.messages, {"role": "assistant", "content": _answer(problem)}]}


def _tasks(source: Source, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    verifier = next((reward.name for reward in source.rewards if reward.name in _VERIFIERS), None)
    if any(reward.name == "reasoning_gym" for reward in source.rewards):
        verifier = f"reasoning_gym:{source.name}"
    if verifier is None:
        return
    yield {"task": {"max_new_tokens": max_new_tokens}}
    for problem in source.held_out:
        entry = {"entry": dict(problem.facts)} if ":" in verifier else {}
        yield {"messages": list(problem.messages), "answer": _answer(problem), "verifier": verifier, **entry}


def _answer(problem: Problem) -> str:
    if "answer" not in problem.facts:
        raise InputError(f"{problem.source}: a problem has no answer that could be told: {problem.prompt!r:.80}")
    return str(problem.facts["answer"])
