"""Likelihoods against transformers' logits, taken one by one, and against themselves in other company."""

import copy
import random

import pytest
import torch

from benthic.errors import InputError, WorkFailed
from benthic.evaluate.likelihood import Passage, likelihoods, split, windows


def passages_of(seed, count, vocabulary=300, longest=90):
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(vocabulary) for _ in range(length)]

    return [Passage(ids(rng.randint(1, longest)), ids(rng.randint(1, 9))) for _ in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_transformers(small, peer, seed):
    passages = passages_of(seed, 12)
    for passage, found in zip(passages, likelihoods(small[0], passages), strict=True):
        ids = torch.tensor([[*passage.context, *passage.continuation]])
        logits = peer(ids)[0, len(passage.context) - 1 : -1].double()
        target = torch.tensor(passage.continuation)
        expected = float(logits.log_softmax(-1).gather(1, target[:, None]).sum())
        assert found.logprob == pytest.approx(expected, abs=2e-4)
        assert found.greedy == bool((logits.argmax(-1) == target).all())


@torch.no_grad()
def test_what_the_model_would_write_is_greedy(small, peer):
    ids = [5, 9, 200]
    for _ in range(4):
        ids.append(int(peer(torch.tensor([ids]))[0, -1].argmax()))
    yes, no = likelihoods(small[0], [Passage(ids[:3], ids[3:]), Passage(ids[:3], [*ids[3:6], (ids[6] + 1) % 300])])
    assert (yes.greedy, no.greedy) == (True, False)


def test_company_and_order_change_nothing(small, monkeypatch):
    passages = passages_of(7, 30)
    # Choices of one token share what is read before them.
    passages += [Passage(passages[0].context, [token]) for token in range(5)]
    together = likelihoods(small[0], passages)
    backwards = likelihoods(small[0], passages[::-1])[::-1]
    monkeypatch.setattr("benthic.evaluate.likelihood.TOKENS_AT_ONCE", 1)
    monkeypatch.setattr("benthic.evaluate.likelihood.LOGITS_AT_ONCE", 600)
    alone = [likelihoods(small[0], [passage])[0] for passage in passages]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert one.logprob == pytest.approx(third.logprob, abs=1e-4)
        assert other.logprob == pytest.approx(third.logprob, abs=1e-4)
        assert one.greedy == other.greedy == third.greedy


def test_all_next_tokens_together_are_certain(small):
    passages = [Passage([3, 1, 4], [token]) for token in range(small[0].config.vocab_size)]
    calls = []
    found = likelihoods(small[0], passages, lambda done, total: calls.append((done, total)))
    assert sum(torch.tensor([one.logprob for one in found]).exp()) == pytest.approx(1.0, abs=1e-5)
    assert sum(one.greedy for one in found) == 1
    assert calls == [(len(passages), len(passages))]  # read once


def test_nothing_to_score_is_certain(small):
    assert likelihoods(small[0], [Passage([1, 2], [])]) == [(0.0, True)]
    assert likelihoods(small[0], []) == []


def test_what_the_model_cannot_read(small):
    longest = small[0].config.max_position_embeddings
    likelihoods(small[0], [Passage([1] * longest, [2])])
    with pytest.raises(InputError, match=f"{longest + 1} tokens .* takes {longest}"):
        likelihoods(small[0], [Passage([1] * longest, [2, 3])])
    with pytest.raises(InputError, match="at least one token"):
        likelihoods(small[0], [Passage([], [2, 3])])


def test_weights_that_are_no_numbers(small):
    model = copy.deepcopy(small[0])
    model.transformer.norm.weight.data[:] = float("nan")
    with pytest.raises(WorkFailed, match="not finite"):
        likelihoods(model, [Passage([1], [2])])


def test_a_text_and_what_follows_is_read_as_one(small):
    tokenizer = small[1]
    pairs = [("hello there,", " how"), ("hello ", "there"), ("", "x"), ("I am\n\n", "well"), ("a", "b")]
    for context, continuation in pairs:
        first, second = split(tokenizer, context, continuation)
        assert tokenizer.decode([*first, *second]) == context + continuation
    assert split(tokenizer, "hello ", "there") == split(tokenizer, "hello", " there")


def test_a_token_that_reaches_across_is_not_used(small):
    tokenizer = small[1]
    assert len(tokenizer.encode("hello")) < len(tokenizer.encode("hel")) + len(tokenizer.encode("lo"))
    assert split(tokenizer, "hel", "lo") == (tokenizer.encode("hel"), tokenizer.encode("lo"))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 30])
@pytest.mark.parametrize("length", [1, 8])
def test_windows_are_those_of_lm_eval(count, length):
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 100 + count))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 1, length, 1))
    ours = list(windows(ids, 1, length))
    assert [(list(context), list(after)) for context, after in ours] == list(theirs)
    assert [token for passage in ours for token in passage.continuation] == ids
