"""States that wait for an MTP module, beside a plain dictionary of positions."""

import random

import pytest
import torch
from torch import Tensor

from benthic.inference.job import Waiting


class ByPosition:
    """What should wait: consecutive positions, each with its own state."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def put(self, start: int, hidden_TD: Tensor) -> None:
        before = {position: state for position, state in self.states.items() if position < start}
        if start - 1 not in before:
            before = {}  # nothing may be missing in between
        self.states = before | dict(enumerate(hidden_TD, start))

    def drop(self, count: int) -> None:
        for position in sorted(self.states)[:count]:
            del self.states[position]


@pytest.mark.parametrize("seed", range(20))
def test_waiting_states_are_those_put_last_at_each_position(seed: int) -> None:
    draw, waiting, expected = random.Random(seed), Waiting(), ByPosition()
    for _ in range(60):
        if draw.random() < 0.6:
            start = max(0, waiting.end + draw.choice([-3, -1, 0, 0, 0, 2]))
            hidden_TD = torch.randn(draw.randint(1, 4), 3)
            waiting.put(start, hidden_TD)
            expected.put(start, hidden_TD)
        else:
            count = draw.randint(0, len(waiting))
            waiting.drop(count)
            expected.drop(count)
        assert len(waiting) == len(expected.states)
        assert [position for position in range(waiting.end + 5) if position in waiting] == sorted(expected.states)
        rows = waiting.first(len(waiting))
        assert all(torch.equal(a, b) for a, b in zip(rows, expected.states.values(), strict=True))
