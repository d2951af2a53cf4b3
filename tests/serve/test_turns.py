"""Turns in the event loop, counted by rounds of the loop."""

import asyncio
from collections import Counter

from benthic.serve.turns import Turns


class Rounds:
    """Counts the event loop's rounds."""

    def __init__(self):
        self.now = 0
        self._again()

    def _again(self):
        self.now += 1
        self._next = asyncio.get_running_loop().call_soon(self._again)

    def stop(self):
        self._next.cancel()


async def crowd(count, cancelled=()):
    """The round in which each of a crowd goes on, in the order they do."""
    rounds, turns, went_on = Rounds(), Turns(), []

    async def one(number):
        await turns.take()
        went_on.append((number, rounds.now))

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    await asyncio.sleep(0)
    for number in cancelled:
        tasks[number].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    rounds.stop()
    return went_on


def test_few_of_a_crowd_go_on_in_each_round_and_in_order():
    went_on = asyncio.run(crowd(200))
    assert [number for number, _ in went_on] == list(range(200))
    assert max(Counter(now for _, now in went_on).values()) == 4
    assert went_on[-1][1] < 120  # nor does it take long


def test_who_gives_up_does_not_hold_up_the_others():
    gone = [0, 3, 7, *range(20, 60)]
    went_on = asyncio.run(crowd(80, gone))
    assert [number for number, _ in went_on] == [number for number in range(80) if number not in gone]


def test_one_alone_goes_on_in_the_next_round():
    ((_, now),) = asyncio.run(crowd(1))
    assert now <= 3
