import random

import pytest
import torch

from benthic.inference.pace import Pace
from benthic.inference.request import Sampling
from benthic.inference.sampling import distribution
from benthic.inference.scheduler import Scheduler
from benthic.model import build_model
from benthic.model.transformer import attention_context


class Always(Pace):
    """Drafts as far as it may."""

    def depths(self, requests, rows):
        return [cap if acceptance else 0 for acceptance, cap in requests]


@pytest.fixture(scope="module", params=[1, 2])
def model(request, config):
    return build_model(
        config.model_copy(update={"max_position_embeddings": 512, "num_nextn_predict_layers": request.param}), seed=5
    )


def build(model, tokenizer, max_draft=0, cache_gib=0.05):
    scheduler = Scheduler(model, tokenizer, cache_gib=cache_gib, max_batch=64, max_draft=max_draft)
    scheduler.speculation.pace = Always(max_draft)
    return scheduler


def run(scheduler, *work):
    requests = [scheduler.submit(prompt, sampling) for prompt, sampling in work]
    while not all(request.done for request in requests):
        scheduler.step()
    return [request.result for request in requests]


def greedy_drafts_in_full(model, ids, depth):
    """What the modules guess after ``ids``, by reading everything anew, without a cache."""
    drafts = []
    with torch.inference_mode():
        for module in range(depth):
            if module < len(model.mtp):
                states, _ = model.training_hidden(_padded(model, ids + drafts, module))
                hidden_TD = states[module + 1][0, : len(ids) - 1]
            else:  # the last module again: its own output stands for the next position's state
                hidden_TD = _repeated(model, ids, drafts)
            drafts.append(int(model.transformer.head(hidden_TD[-1]).argmax()))
    return drafts


def _padded(model, ids, module):
    """``training_hidden`` wants a token for each module; those of later modules do not matter to this one."""
    return torch.tensor([ids + [0] * (len(model.mtp) - module - 1)])


def _repeated(model, ids, drafts):
    """States of the last module at all positions, with its own output for the states that are not known yet."""
    states, _ = model.training_hidden(_padded(model, ids + drafts, len(drafts)))
    depth, known = len(model.mtp), len(ids) - 1
    inputs = list(states[depth - 1][0, :known])
    for _ in range(len(drafts) - depth + 2):
        hidden_TD = torch.stack(inputs)
        tokens = torch.tensor([(ids + drafts)[depth : depth + len(inputs)]])
        out_TD = _module_in_full(model, depth - 1, hidden_TD, tokens)
        inputs.append(out_TD[-1])
    return out_TD


def _module_in_full(model, module, hidden_TD, tokens_BT):
    embedding = model.transformer.embed(tokens_BT)
    return model.mtp[module](hidden_TD[None], embedding, attention_context(model.config, tokens_BT))[0][0]


@pytest.mark.parametrize("length", [1, 2, 40, 64, 100])
def test_drafts_are_those_of_the_modules_over_the_whole_text(model, tokenizer, length, monkeypatch):
    """Depth 3: the modules in turn, and the last repeated; after a prompt, decoding, and a shared beginning.

    Drafts are made in the step itself where there is one module, and before it where there are two.
    """
    monkeypatch.setattr("benthic.inference.decode._DRAFT_PRECISION", None)
    prompt = [random.Random(length).randrange(280) for _ in range(length)]
    scheduler = build(model, tokenizer, max_draft=3)
    stepping = scheduler._stepping
    decode, checked = stepping._decode, []

    def checking(jobs, rows, ahead):
        known = [list(job.ids) for job in jobs]
        decoded = decode(jobs, rows, ahead)
        assert (ahead is None) == (len(model.mtp) == 2 or len(rows[0]) == 1)
        start = 0
        for ids, row in zip(known, rows, strict=True):
            depth = len(row) - 1
            assert decoded.tokens_B[start + 1 : start + len(row)] == greedy_drafts_in_full(model, ids, depth)
            checked.append(depth)
            start += len(row)
        return decoded

    stepping._decode = checking
    sampling = Sampling(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    run(scheduler, (prompt, sampling))
    run(scheduler, ([*prompt, 3], sampling))
    assert sum(checked) > 40


def test_greedy_text_and_log_probabilities_are_the_same_with_drafts(model, tokenizer):
    rng = random.Random(0)
    work = [
        ([rng.randrange(280) for _ in range(rng.choice([1, 64, 90]))],
         Sampling(temperature=0.0, max_new_tokens=30, ignore_eos=True))
        for _ in range(4)
    ]  # fmt: skip
    with_drafts, without = run(build(model, tokenizer, max_draft=3), *work), run(build(model, tokenizer), *work)
    assert with_drafts == without
    assert all(result.drafted_tokens > 0 for result in with_drafts)
    assert all(result.drafted_tokens == 0 and result.acceptance is None for result in without)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_tokens_follow_the_model_with_drafts_accepted_and_refused(config, tokenizer, seed):
    """Chi-square over many seeds: the three tokens after a prompt against the product of full forwards."""
    small = config.model_copy(update={"num_hidden_layers": 1, "hidden_size": 24, "initializer_range": 0.5})
    model, prompt = build_model(small, seed=seed), [5, 9, 200]
    settings = {"temperature": 1.2, "top_k": 3, "top_p": 1.0, "max_new_tokens": 3, "ignore_eos": True}
    scheduler = build(model, tokenizer, max_draft=2)
    rng = random.Random(seed)

    def guessing(jobs, depths):
        # Guesses drawn with the request's own noise from another distribution: some right, some wrong.
        return [
            [job.sampler.guess(_likely(model, job.ids, rng), len(job.ids) + at) for at in range(depth)]
            for job, depth in zip(jobs, depths, strict=True)
        ]

    scheduler.speculation.drafter.draft = guessing
    runs = 500
    results = run(scheduler, *[(prompt, Sampling(seed=n, **settings)) for n in range(runs)])
    accepted, drafted = (sum(getattr(r, name) for r in results) for name in ("accepted_tokens", "drafted_tokens"))
    assert 0.15 < accepted / drafted < 0.85
    expected = _text_probabilities(model, prompt, Sampling(**settings), 3)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-4)
    counts = dict.fromkeys(expected, 0)
    for result in results:
        counts[result.token_ids] += 1  # a text that cannot be has no place here
    cells = [(counts[text], runs * p) for text, p in expected.items() if runs * p >= 5]
    rest = runs - sum(seen for seen, _ in cells), runs - sum(mean for _, mean in cells)
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in [*cells, *([rest] if rest[1] >= 5 else [])])
    degrees = len(cells)
    assert degrees >= 8
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


_LOGITS = {}


def _next_logits(model, ids):
    key = (id(model), *ids)
    if key not in _LOGITS:
        with torch.inference_mode():
            _LOGITS[key] = model.transformer(torch.tensor([ids]))[0, -1]
    return _LOGITS[key]


def _likely(model, ids, rng):
    """The model's logits, or sometimes others of the same likeliest tokens."""
    logits_V = _next_logits(model, ids)
    return logits_V if rng.random() < 0.5 else logits_V * -1.0


def _text_probabilities(model, prompt, sampling, length):
    texts = {(): 1.0}
    for _ in range(length):
        texts = {
            (*text, token): p * q
            for text, p in texts.items()
            for token, q in zip(*(x.tolist() for x in distribution(_next_logits(model, prompt + list(text)), sampling)),
                                strict=True)
        }  # fmt: skip
    return texts


def test_modules_that_have_learned_are_mostly_right_and_change_nothing(config, tokenizer):
    """A model trained for seconds to count: its module's drafts are accepted, at depth above one too."""
    config = config.model_copy(update={"initializer_range": 0.05, "num_hidden_layers": 2, "hidden_size": 48})
    model = build_model(config, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        tokens_BS = (torch.randint(40, (16, 1), generator=generator) + torch.arange(16)) % 40 + 100
        states, _ = model.training_hidden(tokens_BS[:, :-1])
        losses = [
            torch.nn.functional.cross_entropy(
                model.transformer.head(state).flatten(0, 1), tokens_BS[:, depth + 1 :][:, : state.shape[1]].flatten()
            )
            for depth, state in enumerate(states)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    work = [([100, 101, 102], Sampling(temperature=t, max_new_tokens=60, seed=1, top_p=1.0)) for t in (0.0, 0.5)]
    for depth, least in ((1, 0.8), (3, 0.4)):
        found = run(build(model.eval(), tokenizer, max_draft=depth), *work)
        assert found == run(build(model, tokenizer), *work)
        assert all(result.acceptance > least for result in found), [r.acceptance for r in found]
