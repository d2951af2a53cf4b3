import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from benthic.config.schema import InferenceConfig
from benthic.errors import InputError, WorkFailed
from benthic.inference.batching import BatchEngine
from benthic.inference.engine import Engine
from benthic.inference.request import QueueFull, Request, Sampling, Token
from benthic.model import build_model


@pytest.fixture(scope="module")
def model(config):
    return build_model(config, seed=3)


@pytest.fixture
def batch(model, tokenizer):
    """Builds engines, and closes them."""
    engines = []

    def build(**options):
        engines.append(BatchEngine(model, tokenizer, InferenceConfig(), **{"cache_gib": 0.01} | options))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()


def endless(**settings):
    return Sampling(**{"max_new_tokens": 250, "temperature": 0.0, "ignore_eos": True} | settings)


def many(engine, count, threads, model, tokenizer):
    """Requests from several threads at once; each must end as it would alone, and every page come back."""
    rng = random.Random(0)
    work = [([rng.randrange(280) for _ in range(rng.randint(1, 12))],
             Sampling(max_new_tokens=rng.randint(1, 5), seed=n, ignore_eos=True)) for n in range(count)]  # fmt: skip
    requests = [None] * count

    def submit(start):
        for index in range(start, count, threads):
            requests[index] = engine.submit(*work[index])

    workers = [threading.Thread(target=submit, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results = [request.wait(500) for request in requests]
    assert all(r.finish_reason == "length" for r in results)
    assert [len(r.token_ids) for r in results] == [sampling.max_new_tokens for _, sampling in work]
    alone = Engine(model, tokenizer, cache_gib=0.01, max_draft=0)
    for index in range(0, count, 20):
        prompt, sampling = work[index]
        assert results[index] == alone.generate([prompt], **sampling.model_dump())[0]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.finished["length"] == sum(stats.finished.values()) == count
    assert stats.generated_tokens == sum(len(r.token_ids) for r in results)


def test_two_hundred_requests_at_once_all_complete(batch, model, tokenizer):
    many(batch(max_queue=200), 200, 8, model, tokenizer)


@pytest.mark.slow
def test_a_thousand_requests_at_once_all_complete(batch, model, tokenizer):
    many(batch(max_queue=1000), 1000, 32, model, tokenizer)


def test_tokens_can_be_read_as_they_come_by_several_readers(batch):
    engine = batch()
    request = engine.submit([1, 2], engine.settings(max_new_tokens=30, seed=1, ignore_eos=True))
    seen = [[], []]

    def read(into):
        into += list(request)

    readers = [threading.Thread(target=read, args=(into,)) for into in seen]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert seen[0] == seen[1] == list(request)
    assert "".join(token.text for token in request) == request.result.text
    assert [token.id for token in request] == list(request.result.token_ids)


def test_asyncio_reads_several_requests_at_once_and_stays_responsive(batch):
    engine = batch()

    async def read(number):
        request = engine.submit([number], endless(max_new_tokens=25))
        return request, [token async for token in request]

    async def everything():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        outcome = await asyncio.gather(*(read(n) for n in range(5)))
        ticking.cancel()
        return outcome, ticks

    outcome, ticks = asyncio.run(everything())
    assert ticks > 5
    for request, tokens in outcome:
        assert [token.id for token in tokens] == list(request.result.token_ids)
        assert len(tokens) == 25
        assert not request._waiters


def test_a_reader_of_asyncio_that_goes_away_leaves_nothing_behind(batch):
    engine = batch()

    async def leave():
        request = engine.submit([1], endless())
        async for _ in request:
            break
        request.cancel()
        return request

    request = asyncio.run(leave())
    assert request.wait(60).finish_reason == "cancelled"
    assert len(request.result.token_ids) < 250


def test_a_token_delivered_between_two_looks_is_not_missed():
    """The engine's thread against readers in the worst rhythm: nothing else decides when they look."""
    request = Request("r", [1], Sampling())
    tokens = [Token(n, "", 0.0) for n in range(300)]

    def write():
        for token in tokens[:-1]:
            request.deliver([token])
        request.deliver(tokens[-1:], object())

    async def read():
        return [token async for token in request]

    writer = threading.Thread(target=write)
    writer.start()
    assert asyncio.run(asyncio.wait_for(read(), 60)) == tokens
    assert list(request) == tokens
    writer.join()


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(batch):
    engine = batch(max_batch=1, max_queue=2)
    running = engine.submit([1], endless())
    next(iter(running))
    queued = [engine.submit([n], endless(max_new_tokens=1)) for n in range(2)]
    with pytest.raises(QueueFull, match="2 requests"):
        engine.submit([5], endless())
    running.cancel()
    for request in queued:
        assert request.wait(60).finish_reason == "length"
    assert engine.submit([5], endless(max_new_tokens=1)).wait(60)


def test_closing_cancels_what_does_not_end_in_time(batch):
    engine = batch()
    requests = [engine.submit([n], endless()) for n in range(3)]
    next(iter(requests[0]))
    engine.close()
    assert all(request.result.finish_reason == "cancelled" for request in requests)
    with pytest.raises(WorkFailed, match="closed"):
        engine.submit([1], endless())
    engine.close()
    assert engine.failed is None


def test_closing_lets_requests_end(batch):
    engine = batch(max_batch=2)
    requests = [engine.submit([n], endless(max_new_tokens=10)) for n in range(5)]
    engine.close(drain_s=500)
    assert all(request.result.finish_reason == "length" for request in requests)


def test_refusing_a_request_leaves_no_trace(batch):
    engine = batch()
    with pytest.raises(InputError, match="empty"):
        engine.submit([], endless())
    with pytest.raises(InputError, match="temprature"):
        engine.settings(temprature=1)
    with pytest.raises(InputError, match="max_queue"):
        batch(max_queue=0)
    assert engine.stats().waiting == 0


def test_an_engine_that_fails_says_so_to_everyone(batch, monkeypatch):
    engine = batch(max_batch=1)
    first = engine.submit([1], endless())
    next(iter(first))
    queued = engine.submit([2], endless())

    def broken():
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(engine._scheduler._stepping, "step", broken)
    for request in (first, queued):
        result = request.wait(60)
        assert result.finish_reason == "error"
        assert "disk on fire" in result.error
    assert "disk on fire" in engine.failed
    with pytest.raises(WorkFailed, match="disk on fire"):
        engine.submit([1], endless())
    assert engine.stats().pages_used == 0


def test_damaged_weights_end_the_request_and_not_the_engine(config, tokenizer):
    model = build_model(config, seed=3)
    with torch.no_grad():
        model.transformer.embed.weight[7] = float("nan")
    with BatchEngine(model, tokenizer, cache_gib=0.01) as engine:
        bad, good = engine.submit([7], endless()), engine.submit([8], endless(max_new_tokens=3, logit_bias={7: -100}))
        assert bad.wait(60).finish_reason == "error"
        assert "not finite" in bad.result.error
        assert good.wait(60).finish_reason == "length"


def test_the_result_is_not_there_before_the_end(batch):
    request = batch().submit([1], endless())
    with pytest.raises(RuntimeError, match="not ended"):
        _ = request.result
    with pytest.raises(TimeoutError):
        request.wait(0.0)
    request.cancel()
    result = request.wait(60)
    assert 0 <= result.queue_s <= result.total_s


def test_an_engine_that_nobody_uses_any_more_is_gone_at_once(model, tokenizer):
    """Without waiting for the garbage collector: its memory and its threads would disturb the next one."""
    engine = Engine(model, tokenizer, cache_gib=0.01)
    completions = engine.generate(["hello", "you"], max_new_tokens=3)
    scheduler = weakref.ref(engine._scheduler)
    gc.disable()
    try:
        del engine
        assert scheduler() is None
    finally:
        gc.enable()
    assert completions


def test_a_program_that_forgets_to_close_its_engine_ends_all_the_same():
    program = """
from benthic.config.presets import PRESETS
from benthic.data.tokenizer import Tokenizer
from benthic.inference.batching import BatchEngine
from benthic.inference.request import Sampling
from benthic.model import build_model
tokenizer = Tokenizer.train(["a b c"], 290)
config = PRESETS["tiny"].model_copy(update={"vocab_size": tokenizer.vocab_size})
engine = BatchEngine(build_model(config), tokenizer, cache_gib=0.01)
next(iter(engine.submit([1], Sampling(max_new_tokens=250, ignore_eos=True))))
print("end")
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", ""), time.monotonic() - begun
