"""Whether a text answers a question: pure functions, shared by evaluation and by rewards.

Texts come from a model and may hold anything: whatever they hold, the answer comes after bounded work. Only
:func:`reasoning_gym` is as bounded as that library's scorers are; :mod:`benthic.evaluate.scorer` calls it in a process
of its own.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import regex as timed_regex

from benthic.errors import InputError, MissingExtra

MAX_PATTERN = 4096
"""Characters of the longest regular expression that is taken."""
SECONDS_A_PATTERN = 1.0
"""A regular expression that has not found its place by then has found none: some take time exponential in a text."""
END_OF_REASONING = "</think>"

# The bounds keep the arithmetic on what a model writes finite: no number has thousands of digits.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3}){1,30}|\d{1,100})(?:\.\d{1,100})?|\.\d{1,100})(?:[eE][-+]?\d{1,3})?(?!\d)"
)


def after_reasoning(text: str) -> str:
    """What follows the last reasoning section, as DeepSeek-R1 writes it; all of a text without one."""
    return text.rpartition(END_OF_REASONING)[2]


def extracted(text: str, pattern: str) -> str | None:
    """The last place where ``pattern`` matches: its first group, or all of it without one; None where there is none."""
    expression = compiled(pattern)
    last: str | None = None
    try:
        for found in expression.finditer(text, timeout=SECONDS_A_PATTERN):
            last = found[1 if expression.groups else 0]
    except TimeoutError:
        return None
    return last


def exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the text is one of ``answers``, however white space is spread."""
    return _plain(text) in map(_plain, answers)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of ``answers`` stands in the text as whole words: 1 does not stand in 21."""
    plain = _plain(text)
    return any(_stands_in(_plain(answer), plain) for answer in answers)


def regex(text: str, answers: Sequence[str]) -> bool:
    """Whether one of ``answers``, regular expressions, is found in the text; ``^`` and ``$`` bind it to the ends.

    Raises:
        InputError: an expression is wrong or too long.
    """
    try:
        return any(compiled(pattern).search(text.strip(), timeout=SECONDS_A_PATTERN) for pattern in answers)
    except TimeoutError:
        return False


def numeric(text: str, answers: Sequence[str], *, tolerance: float = 0.0) -> bool:
    """Whether the last number in the text is one of ``answers``: ``1,000.0`` is ``1000`` is ``1e3``.

    Args:
        text: any.
        answers: numbers.
        tolerance: how far it may be off, as a share of the answer.

    Raises:
        InputError: an answer is no number.
    """
    found = last_number(text)
    if found is None:
        return False
    return any(_near(found, number_of(answer), tolerance) for answer in answers)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, with a sign, thousands' commas, a fraction and an exponent where it has them."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def number_of(answer: str) -> Decimal:
    """The number that an answer is; raises ``InputError`` if it is none."""
    if (match := _NUMBER.fullmatch(answer.strip())) is None:
        raise InputError(f"{answer!r} is no number, such as 12, -0.5 or 1e3")
    return Decimal(match[0].replace(",", ""))


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> Any:
    """A regular expression whose matching can be given a time limit; raises ``InputError`` if it is none."""
    if len(pattern) > MAX_PATTERN:
        raise InputError(f"a regular expression of {len(pattern)} characters; at most {MAX_PATTERN} are taken")
    try:
        return timed_regex.compile(pattern)
    except timed_regex.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from None


VERIFIERS: Mapping[str, Callable[[str, Sequence[str]], bool]] = {
    "exact": exact, "numeric": numeric, "contains": contains, "regex": regex,
}  # fmt: skip
"""What compares a text with answers, by the name that task files have for it."""


def reasoning_gym(family: str, text: str, entry: Mapping[str, Any]) -> float:
    """What the scorer of a reasoning-gym family gives a text, from 0 to 1; text that it chokes on scores 0.

    Some scorers evaluate the text as an expression, which may take any time and do anything: call this where that
    does no harm.

    Args:
        family: such as ``chain_sum``.
        text: the answer alone.
        entry: the problem as the library makes it, with ``answer`` and ``metadata``; JSON's lists do for tuples.

    Raises:
        InputError: there is no such family.
        MissingExtra: the library is not there.
    """
    try:
        score = float(_scorer(family)(text, entry))
    except InputError:
        raise
    except Exception:  # of any kind, out of 105 parsers
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def families() -> list[str]:
    """Names of reasoning-gym's families of problems. Raises ``MissingExtra``."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingExtra("reasoning-gym", "rl") from None
    return sorted(DATASETS)


@functools.lru_cache(maxsize=128)
def _scorer(family: str) -> Callable[[str, Mapping[str, Any]], float]:
    if family not in families():
        raise InputError(f"reasoning-gym has no family {family!r}")
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[[str, Mapping[str, Any]], float] = get_score_answer_fn(family)
    return scorer


def _plain(text: str) -> str:
    return " ".join(text.split())


def _stands_in(answer: str, text: str) -> bool:
    before = r"(?<!\w)" if answer[:1].isalnum() else ""
    after = r"(?!\w)" if answer[-1:].isalnum() else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def _near(found: Decimal, answer: Decimal, tolerance: float) -> bool:
    return found == answer or abs(float(found) - float(answer)) <= tolerance * abs(float(answer))
