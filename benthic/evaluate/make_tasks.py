"""Writes task files: problems of reasoning-gym, or facts to be found in long texts.

    python -m benthic.evaluate.make_tasks reasoning-gym chain_sum gcd --size 500 --seed 1 --out tasks
    python -m benthic.evaluate.make_tasks retrieval RUN --lengths 64 128 256 --filler book.txt --out tasks

Files, so that every model is asked the same, today and in a year: what a seed makes may change with reasoning-gym.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.evaluate import match
from benthic.evaluate.retrieval import retrieval_problems
from benthic.evaluate.task_files import REASONING_GYM
from benthic.files import write_atomically

MAX_FILLER = 64 << 20
"""Bytes of text that are read."""


def reasoning_gym_task(
    family: str, *, size: int, seed: int, config: dict[str, Any] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Lines of a task file of one family, settings first; each problem's own answer has been found to be right.

    Args:
        family: such as ``chain_sum``.
        size: problems.
        seed: of the problems; equal seeds give equal problems in one version of the library.
        config: settings of the family, such as ``{"num_terms": 2}``.
        **settings: of the task, such as ``max_new_tokens``.

    Raises:
        InputError: there is no such family, a setting is wrong, or what it makes cannot be scored from a file.
        MissingExtra: the library is not there.
    """
    if family not in match.families():
        raise InputError(f"{family}: reasoning-gym has no such family; it has {', '.join(match.families())}")
    import reasoning_gym

    try:
        problems = list(reasoning_gym.create_dataset(family, size=size, seed=seed, **(config or {})))
    except Exception as error:  # of any kind, out of 105 families
        raise InputError(f"{family}: {' '.join(str(error).split()) or type(error).__name__}") from None
    return [{"task": settings}, *(_problem(family, problem) for problem in problems)]


def _problem(family: str, problem: dict[str, Any]) -> dict[str, Any]:
    try:
        entry = json.loads(json.dumps(problem))
    except (TypeError, ValueError):
        raise InputError(f"{family}: its problems hold what JSON does not, and cannot be written to a file") from None
    if match.reasoning_gym(family, str(entry["answer"]), entry) < 1:
        raise InputError(f"{family}: its scorer does not take its own answer for right when it is read from a file")
    return {
        "prompt": entry["question"], "answer": str(entry["answer"]), "verifier": REASONING_GYM + family,
        "entry": {"answer": entry["answer"], "metadata": entry["metadata"]},
    }  # fmt: skip


def write_task_file(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A task file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    gym = kinds.add_parser("reasoning-gym", help="a file for each family")
    gym.add_argument("families", nargs="+", metavar="FAMILY")
    gym.add_argument("--size", type=_count, default=500, help="problems of each; 500")
    gym.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the families")
    gym.add_argument("--max-new-tokens", type=_count, default=64, help="of an answer; 64")
    gym.add_argument("--chat", action="store_true", help="put the problems as a user's message")
    gym.set_defaults(write=_write_reasoning_gym)
    long = kinds.add_parser("retrieval", help="a file for each length")
    long.add_argument("run", type=Path, metavar="RUN", help="whose tokenizer counts the tokens")
    long.add_argument("--lengths", type=_count, nargs="+", required=True, help="tokens")
    long.add_argument("--filler", type=Path, required=True, help="plain text for all but the fact")
    long.add_argument("--size", type=_count, default=100, help="problems of each length; 100")
    long.set_defaults(write=_write_retrieval)
    for kind in (gym, long):
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        for path in given.write(given):
            print(f"wrote {path}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _write_reasoning_gym(given: argparse.Namespace) -> Iterable[Path]:
    config = dict(map(_setting, given.set))
    settings = {"max_new_tokens": given.max_new_tokens} | ({"chat": True} if given.chat else {})
    for family in given.families:
        path = given.out / f"{family}.jsonl"
        write_task_file(path, reasoning_gym_task(family, size=given.size, seed=given.seed, config=config, **settings))
        yield path


def _write_retrieval(given: argparse.Namespace) -> Iterable[Path]:
    tokenizer = Tokenizer.load(given.run)
    with given.filler.open(encoding="utf-8", errors="replace") as file:
        filler = file.read(MAX_FILLER)
    for length in given.lengths:
        problems = retrieval_problems(tokenizer, filler, length=length, count=given.size, seed=given.seed)
        path = given.out / f"retrieval-{length}.jsonl"
        write_task_file(path, (problem.model_dump(exclude_defaults=True) for problem in problems))
        yield path


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: must be KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
