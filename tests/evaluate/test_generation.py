"""What becomes of answers: pass@k against every way to draw, verifiers, and a process that scores and cannot be led."""

import itertools
import math
import random
import statistics
import time

import pytest

from benthic.errors import WorkFailed
from benthic.evaluate import scorer as scorer_module
from benthic.evaluate.generation import judge, pass_at_k
from benthic.evaluate.scorer import Scorer
from benthic.evaluate.task_files import Question, QuestionSettings


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [True] * right + [False] * (samples - right)
        draws = [any(draw) for draw in itertools.combinations(outcomes, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(statistics.mean(draws), abs=1e-12)


def test_pass_at_k_of_many_samples():
    for samples, right, k in [(10_000, 3, 100), (10_000, 9_990, 11), (10_000, 0, 10_000), (200, 199, 1)]:
        expected = 1 - math.comb(samples - right, k) / math.comb(samples, k)
        assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-10)


def test_pass_at_k_is_without_bias():
    rng, chance, k = random.Random(0), 0.15, 3
    found = [pass_at_k(6, sum(rng.random() < chance for _ in range(6)), k) for _ in range(20_000)]
    assert statistics.mean(found) == pytest.approx(1 - (1 - chance) ** k, abs=0.01)


@pytest.mark.parametrize(("question", "settings", "text", "score"), [
    ({"answer": "4"}, {}, "<think>2+2 is 5?</think>\n4 ", 1), ({"answer": "4"}, {}, "it is 4", 0),
    ({"answer": "4", "verifier": "contains"}, {}, "it is 4.", 1),
    ({"answer": 4, "verifier": "numeric"}, {}, "4.1", 0),
    ({"answer": 4, "verifier": "numeric"}, {"tolerance": 0.05}, "4.1", 1),
    ({"answer": "^4", "verifier": "regex"}, {}, "44", 1),
    ({"answer": "4"}, {"extract": "<answer>(.*?)</answer>"}, "<answer>3</answer> no, <answer> 4</answer>", 1),
    ({"answer": ""}, {"extract": "<answer>(.*?)</answer>"}, "none", 0),
])  # fmt: skip
def test_what_is_judged(question, settings, text, score):
    with Scorer() as scorer:
        answer = judge(Question(prompt="", **question), text, QuestionSettings(**settings), scorer)
    assert (answer.text, answer.score) == (text, score)


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


def test_the_process_scores_as_the_library_does(gym):
    with Scorer() as scorer:
        for family in ("chain_sum", "countdown", "spell_backward"):
            problems = gym.create_dataset(family, size=5, seed=3)
            for problem in problems:
                for text in (problem["answer"], "", "12", "a\nb", problem["answer"] + "!"):
                    assert scorer.score(family, text, problem) == pytest.approx(problems.score_answer(text, problem))
        assert scorer.failures == 0


def test_an_answer_that_would_take_for_ever_scores_nothing(gym, monkeypatch):
    monkeypatch.setattr(scorer_module, "SECONDS_AN_ANSWER", 3.0)
    problem = gym.create_dataset("countdown", size=1, seed=1)[0]
    with Scorer() as scorer:
        begun = time.monotonic()
        assert scorer.score("countdown", "9**9**9**9", problem) < 1
        assert time.monotonic() - begun < 60
        assert scorer.failures == 1
        assert scorer.score("countdown", problem["answer"], problem) == 1.0


def test_an_answer_cannot_speak_for_the_process_or_write(gym, tmp_path):
    problem = gym.create_dataset("countdown", size=1, seed=1)[0]
    file = tmp_path / "mine"
    attacks = ["print(1.0)", "__import__('os').write(1, b'1.0\\n')", f"open({str(file)!r}, 'w').write('x' * 99)",
               f"__import__('pathlib').Path({str(file)!r}).write_text('x')", "__import__('os')._exit(0)",
               "[0]*10**10"]  # fmt: skip
    with Scorer() as scorer:
        for attack in attacks:
            assert scorer.score("countdown", attack, problem) < 1, attack
        assert scorer.score("countdown", problem["answer"], problem) == 1.0
    assert not file.exists() or file.read_text() == ""


def test_a_process_that_does_not_start(monkeypatch):
    monkeypatch.setattr(scorer_module, "SECONDS_TO_START", 0.0)
    with Scorer() as scorer, pytest.raises(WorkFailed, match="does not start"):
        scorer.score("chain_sum", "1", {})
