import random
from collections import Counter
from functools import partial

import pytest
import torch

from benthic.errors import InputError
from benthic.inference.decode import ReferenceDecoder, decoder
from benthic.inference.limits import chunk_length
from benthic.inference.pace import Acceptance, Pace
from benthic.inference.paged_cache import PAGE
from benthic.inference.request import Sampling
from benthic.inference.sampling import Logits, Sampler, log_probabilities
from benthic.inference.scheduler import Scheduler
from benthic.model import build_model
from benthic.ops import native
from benthic.plan.flops import cache_bytes_per_token
from benthic.precision.latents import CACHE_DTYPES, LatentFormat

ROOM = 400
"""Pages that are never scarce here."""


@pytest.fixture(scope="module")
def longer(config):
    """A model for texts of 512 tokens, whose chunks are one page."""
    config = config.model_copy(update={"max_position_embeddings": 512, "num_nextn_predict_layers": 2})
    assert chunk_length(config) == PAGE
    return build_model(config, seed=3)


@pytest.fixture(params=["fastest", "reference"])
def schedule(longer, tokenizer, request, monkeypatch):
    """A scheduler with so many pages, on the fastest decoder there is and on the reference."""
    if request.param == "reference":
        monkeypatch.setattr("benthic.inference.scheduler.decoder", lambda model, precision: ReferenceDecoder(model))

    def build(pages=ROOM, max_batch=8, max_draft=0, pace=None, kept=None):
        layers = longer.config.num_hidden_layers + (2 if max_draft else 0)
        page_bytes = layers * PAGE * LatentFormat(longer.config, CACHE_DTYPES[kept or "fp32"]).row_bytes
        scheduler = Scheduler(
            longer, tokenizer, cache_gib=(pages + 0.5) * page_bytes / 2**30, max_batch=max_batch, max_draft=max_draft,
            cache_precision=kept,
        )  # fmt: skip
        assert scheduler.cache.pages == pages
        scheduler.speculation.pace = pace or scheduler.speculation.pace
        return scheduler

    return build


class RandomDepths(Pace):
    """Drafts as many tokens as a die says."""

    def __init__(self, max_depth, seed):
        super().__init__(max_depth)
        self.rng = random.Random(seed)

    def new_request(self):
        self._failed_trials = 0
        return super().new_request()

    def depths(self, requests, rows):
        return [self.rng.randint(0, cap) if acceptance else 0 for acceptance, cap in requests]


def finish(scheduler, *requests, steps=5000):
    for _ in range(steps):
        if all(request.done for request in requests):
            return [request.result for request in requests]
        scheduler.step()
    raise AssertionError("requests never end")


def ids(rng, length, vocab_size=280):
    return [rng.randrange(vocab_size) for _ in range(length)]


def random_sampling(rng, **settings):
    return Sampling(**{
        "max_new_tokens": rng.choice([1, 20, 40]), "seed": rng.randrange(100),
        "temperature": rng.choice([0.0, 0.8, 1.5]), "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 20]), "ignore_eos": rng.random() < 0.7,
        "presence_penalty": rng.choice([0.0, 0.7]), "repetition_penalty": rng.choice([1.0, 1.3]),
        "top_logprobs": rng.choice([0, 3]), "stop": rng.choice([(), (), ("e",)]),
    } | settings)  # fmt: skip


def in_full(model, tokenizer, prompt, sampling):
    """Tokens and log-probabilities by reading everything anew for each token, without cache or scheduler."""
    sampler, text, logprobs = Sampler(sampling, prompt, model.config.vocab_size), list(prompt), []
    stops = set() if sampling.ignore_eos else tokenizer.stop_ids
    while len(logprobs) < sampling.max_new_tokens:
        with torch.inference_mode():
            logits_V = model.transformer(torch.tensor([text]))[0, -1]
        token = sampler.choose(Logits.of(logits_V), len(text))
        if token in stops:
            break
        sampler.accept(token)
        text.append(token)
        logprobs.append(float(log_probabilities(logits_V)[token]))
        if any(stop in tokenizer.decode(text[len(prompt) :]) for stop in sampling.stop):
            break
    return text[len(prompt) :], logprobs


@pytest.mark.parametrize("seed", range(3))
def test_together_they_say_what_a_plain_loop_over_the_transformer_says(schedule, longer, tokenizer, seed):
    rng, scheduler = random.Random(seed), schedule(max_draft=3)
    work = [(ids(rng, rng.choice([1, 5, 63, 64, 65, 150])), random_sampling(rng, max_new_tokens=12)) for _ in range(4)]
    found = finish(scheduler, *[scheduler.submit(*each) for each in work])
    for completion, (prompt, sampling) in zip(found, work, strict=True):
        tokens, logprobs = in_full(longer, tokenizer, prompt, sampling)
        assert list(completion.token_ids) == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


def workload(rng, requests):
    """Prompts that share beginnings, of lengths around multiples of a page, with settings of every kind."""
    stems = [ids(rng, 200) for _ in range(2)]
    lengths = [1, 40, 50, 55, 64, 65, 128, 129, 180]
    return [
        (rng.choice(stems)[: rng.choice(lengths)] + ids(rng, rng.choice([1, 7])), random_sampling(rng))
        for _ in range(requests)
    ]


@pytest.mark.parametrize(("kept", "seeds"), [(None, range(6)), ("bf16", [0, 3]), ("fp8", [1, 2])])
def test_the_same_to_the_last_bit_whatever_the_company_the_memory_and_the_drafts(schedule, kept, seeds):
    """Few pages, so that requests are preempted and shared chunks evicted; priorities; cancellations; random drafts."""
    happened = Counter()
    for seed in seeds:
        stats = _together_as_alone(partial(schedule, kept=kept), seed)
        happened += Counter({name: getattr(stats, name) for name in HAPPENS})
    assert set(happened) == HAPPENS


HAPPENS = {"preemptions", "evictions", "cached_tokens", "accepted_tokens"}


def _together_as_alone(schedule, seed):
    """Figures of an engine that has said of a random workload what each request is told alone."""
    rng = random.Random(seed)
    work = workload(rng, 10)
    alone = [finish(s := schedule(max_batch=1), s.submit(*each))[0] for each in work]
    scheduler = schedule(pages=rng.choice([4, 5, 6]), max_batch=rng.choice([4, 8]), max_draft=3,
                         pace=RandomDepths(3, seed))  # fmt: skip
    _guess_well(scheduler, rng, dict(zip([tuple(prompt) for prompt, _ in work], alone, strict=True)))
    pending, requests, cancelled = list(work), [], set()
    while len(requests) < len(work) or scheduler.has_work:
        if pending and rng.random() < 0.6:
            requests.append(scheduler.submit(*pending.pop(0), priority=rng.choice([0, 0, 0, 1])))
        if requests and rng.random() < 0.02:
            victim = rng.randrange(len(requests))
            requests[victim].cancel()
            cancelled.add(victim)
        scheduler.step()
    for index, (request, expected) in enumerate(zip(requests, alone, strict=True)):
        found = request.result
        if index in cancelled and found.finish_reason == "cancelled":
            assert expected.token_ids[: len(found.token_ids)] == found.token_ids
            assert expected.logprobs[: len(found.token_ids)] == found.logprobs
        else:
            assert found == expected, seed
        assert "".join(token.text for token in request) == found.text
        assert [token.id for token in request] == list(found.token_ids)
    stats = scheduler.stats()
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)
    assert sum(stats.finished.values()) == len(work)
    return stats


class Never(Pace):
    """Never drafts, though it might."""

    def depths(self, requests, rows):
        return [0 for _ in requests]


def test_one_that_reads_again_beside_one_without_drafts_drafts_nothing(schedule):
    """It has pages for its first rows only, far fewer than its tokens fill: less than no room for drafts."""
    scheduler = schedule(max_batch=2, max_draft=2, pace=Never(2))
    longer = Sampling(max_new_tokens=250, temperature=0.0, ignore_eos=True)
    beside, again = (scheduler.submit([n], longer) for n in range(2))
    while len(again.available()) < 3 * PAGE:
        scheduler.step()
    scheduler.submit([9], Sampling(max_new_tokens=2), priority=1)
    depths = set()
    while not (beside.done and again.done):
        scheduler.step()
        depths.add(scheduler.stats().draft_depth)
    assert again.result.preemptions == 1
    assert depths == {0.0}


def _guess_well(scheduler, rng, expected):
    """Replace half of the modules' guesses by what will turn out right, since modules of a fresh model guess badly."""
    draft = scheduler.speculation.drafter.draft

    def well(jobs, depths):
        drafts = draft(jobs, depths)
        for job, guesses in zip(jobs, drafts, strict=True):
            said = expected[tuple(job.request.prompt_ids)].token_ids
            if rng.random() < 0.5:
                at = len(job.ids) - job.prompt_length
                guesses[: len(said) - at] = said[at : at + len(guesses)]
        return drafts

    scheduler.speculation.drafter.draft = well


def test_a_prompt_that_begins_like_an_earlier_one_is_not_read_again_and_says_the_same(schedule):
    rng = random.Random(0)
    stem, sampling = ids(rng, 2 * PAGE), Sampling(seed=1, max_new_tokens=8, ignore_eos=True)
    scheduler = schedule()
    first, again = (finish(scheduler, scheduler.submit([*stem, 5], sampling))[0] for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 2 * PAGE)
    assert first == again
    (other,) = finish(scheduler, scheduler.submit([*stem[:PAGE], 7, 8], sampling))
    assert other.cached_tokens == PAGE
    assert other == finish(s := schedule(), s.submit([*stem[:PAGE], 7, 8], sampling))[0]
    stats = scheduler.stats()
    assert stats.cached_tokens == 3 * PAGE
    assert stats.prompt_tokens == 2 * (2 * PAGE + 1) + PAGE + 2
    assert (stats.pages_used, stats.pages_cached) == (0, 2)


def test_the_last_token_of_a_prompt_is_always_read(schedule):
    prompt, sampling = ids(random.Random(0), PAGE), Sampling(seed=1, max_new_tokens=2)
    scheduler = schedule()
    finish(scheduler, scheduler.submit([*prompt, 3], sampling))
    assert finish(scheduler, scheduler.submit(prompt, sampling))[0].cached_tokens == 0


def test_those_who_ask_the_same_at_once_share_while_they_run(schedule):
    prompt, scheduler = ids(random.Random(1), 3 * PAGE + 5), schedule(pages=10)
    requests = [scheduler.submit(prompt, Sampling(seed=n, max_new_tokens=4)) for n in range(6)]
    scheduler.step()
    assert scheduler.stats().running == 6
    completions = finish(scheduler, *requests)
    assert sum(completion.cached_tokens for completion in completions) == 5 * 3 * PAGE
    assert scheduler.stats().preemptions == 0  # six alone would take 24 pages


def test_a_token_that_is_never_read_needs_no_room(schedule):
    scheduler = schedule(pages=2)
    requests = [scheduler.submit([n] * PAGE, Sampling(max_new_tokens=1)) for n in range(2)]
    scheduler.step()
    assert scheduler.stats().waiting == 0
    assert all(result.preemptions == 0 for result in finish(scheduler, *requests))


def test_a_chunk_that_must_be_read_again_takes_room(schedule):
    """It is in the cache and in use, but the answer begins from its last token."""
    scheduler = schedule(pages=3)
    first = scheduler.submit([5] * PAGE + [3], Sampling(max_new_tokens=30, ignore_eos=True))
    scheduler.step()
    scheduler.step()
    again = scheduler.submit([5] * PAGE, Sampling(max_new_tokens=30, ignore_eos=True))
    scheduler.step()
    assert (scheduler.stats().running, scheduler.stats().waiting) == (1, 1)
    assert [result.preemptions for result in finish(scheduler, first, again)] == [0, 0]


def test_one_that_drafts_reads_again_what_was_read_without_drafts_unless_they_are_given_up(schedule):
    scheduler = schedule(max_draft=2, pace=(pace := RandomDepths(2, 0)))
    found = []
    for number, (drafts, given_up) in enumerate([(0, 0), (1, 1), (1, 0), (1, 0)]):
        pace.new_request = lambda drafts=drafts: Acceptance([0.5] * 2) if drafts else None
        pace._failed_trials = 100 * given_up
        sampling = Sampling(max_new_tokens=20, temperature=0.0, ignore_eos=True)
        found += finish(scheduler, scheduler.submit([7] * (PAGE + 5), sampling))
        assert found[number] == found[0]
    assert [result.cached_tokens for result in found] == [0, PAGE, 0, PAGE]
    assert [result.drafted_tokens > 0 for result in found] == [False, False, True, True]


def test_scopes_share_nothing(schedule):
    prompt, scheduler = ids(random.Random(1), PAGE + 5), schedule()
    cached = [
        finish(scheduler, scheduler.submit(prompt, Sampling(max_new_tokens=1), scope=scope))[0].cached_tokens
        for scope in ("a", "b", "a", "")
    ]
    assert cached == [0, 0, PAGE, 0]


def test_the_more_urgent_goes_first_and_takes_the_place_of_the_less_urgent(schedule):
    scheduler = schedule(max_batch=2)
    sampling = Sampling(max_new_tokens=20, temperature=0.0, ignore_eos=True)
    slow = [scheduler.submit([n], sampling) for n in range(3)]
    for _ in range(3):
        scheduler.step()
    urgent = scheduler.submit([9], Sampling(max_new_tokens=9, temperature=0.0, ignore_eos=True), priority=1)
    finish(scheduler, urgent)
    assert not any(request.done for request in slow)
    results = finish(scheduler, *slow)
    assert [result.preemptions for result in results] == [0, 1, 0]
    assert urgent.result.preemptions == 0
    assert results[1] == finish(s := schedule(), s.submit([1], sampling))[0]


def test_a_deadline_ends_a_request_running_or_waiting(schedule, monkeypatch):
    scheduler = schedule(max_batch=1)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    sampling = Sampling(max_new_tokens=50, temperature=0.0, ignore_eos=True)
    running, waiting = (scheduler.submit([n], sampling, deadline_s=5.0) for n in (1, 2))
    patient = scheduler.submit([3], Sampling(max_new_tokens=2))
    for _ in range(4):
        scheduler.step()
    now[0] += 5.0
    finish(scheduler, running, waiting, patient)
    assert [r.result.finish_reason for r in (running, waiting)] == ["deadline", "deadline"]
    assert len(running.result.token_ids) == 5  # the first step reads the prompt and decodes
    assert (waiting.result.text, waiting.result.queue_s) == ("", 5.0)
    assert patient.result.finish_reason != "deadline"


def test_cancelling_frees_everything_at_once_in_the_queue_in_prefill_and_in_decode(schedule):
    scheduler = schedule(max_batch=2, pages=20)
    rng = random.Random(0)
    reading = scheduler.submit(ids(rng, 400), Sampling(max_new_tokens=50))
    writing = scheduler.submit([1], Sampling(max_new_tokens=300, ignore_eos=True))
    queued = scheduler.submit([2], Sampling())
    for _ in range(3):
        scheduler.step()
    assert not reading.available()
    assert scheduler.stats().running == 2
    for request in (reading, writing, queued):
        request.cancel()
    scheduler.step()
    assert all(request.result.finish_reason == "cancelled" for request in (reading, writing, queued))
    stats = scheduler.stats()
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)
    reading.cancel()  # once more changes nothing
    assert not scheduler.has_work


def test_what_can_never_fit_is_refused(schedule):
    scheduler = schedule(pages=3)
    with pytest.raises(InputError, match=r"4 pages.*has 3.*cache_gib"):
        scheduler.submit(ids(random.Random(0), 150), Sampling(max_new_tokens=44))
    request = scheduler.submit(ids(random.Random(0), 150), Sampling(max_new_tokens=43, ignore_eos=True))
    assert len(finish(scheduler, request)[0].token_ids) == 43  # the last token is never read


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, ["prompt", "empty"]),
        ([1] * 512, {}, ["512 tokens", "max_position_embeddings=512"]),
        ([1, 290], {}, ["290", "0 to 289"]),
        ([1], {"logit_bias": {300: 1.0}}, ["logit_bias", "300"]),
        ([1], {"stop_token_ids": (400,)}, ["stop_token_ids", "400"]),
    ],
)
def test_wrong_requests_are_refused(schedule, prompt, settings, words):
    with pytest.raises(InputError) as refusal:
        schedule().submit(prompt, Sampling(**settings))
    assert all(word in str(refusal.value) for word in words)


def test_a_cache_of_less_than_a_page_is_refused(longer, tokenizer):
    with pytest.raises(InputError, match="cache_gib=1e-09"):
        Scheduler(longer, tokenizer, cache_gib=1e-9, max_batch=1, max_draft=0)
    with pytest.raises(InputError, match="max_batch=0"):
        Scheduler(longer, tokenizer, cache_gib=1, max_batch=0, max_draft=0)


def test_stop_tokens_and_ignored_ends(schedule, tokenizer):
    scheduler = schedule()
    bias = {"temperature": 0.0, "logit_bias": {tokenizer.eos_id: 100.0}, "max_new_tokens": 5}
    ended, ignored = finish(
        scheduler, scheduler.submit([1], Sampling(**bias)), scheduler.submit([1], Sampling(**bias, ignore_eos=True))
    )
    assert (ended.token_ids, ended.finish_reason) == ((), "stop")
    assert (ignored.token_ids, ignored.text, ignored.finish_reason) == ((tokenizer.eos_id,) * 5, "", "length")
    own = Sampling(temperature=0.0, logit_bias={77: 100.0}, stop_token_ids=(77,))
    assert finish(scheduler, scheduler.submit([1], own))[0].finish_reason == "stop"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_prompt_is_scored_as_a_full_forward_scores_it(schedule, longer, length):
    prompt, scheduler = ids(random.Random(length), length), schedule()
    finish(scheduler, scheduler.submit([*prompt, 3], Sampling(max_new_tokens=1)))  # chunks are in the cache
    (found,) = finish(scheduler, scheduler.submit(prompt, Sampling(max_new_tokens=1, prompt_logprobs=2, seed=0)))
    with torch.inference_mode():
        logprobs = longer.transformer(torch.tensor([prompt]))[0].log_softmax(-1)
    assert [score.id for score in found.prompt_logprobs] == prompt
    assert found.prompt_logprobs[0].logprob is None
    for position, score in enumerate(found.prompt_logprobs[1:]):
        assert score.logprob == pytest.approx(float(logprobs[position, score.id]), abs=1e-4)
        assert score.top_logprobs[0][1] == pytest.approx(float(logprobs[position].max()), abs=1e-4)
        assert len(score.top_logprobs) == 2
    plain = finish(scheduler, scheduler.submit(prompt, Sampling(max_new_tokens=1, seed=0)))[0]
    assert plain.token_ids == found.token_ids
    assert plain.logprobs == found.logprobs


class Failing:
    def mask(self, vocab_size):
        raise RuntimeError("no such rule")

    def accept(self, token):
        raise AssertionError


class Cycling:
    """Allows the tokens of a cycle, one at a time, and then nothing."""

    def __init__(self, cycle):
        self.cycle, self.seen = cycle, []

    def mask(self, vocab_size):
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[self.cycle[len(self.seen) : len(self.seen) + 1]] = True
        return mask

    def accept(self, token):
        self.seen.append(token)


def test_a_constraint_rules_with_drafts_and_preemption_too(schedule):
    cycle = ids(random.Random(3), 140)  # so long that either needs all pages before it ends
    scheduler = schedule(pages=3, max_draft=2, pace=RandomDepths(2, 0))
    requests = [
        scheduler.submit([1], Sampling(constraint=Cycling(cycle), max_new_tokens=180, ignore_eos=True))
        for _ in range(2)
    ]
    for result in finish(scheduler, *requests):
        assert list(result.token_ids) == cycle
        assert result.finish_reason == "stop"
    assert scheduler.stats().preemptions > 0


def test_a_constraint_that_fails_ends_its_own_request_only(schedule):
    scheduler = schedule()
    bad = scheduler.submit([1], Sampling(constraint=Failing()))
    good = scheduler.submit([1], Sampling(max_new_tokens=3, ignore_eos=True))
    finish(scheduler, bad, good)
    assert (bad.result.finish_reason, bad.result.error) == ("error", "constraint: RuntimeError: no such rule")
    assert len(good.result.token_ids) == 3


def test_top_log_probabilities_begin_with_the_likeliest(schedule):
    (found,) = finish(s := schedule(), s.submit([1, 2], Sampling(top_logprobs=4, temperature=0.0, max_new_tokens=6)))
    for token, logprob, top in zip(found.token_ids, found.logprobs, found.top_logprobs, strict=True):
        assert top[0] == (token, logprob)
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert len(top) == 4


def test_chunks_that_expand_what_is_cached_keep_the_promise(config, tokenizer):
    sizes = {"max_position_embeddings": 512, "kv_lora_rank": 80, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = build_model(config.model_copy(update=sizes), seed=3)
    attention = model.transformer.layers[0].attention
    assert attention._expansion_pays(PAGE, 2 * PAGE)
    assert not attention._expansion_pays(8, 2 * PAGE)
    scheduler = Scheduler(model, tokenizer, cache_gib=0.05, max_batch=4, max_draft=0, cache_precision="fp8")
    rng = random.Random(2)
    stem = ids(rng, 200)
    work = [(stem[:length] + ids(rng, 3), Sampling(max_new_tokens=5, seed=1)) for length in (200, 180, 130, 64, 197)]
    together = finish(scheduler, *[scheduler.submit(*each) for each in work])
    assert together == [finish(scheduler, scheduler.submit(*each))[0] for each in work]
    fresh = [Scheduler(model, tokenizer, cache_gib=0.05, max_batch=1, max_draft=0, cache_precision="fp8") for _ in work]
    assert together == [finish(s, s.submit(*each))[0] for s, each in zip(fresh, work, strict=True)]
    assert scheduler.stats().cached_tokens > 0


@pytest.mark.parametrize("precision", [None, "int8"])
def test_prompts_by_own_kernels_keep_the_promise(config, tokenizer, precision, monkeypatch):
    """Sizes that are multiplied by them where they are faster, chunks and ends of prompts that are and are not."""
    sizes = {
        "max_position_embeddings": 1024, "hidden_size": 96, "kv_lora_rank": 80, "moe_intermediate_size": 64,
        "intermediate_size": 160, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    kernels, call = Counter(), native.call
    monkeypatch.setattr(native, "call", lambda name, *args: kernels.update([name]) or call(name, *args))

    def fresh(**options):
        model = build_model(config.model_copy(update=sizes), seed=3)
        return Scheduler(model, tokenizer, cache_gib=0.05, precision=precision, **{"max_draft": 0} | options)

    scheduler, rng = fresh(max_batch=4), random.Random(2)
    stem = ids(rng, 420)
    work = [
        (stem[:length] + ids(rng, rest), Sampling(max_new_tokens=5, seed=1, top_logprobs=3))
        for length, rest in ((400, 3), (300, 90), (256, 31), (128, 127), (90, 3), (20, 1), (256, 33))
    ]
    together = finish(scheduler, *[scheduler.submit(*each) for each in work])
    assert scheduler.stats().cached_tokens > 0
    assert together == [finish(scheduler, scheduler.submit(*each))[0] for each in work]
    alone = [fresh(max_batch=1, max_draft=depth) for depth, _ in enumerate(work)]
    assert together == [finish(s, s.submit(*each))[0] for s, each in zip(alone, work, strict=True)]
    for completion, (prompt, sampling) in zip(together, work, strict=True):
        tokens, logprobs = in_full(scheduler.model, tokenizer, prompt, sampling)
        assert precision or list(completion.token_ids) == tokens
        assert precision or completion.logprobs == pytest.approx(logprobs, abs=1e-4)
    own = native.has_tiles() or native.has_fast_vectors()
    assert bool(kernels["product"]) == own == (scheduler.stats().reader != native.status())


@pytest.mark.parametrize(("kept", "bytes_a_row"), [("fp32", 4 * 24), ("bf16", 2 * 24), ("fp8", 16 + 4 + 2 * 8)])
def test_bytes_of_a_token_are_exact(kept, bytes_a_row, schedule, longer):
    config = longer.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (16, 8)
    scheduler = schedule(pages=7, kept=kept)
    assert scheduler.stats().page_bytes == config.num_hidden_layers * PAGE * bytes_a_row
    assert sum(pages.nbytes for pages in scheduler.cache.pages_N) == 7 * scheduler.stats().page_bytes
    assert cache_bytes_per_token(config, kept) * PAGE == scheduler.stats().page_bytes


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_rounded_weights_keep_the_promise_and_prompts_are_read_with_them_too(config, tokenizer, precision):
    model = build_model(config, seed=3)
    before = model.transformer.layers[0].ffn.down.weight.clone()
    scheduler = Scheduler(model, tokenizer, cache_gib=0.01, max_batch=4, max_draft=0, precision=precision)
    assert not torch.equal(model.transformer.layers[0].ffn.down.weight, before)
    work = workload(random.Random(5), 4)
    together = finish(scheduler, *[scheduler.submit(*each) for each in work])
    assert together == [finish(scheduler, scheduler.submit(*each))[0] for each in work]


@pytest.mark.parametrize(
    ("option", "words"), [({"precision": "int3"}, "int3.*int4"), ({"cache_precision": "fp16"}, "fp16.*bf16")]
)
def test_options_that_are_not_there_are_refused(longer, tokenizer, option, words):
    with pytest.raises(InputError, match=words):
        Scheduler(longer, tokenizer, cache_gib=1, max_batch=1, max_draft=0, **option)


def test_without_a_compiler_the_reference_decodes(longer, monkeypatch):
    monkeypatch.setattr(native, "decode_library", lambda: (None, "no compiler"))
    found = decoder(longer)
    assert isinstance(found, ReferenceDecoder)
    assert found.name == "no compiler"
