"""Rewards one by one."""

import doctest
import json

import pytest

from benthic.errors import InputError
from benthic.posttrain import rewards
from benthic.posttrain.rewards import exact, final_answer, find_reward, json_schema, numeric, reasoning


def test_examples_in_docstrings():
    found = doctest.testmod(rewards)
    assert found.attempted >= 6
    assert not found.failed


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("4", "4"),
        (" 4\n", "4"),
        ("<think>2+2</think>4", "4"),
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>never ends 4", ""),
        ("no opening</think> 4", "4"),
        ("", ""),
    ],
)
def test_final_answer(answer, final):
    assert final_answer(answer) == final


@pytest.mark.parametrize(("answer", "value"), [("4", 1), (" 4 ", 1), ("44", 0), ("4.", 0), ("", 0), ("<think>4", 0)])
def test_exact(answer, value):
    assert exact("", answer, {"answer": "4"}) == value


def test_exact_takes_numbers_too():
    assert exact("", "4", {"answer": 4}) == 1


def test_any_of_several_answers_will_do():
    assert exact("", "two", {"answer": ["2", "two"]}) == 1
    assert exact("", "three", {"answer": ["2", "two"]}) == 0


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("12", 12, 1),
        ("It is 3, no, 4.", 4, 1),
        ("It is 3, no, 4.", 3, 0),
        ("-1,250.50 dollars", "-1250.5", 1),
        ("none", 0, 0),
        ("<think>7</think> 8", 7, 0),
        ("<think>7", 7, 0),
    ],
)
def test_numeric(answer, expected, value):
    assert numeric("", answer, {"answer": expected}) == value


def test_numeric_within_a_tolerance():
    assert numeric("", "0.3333", {"answer": "0.3334", "tolerance": 1e-3}) == 1
    assert numeric("", "0.3333", {"answer": "0.3334"}) == 0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<think>so</think>4", 1),
        ("\n<think>so</think>\n4", 1),
        ("<think></think>4", 0),
        ("<think> </think>4", 0),
        ("<think>so</think>", 0),
        ("<think>so</think>4</think>", 0),
        ("<think><think>so</think>4", 0),
        ("4", 0),
        ("so <think>so</think>4", 0),
        ("</think>4<think>", 0),
    ],
)
def test_reasoning(answer, value):
    assert reasoning("", answer, {}) == value


_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"n": 1}', 1),
        ('<think>one</think>\n{"n": 1}', 1),
        ('```json\n{"n": 1}\n```', 1),
        ('```\n{"n": 1}\n```', 1),
        ('{"n": "1"}', 0),
        ('{"n": 1, "m": 2}', 0),
        ('{"n": NaN}', 0),
        ('{"n": 1} and more', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_schema(answer, value):
    assert json_schema("", answer, {"schema": _SCHEMA}) == value


def test_a_reference_to_elsewhere_is_not_followed():
    with pytest.raises(Exception, match="example"):
        json_schema("", "{}", {"schema": {"$ref": "http://example.invalid/schema.json"}})


def test_reasoning_gym_scores_its_own_answers():
    gym = pytest.importorskip("reasoning_gym")
    for family in ("chain_sum", "spell_backward", "gcd", "letter_counting"):
        entry = json.loads(json.dumps(gym.create_dataset(family, seed=3, size=2)[1]))
        assert rewards.reasoning_gym(entry["question"], f"<think>hm</think> {entry['answer']}", entry) == 1
        assert rewards.reasoning_gym(entry["question"], "what?", entry) < 0.5


@pytest.mark.parametrize(
    ("reward", "problem", "missing"),
    [
        ("exact", {}, "answer"),
        ("numeric", {"answer": "four"}, "four"),
        ("json_schema", {"schema": {"type": "strong"}}, "JSON Schema"),
        ("code", {"tests": []}, "tests"),
        ("code", {"tests": [{}]}, "stdout"),
        ("code", {"tests": [{"stdout": ""}], "limits": {"speed": 1}}, "speed"),
        ("reasoning_gym", {"metadata": {}}, "source_dataset"),
        ("reasoning_gym", {"metadata": {"source_dataset": "no_such"}}, "no_such"),
    ],
)
def test_a_problem_that_lacks_something_is_a_mistake(reward, problem, missing):
    if reward == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    answers = {"code": "```python\n1\n```", "numeric": "4"}
    with pytest.raises(InputError, match=missing):
        find_reward(reward)("", answers.get(reward, "{}"), problem)


def test_a_users_reward_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(prompt, answer, problem):\n    return -len(answer)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_reward("my_rewards:short")("", "four", {}) == -4


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("exakt", "must be one of code, exact"),
        ("no_such_module:f", "importing no_such_module failed"),
        ("json:no_such", "json has no function no_such"),
        (":f", "must be one of"),
    ],
)
def test_a_reward_that_is_none_is_refused(name, told):
    with pytest.raises(InputError, match=told):
        find_reward(name)
