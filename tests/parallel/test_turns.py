"""Two passes in turns: in what order they run, and how they end."""

import threading

import pytest

from benthic.parallel.turns import Turns


def interleaved(first, second):
    """What two passes do, which hand over after each of so many things."""
    turns, done = Turns(), []

    def run(name, count):
        for number in range(count):
            done.append(f"{name}{number}")
            turns.hand_over()
        done.append(f"{name} ends")

    turns.run(lambda: run("a", first), lambda: run("b", second))
    return " ".join(done)


def test_each_runs_where_the_other_hands_over():
    assert interleaved(2, 2) == "a0 b0 a1 b1 a ends b ends"
    assert interleaved(3, 1) == "a0 b0 a1 b ends a2 a ends"
    assert interleaved(1, 3) == "a0 b0 a ends b1 b2 b ends"
    assert interleaved(2, 0) == "a0 b ends a1 a ends"
    assert interleaved(0, 2) == "a ends b0 b1 b ends"


def test_one_alone_goes_on():
    turns = Turns()
    turns.hand_over()
    turns.run(turns.hand_over, turns.hand_over)
    turns.hand_over()


@pytest.mark.parametrize("who", ["first", "second"])
def test_what_one_raises_comes_out_and_the_other_goes_no_further(who):
    turns, done = Turns(), []

    def run(name):
        turns.hand_over()
        done.append(name)
        if name == who:
            raise ValueError(name)
        turns.hand_over()
        done.append("message")
        raise RuntimeError("a consequence")

    with pytest.raises(ValueError, match=who):
        turns.run(lambda: run("first"), lambda: run("second"))
    assert done == ["first", "second"][: 1 + (who == "second")]
    turns.hand_over()
    turns.run(lambda: done.append("again"), lambda: done.append("and again"))
    assert done[-2:] == ["again", "and again"]


def test_a_pass_that_has_not_begun_does_not_begin_after_the_other_has_raised():
    turns, done = Turns(), []
    with pytest.raises(ZeroDivisionError):
        turns.run(lambda: 1 / 0, lambda: done.append("second"))
    assert not done


def test_it_may_be_handed_over_from_a_thread_of_another():
    turns, done = Turns(), []

    def second():
        thread = threading.Thread(target=lambda: (done.append(1), turns.hand_over(), done.append(3)))
        thread.start()
        thread.join()

    turns.run(lambda: (done.append(0), turns.hand_over(), done.append(2)), second)
    assert done == [0, 1, 2, 3]
