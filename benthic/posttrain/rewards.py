"""Rewards: pure functions of a prompt, an answer and what is known of the problem, to a number.

Every one has the same form, ``reward(prompt, answer, problem) -> float``, so that a user's own is as good as those
here: ``package.module:function``. Most look at what follows the reasoning section only. An answer that does not even
have the form that is asked for gets 0; a problem that lacks what a reward needs is a mistake (``InputError``).

What may go wrong in them, an exception, a hang, a number that is none, is :mod:`benthic.posttrain.judge`'s business.
"""

import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from benthic.errors import InputError, MissingExtra
from benthic.evaluate import match
from benthic.posttrain.isolation import Limits, run_isolated

Problem = Mapping[str, Any]
Reward = Callable[[str, str, Problem], float]

REASONING = ("<think>", "</think>")
"""What a reasoning section begins and ends with."""

_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
LARGEST = 1e6
"""The largest size of a reward."""


def final_answer(answer: str) -> str:
    """What an answer says after its reasoning section, without space around it; nothing if the section never ends."""
    opening, closing = REASONING
    if closing in answer:
        return answer.rpartition(closing)[2].strip()
    return "" if answer.lstrip().startswith(opening) else answer.strip()


def exact(prompt: str, answer: str, problem: Problem) -> float:
    """1 if the final answer is ``problem["answer"]``, or one of them, however white space is spread.

    >>> exact("2 + 2 =", "<think>two and two</think> 4", {"answer": "4"})
    1.0
    """
    return float(match.exact(final_answer(answer), _answers(problem)))


def numeric(prompt: str, answer: str, problem: Problem) -> float:
    """1 if the last number of the final answer is ``problem["answer"]``, or one of them, give or take a share of
    ``tolerance``.

    >>> numeric("How much is it?", "It is $1,250.50.", {"answer": 1250.5})
    1.0
    """
    tolerance = float(problem.get("tolerance", 0.0))
    return float(match.numeric(final_answer(answer), _answers(problem), tolerance=tolerance))


def reasoning(prompt: str, answer: str, problem: Problem) -> float:
    """1 if the answer is one reasoning section, which says something, and then something else.

    >>> reasoning("2 + 2 =", "<think>two and two</think> 4", {})
    1.0
    """
    opening, closing = REASONING
    if answer.count(opening) != 1 or answer.count(closing) != 1 or not answer.lstrip().startswith(opening):
        return 0.0
    inside, _, after = answer.lstrip().removeprefix(opening).partition(closing)
    return float(bool(inside.strip()) and bool(after.strip()))


def json_schema(prompt: str, answer: str, problem: Problem) -> float:
    """1 if the final answer, or the code block in it, is JSON that ``problem["schema"]`` (JSON Schema) allows.

    >>> json_schema("Your name?", '{"name": "Ada"}', {"schema": {"type": "object", "required": ["name"]}})
    1.0
    """
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise MissingExtra("jsonschema", "rl") from None
    schema, text = _of(problem, "schema"), final_answer(answer)
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    checker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        checker.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"problem: schema is not a JSON Schema: {error.message}") from None
    # An empty registry: references to elsewhere are not followed over the network.
    return float(checker(schema, registry=referencing.Registry()).is_valid(value))


def code(prompt: str, answer: str, problem: Problem) -> float:
    r"""The share of ``problem["tests"]`` that the Python program in the final answer passes.

    Each test is an object: ``stdout`` is what the program must print, but for space at the ends of lines and of the
    whole; ``stdin`` is what it may read, ``append`` code that is put after it, such as ``print(solve(3))``. What is
    expected never enters the process that runs the answer. ``problem["limits"]`` are fields of
    :class:`~benthic.posttrain.isolation.Limits`.

    >>> code("Print 1 to 3.", "```python\nprint(1, 2, 3)\n```", {"tests": [{"stdout": "1 2 3"}]})
    1.0
    """
    tests = _of(problem, "tests")
    if not isinstance(tests, list) or not tests:
        raise InputError("problem: tests must be a list of at least one")
    try:
        limits = Limits(**problem.get("limits", {}))
    except TypeError as error:
        raise InputError(f"problem: limits: {error}") from None
    blocks = _CODE.findall(final_answer(answer))
    if not blocks:
        return 0.0
    return sum(_passes(blocks[-1], test, limits) for test in tests) / len(tests)


def _passes(program: str, test: Any, limits: Limits) -> bool:
    if not isinstance(test, dict) or not isinstance(test.get("stdout"), str):
        raise InputError("problem: each of tests must be an object with stdout")
    ran = run_isolated(f"{program}\n{test.get('append', '')}", test.get("stdin", ""), limits)
    return ran.exit_status == 0 and _lines(ran.output) == _lines(test["stdout"])


def reasoning_gym(prompt: str, answer: str, problem: Problem) -> float:
    """What reasoning-gym's own scorer of the family gives the final answer.

    ``problem`` is an entry of one of its data sets, with ``metadata.source_dataset``.

    >>> entry = {"question": "1 + 5 =", "answer": "6", "metadata": {"source_dataset": "chain_sum"}}
    >>> reasoning_gym("1 + 5 =", "6", entry)
    1.0
    """
    metadata = _of(problem, "metadata")
    family = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    if not isinstance(family, str):
        raise InputError("problem: metadata names no source_dataset, reasoning-gym's name of the family")
    return match.reasoning_gym(family, final_answer(answer), problem)


REWARDS: dict[str, Reward] = {
    "code": code,
    "exact": exact,
    "json_schema": json_schema,
    "numeric": numeric,
    "reasoning": reasoning,
    "reasoning_gym": reasoning_gym,
}
"""Those that come with Benthic, by the names that settings give them."""


def find_reward(name: str) -> Reward:
    """One of :data:`REWARDS`, or a user's ``module:function``. Raises InputError that names what is allowed."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise InputError(f"reward {name!r}: must be one of {', '.join(REWARDS)}, or module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a user's module may do anything when it is imported
        raise InputError(f"reward {name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"reward {name!r}: {module} has no function {function}")
    reward: Reward = found
    return reward


def _of(problem: Problem, key: str) -> Any:
    if key not in problem:
        raise InputError(f"problem: has no {key!r}, which this reward needs; it has {', '.join(sorted(problem))}")
    return problem[key]


def _answers(problem: Problem) -> list[str]:
    answer = _of(problem, "answer")
    return [str(one) for one in (answer if isinstance(answer, list | tuple) else [answer])]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def is_reward(value: Any) -> bool:
    """Whether a reward's value is one that can be learned from: a number, and not an absurd one."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= LARGEST
