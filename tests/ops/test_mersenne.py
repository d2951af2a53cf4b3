"""A generator set further on draws what one draws that has come there word by word."""

import pytest
import torch

from benthic.ops.mersenne import jump, pass_over


def after(seed: int, used: int) -> torch.Generator:
    """A generator that has drawn so many words."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty(used).uniform_(generator=generator)
    return generator


def following(generator: torch.Generator) -> list[float]:
    """Enough to have come from several states of the twister."""
    return torch.empty(2000).uniform_(generator=generator).tolist()


@pytest.mark.parametrize("go", [jump, pass_over])
@pytest.mark.parametrize("words", [1, 2, 226, 227, 623, 624, 625, 1248, 19937, 10**6 + 7])
@pytest.mark.parametrize(("seed", "used"), [(0, 0), (1, 1), (2**63, 623), (7, 624), (7, 625), (5, 3000)])
def test_the_words_that_follow_are_the_same(go, seed, used, words):
    generator = after(seed, used)
    go(generator, words)
    assert following(generator) == following(after(seed, used + words))


def test_far_jumps_add_up():
    """Two of 2^39 words and one that is as far as both and one word more, by which the third falls short."""
    one, other = after(3, 10), after(3, 10)
    pass_over(one, 2**39)
    pass_over(one, 2**39 + 5)
    pass_over(other, 2**40)
    pass_over(other, 5)
    assert following(one) == following(other) != following(after(3, 15))


def test_numbers_kept_for_later_stay():
    """torch draws a few numbers in pairs, and keeps the second."""
    one, other = after(1, 0), after(1, 0)
    first = [torch.empty(3).normal_(generator=generator) for generator in (one, other)]
    jump(one, 100)
    torch.empty(100).uniform_(generator=other)
    assert torch.equal(*first)
    assert torch.equal(torch.empty(3).normal_(generator=one), torch.empty(3).normal_(generator=other))
