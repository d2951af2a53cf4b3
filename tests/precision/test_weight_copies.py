"""FP8 copies of weights: one for a step, a new one as soon as a weight has changed, none that outlives the step."""

import pytest
import torch

from benthic.precision import weight_copies
from benthic.precision.fp8 import quantise
from benthic.precision.weight_copies import copies_of_step, quantised_once


def same(found, expected):
    return torch.equal(found.dequantised(), expected.dequantised())


def test_a_step_has_one_copy_of_each_weight():
    weights = [torch.randn(5, 130, requires_grad=True), torch.randn(2, 140, 3, requires_grad=True)]
    with quantised_once() as copies:
        first = [copies_of_step()(weight) for weight in weights]
        for weight, copy in zip(weights, first, strict=True):
            assert copies_of_step()(weight) is copy
            assert same(copy, quantise(weight))
        assert copies.nbytes == 5 * 130 + 4 * 2 + 2 * 140 * 3 + 4 * 2 * 2
    assert copies.nbytes == 0


def test_a_weight_that_changes_gets_a_new_copy():
    weight = torch.randn(5, 130, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.5, foreach=True)
    with quantised_once() as copies:
        before = copies(weight)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        after = copies(weight)
        assert not same(after, before)
        assert same(after, quantise(weight))
        assert copies(weight) is after


def test_what_has_no_gradients_is_not_kept_but_shares_what_is():
    weight, other = torch.randn(5, 130), torch.randn(6, 4)
    with quantised_once() as copies:
        kept = copies(weight)
        with torch.no_grad():
            assert copies(weight) is kept
            assert copies(other) is not copies(other)


def test_nothing_outlives_a_step_even_one_that_fails():
    weight, found = torch.randn(5, 130), []

    def fail():
        with quantised_once() as copies:
            found.extend((copies, copies(weight)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    copies, first = found
    assert copies(weight) is not first
    assert copies(weight) is not copies(weight)
    assert copies_of_step() is not copies
    assert weight_copies._OF_STEP.get() is None
    assert copies_of_step()(weight) is not copies_of_step()(weight)


def test_a_step_within_another_has_copies_of_its_own():
    weight = torch.randn(5, 130)
    with quantised_once() as outer:
        copy = outer(weight)
        with quantised_once():
            assert copies_of_step()(weight) is not copy
        assert copies_of_step()(weight) is copy
