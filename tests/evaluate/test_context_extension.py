"""Context extension's figures against by-position figures and the scores of models known to be good or bad at it."""

import math

import pytest
import torch
from torch.nn import functional as F

from benthic.errors import InputError
from benthic.evaluate.context_extension import as_long, by_position, read
from benthic.evaluate.likelihood import Passage, likelihoods
from benthic.evaluate.multiple_choice import multiple_choice
from benthic.evaluate.retrieval import COLOURS, DEPTHS, lengths_from, retrieval, retrieval_problems
from benthic.evaluate.task_files import ChoiceSettings, Task

FILLER = "hello there I am well thank you how are you today " * 200


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(300, (6, 33), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_figures_are_means_over_their_positions(small, sequences):
    model = small[0]
    told = []
    found = by_position(read(model, sequences, 8, lambda done, total: told.append((done, total))), 2.5)
    assert told == [(number, 6) for number in range(1, 7)]

    def bits(start, first, last):
        logits = model(sequences[:, start:-1]).transpose(1, 2)
        nats = F.cross_entropy(logits, sequences[:, start + 1 :], reduction="none")
        return float(nats[:, first:last].mean()) / math.log(2) / 2.5

    for score, expected in [(found.within, bits(0, 0, 8)), (found.beyond, bits(0, 16, 32)),
                            (found.last_read_long, bits(0, 28, 32)),
                            (found.last_read_short, bits(24, 4, 8))]:  # fmt: skip
        assert score.value == pytest.approx(expected, rel=1e-5)
        assert score.ci95[0] < score.value < score.ci95[1]


@torch.no_grad()
def test_a_longer_model_has_the_same_weights(small):
    model = small[0]
    longest = model.config.max_position_embeddings
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(1))
    plain, yarn = as_long(model, 4 * longest, yarn=False), as_long(model, 4 * longest, yarn=True)
    assert torch.equal(plain(tokens), model(tokens))
    assert not torch.allclose(yarn(tokens), model(tokens), atol=1e-3)
    assert yarn.config.rope_scaling.factor == 4
    assert yarn.config.rope_scaling.original_max_position_embeddings == longest
    assert model.config.max_position_embeddings == longest
    assert as_long(yarn, 2 * longest, yarn=True).config.rope_scaling.factor == 2
    likelihoods(plain, [Passage([1] * (longest + 1), [2])])


@pytest.mark.parametrize("length", [64, 200])
def test_the_fact_stands_at_its_depth_in_a_full_text(small, length):
    tokenizer = small[1]
    problems = retrieval_problems(tokenizer, FILLER, length=length, count=20, seed=3)
    assert retrieval_problems(tokenizer, FILLER, length=length, count=20, seed=3) == problems
    assert retrieval_problems(tokenizer, FILLER, length=length, count=20, seed=4) != problems
    for number, problem in enumerate(problems):
        answer = problem.choices[problem.answer]
        question = problem.prompt[problem.prompt.rindex("The colour of the ") :]
        assert problem.prompt.count(question) == 2
        assert problem.prompt.count(f"{question}{answer}.") == 1
        longest = max(len(tokenizer.encode(choice)) for choice in problem.choices)
        used = 1 + len(tokenizer.encode(problem.prompt)) + longest
        assert length - 12 <= used <= length
        before, after = problem.prompt.removesuffix(question).split(f"{question}{answer}.")
        filled = len(before.split()) + len(after.split())
        assert len(before.split()) / filled == pytest.approx(DEPTHS[number % 5], abs=0.6 / filled)


def test_what_there_is_no_room_for(small):
    with pytest.raises(InputError, match="length=20: too short"):
        retrieval_problems(small[1], FILLER, length=20, count=1)
    with pytest.raises(InputError, match=r"filler: .* needs"):
        retrieval_problems(small[1], "a few words", length=200, count=1)


def test_retrieval_is_multiple_choice_by_length(small, tmp_path):
    assert lengths_from(64) == (64, 128, 256)
    scores = retrieval(*small, FILLER, lengths=(64, 128), count=16)
    problems = retrieval_problems(small[1], FILLER, length=128, count=16)
    task = Task("x", tmp_path, ChoiceSettings(), tuple(problems), tuple(range(16)))
    assert scores[128] == multiple_choice(*small, task, lambda done, total: None)[0]
    assert len(COLOURS) == len(set(COLOURS)) == 8
