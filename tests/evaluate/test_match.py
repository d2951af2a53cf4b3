"""Whether a text answers a question, by cases, against plain Python, and with texts made to take for ever."""

import random
import time
from decimal import Decimal

import pytest

from benthic.errors import InputError
from benthic.evaluate import match


@pytest.mark.parametrize(("text", "answers", "right"), [
    (" 42\n", ["42"], True), ("4 2", ["42"], False), ("a  b", ["a b"], True), ("A", ["a"], False),
    ("no", ["yes", "no"], True), ("", ["x"], False), ("", [""], True),
])  # fmt: skip
def test_exact(text, answers, right):
    assert match.exact(text, answers) is right


@pytest.mark.parametrize(("text", "answers", "right"), [
    ("it is 1.", ["1"], True), ("it is 21", ["1"], False), ("21 or 1", ["1"], True),
    ("Paris, France", ["paris"], False),
    ("in Paris,\nFrance", ["Paris, France"], True), ("x=(a+b)*c", ["(a+b)"], True), ("über", ["ber"], False),
])  # fmt: skip
def test_contains(text, answers, right):
    assert match.contains(text, answers) is right


@pytest.mark.parametrize(("text", "answer", "right"), [
    ("so 1,000 is it", "1000", True), ("1000.0", "1e3", True), ("it is -4.", "-4", True), ("7-4", "4", True),
    ("first 3, then 12", "3", False), ("10kg", "10", True), ("x2", "2", False), ("none", "0", False),
    ("-.5", "-0.5", True), ("1,2,3", "3", True), ("123456789", "123456790", False), ("3.14", "3.14159", False),
    ("9" * 5000, "9", False), ("1e999", "1e998", False), ("5\n", " 5 ", True),
])  # fmt: skip
def test_numeric(text, answer, right):
    assert match.numeric(text, [answer]) is right


def test_numeric_within_a_tolerance():
    assert match.numeric("3.14", ["3.14159"], tolerance=0.001)
    assert not match.numeric("3.14", ["3.14159"], tolerance=0.0001)
    assert not match.numeric("1e999", ["1e-999"], tolerance=0.5)


@pytest.mark.parametrize("seed", range(5))
def test_the_last_number_is_the_one_that_was_written(seed):
    rng = random.Random(seed)
    for _ in range(200):
        value = rng.choice([rng.randrange(-(10**9), 10**9), round(rng.uniform(-1e4, 1e4), rng.randrange(1, 6))])
        written = rng.choice([f"{value}", f"{value:,}"])
        text = f"{rng.random()} words {written}{rng.choice(['', '.', ' apples', '%', ')'])}"
        assert match.last_number(text) == Decimal(str(value)), text


@pytest.mark.parametrize("answer", ["", "x", "1 2", "1..2", "--1", "9" * 101])
def test_an_answer_that_is_no_number(answer):
    with pytest.raises(InputError, match="is no number"):
        match.numeric("1", [answer])


def test_regular_expressions():
    assert match.regex(" Answer: 12 ", [r"^answer: \d+$", r"(?i)^answer: \d+$"])
    assert not match.regex("Answer: x", [r"\d"])
    for wrong in ("(", "a" * 5000):
        with pytest.raises(InputError, match="regular expression"):
            match.regex("x", [wrong])


def test_an_expression_that_would_take_for_ever_is_cut_short(monkeypatch):
    monkeypatch.setattr(match, "SECONDS_A_PATTERN", 0.1)
    begun = time.monotonic()
    assert not match.regex("a" * 60 + "b", [r"^(?:a|a|aa)+$"])
    assert match.extracted("a" * 60 + "b", r"^(?:a|a|aa)+$") is None
    assert time.monotonic() - begun < 30


def test_what_is_extracted():
    assert match.extracted("<a>1</a> <a>2</a>", "<a>(.*?)</a>") == "2"
    assert match.extracted("x 12 y 34", r"\d+") == "34"
    assert match.extracted("none", r"\d+") is None
    assert match.after_reasoning("<think>a</think>b") == "b"
    assert match.after_reasoning("no section") == "no section"


def test_reasoning_gym_scores_as_the_library_does():
    library = pytest.importorskip("reasoning_gym")
    for family in ("chain_sum", "gcd", "spell_backward"):
        problems = library.create_dataset(family, size=20, seed=3)
        for problem in problems:
            assert match.reasoning_gym(family, problem["answer"], problem) == 1.0
            for text in ("", "zzz", problem["answer"] + " or so"):
                assert match.reasoning_gym(family, text, problem) == pytest.approx(problems.score_answer(text, problem))


def test_reasoning_gym_with_entries_it_cannot_use():
    pytest.importorskip("reasoning_gym")
    assert match.reasoning_gym("gsm_symbolic", "1", {}) == 0.0
    with pytest.raises(InputError, match="no family 'chain'"):
        match.reasoning_gym("chain", "1", {"answer": "1"})
