"""Fault 14: rewards that raise, hang, print, end their process or return what is no number."""

import os
import time

import psutil
import pytest

from benthic.errors import InputError, WorkFailed
from benthic.posttrain.judge import Case, Judge, Weighted

_REWARDS = """
import math, os, sys, time

def good(prompt, answer, problem):
    print("a reward may print")
    return problem["worth"]

def bad(prompt, answer, problem):
    match problem["does"]:
        case "raises": raise ValueError("no\\nway")
        case "exits": sys.exit(3)
        case "ends": os._exit(3)
        case "hangs":
            if os.fork() == 0:
                time.sleep(600)
            while True: pass
        case "eats": return len(bytearray(1 << 33))
        case "nan": return math.nan
        case "inf": return math.inf
        case "huge": return 1e300
        case "text": return "1"
        case "none": return None
        case "fine": return 0.5
"""


@pytest.fixture
def user_rewards(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(_REWARDS)
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{path}")


_BAD = Weighted("user_rewards:bad")


def _case(*rewards, **problem):
    return Case("p", "a", problem, rewards)


@pytest.mark.usefixtures("user_rewards")
def test_trouble_is_counted_and_bounded_and_the_next_answer_is_judged():
    expected = {
        "raises": "raised", "exits": "raised", "ends": "ended", "hangs": "timed out", "eats": "raised",
        "nan": "not a number", "inf": "not a number", "huge": "not a number", "text": "not a number",
        "none": "not a number",
    }  # fmt: skip
    rewards = (Weighted("user_rewards:good", 2.0), _BAD)
    with Judge([reward.name for reward in rewards], seconds=2) as judge:
        for does, trouble in expected.items():
            verdict = judge.judge(_case(*rewards, worth=0.25, does=does))
            assert verdict.troubles == {"user_rewards:bad": trouble}, does
            assert verdict.value == 0.5
            assert "\n" not in verdict.why
            fine = judge.judge(_case(*rewards, worth=1, does="fine"))
            assert (fine.value, fine.troubles) == (2.5, {})


@pytest.mark.usefixtures("user_rewards")
def test_a_hang_ends_in_time_with_its_children():
    with Judge([_BAD.name], seconds=1) as judge:
        start = time.monotonic()
        judge.judge(_case(_BAD, does="hangs"))
        assert time.monotonic() - start < 10
        group = judge._worker._process.pid
    # Killed is not yet gone: that takes the machine a moment. The child would have slept for ten minutes.
    end = time.monotonic() + 30
    while _alive(group) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _alive(group)


def _alive(group):
    return [p for p in psutil.process_iter() if _group(p) == group and p.status() != psutil.STATUS_ZOMBIE]


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


@pytest.mark.usefixtures("user_rewards")
def test_where_nothing_can_be_judged_the_run_is_told_why():
    with Judge([_BAD.name], seconds=5) as judge:
        fine, raises = _case(_BAD, does="fine"), _case(_BAD, does="raises")
        assert [verdict.value for verdict in judge.judge_all([fine, raises])] == [0.5, 0]
        with pytest.raises(WorkFailed, match="none of 2 answers could be judged: user_rewards:bad: ValueError: no way"):
            judge.judge_all([raises, raises])


def test_a_reward_that_does_not_exist_is_refused_at_once():
    with pytest.raises(InputError, match="no_such"):
        Judge(["exact", "no_such"])


def test_any_text_comes_through():
    odd = 'line\nbreak \u2028 \x00 \ud7ff 😀 "quoted" \\'
    with Judge(["exact"]) as judge:
        assert judge.judge(Case(odd, odd, {"answer": odd.strip()}, [Weighted("exact")])).value == 1
