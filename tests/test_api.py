"""What ``import benthic`` offers: every option of the engine over a directory reaches the engine."""

import pytest
import torch

import benthic
from benthic.errors import InputError


@pytest.fixture(scope="module")
def greedy(served_model):
    def generate(**options):
        (completion,) = benthic.Engine(served_model, temperature=0.0, max_new_tokens=8, **options).generate("The sea")
        return completion

    return generate


@pytest.mark.parametrize("option", [{"precision": "int4"}, {"dtype": torch.bfloat16}])
def test_a_precision_changes_numbers(greedy, option):
    assert greedy(**option).logprobs != greedy().logprobs


def test_the_cache_is_kept_in_the_type_asked_for(served_model):
    half, full = (benthic.Engine(served_model, cache_precision=kept).stats() for kept in ("bf16", None))
    assert 2 * half.page_bytes == full.page_bytes


def test_no_drafts_where_none_are_asked_for(greedy):
    assert greedy(max_draft=0).drafted_tokens == 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"cache_gib": 0.0}, "cache_gib"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_draft": -1}, "max_draft"),
        ({"precision": "int3"}, "precision"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_a_wrong_option_is_refused(served_model, option, said):
    with pytest.raises(InputError, match=said):
        benthic.Engine(served_model, **option)
