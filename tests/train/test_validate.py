"""Bits per byte against a plain computation over the held-out tokens and the size of their text."""

import math

import pytest
import torch
import torch.nn.functional as F

from benthic.data.shards import TokenStore
from benthic.model import build_model
from benthic.train.validate import bits_per_byte


@pytest.fixture(scope="module")
def store(prepared) -> TokenStore:
    return TokenStore(prepared / "data", "val")


@pytest.mark.parametrize(("length", "batch_size"), [(32, 4), (50, 1), (7, 64)])
def test_the_whole_split_is_counted_once(tiny_run_config, store, length, batch_size):
    model = build_model(tiny_run_config().model, seed=4)
    tokens = torch.tensor(store.take(torch.arange(store.tokens).numpy()))
    nats = 0.0
    for start in range(0, len(tokens) - 1, length):
        piece = tokens[start : start + length + 1]
        nats += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
    expected = nats / math.log(2) / store.manifest.val.bytes
    got = bits_per_byte(model, store, sequence_length=length, batch_size=batch_size)
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_pays_log_of_the_vocabulary(tiny_run_config, store):
    model = build_model(tiny_run_config().model)
    torch.nn.init.zeros_(model.transformer.head.weight)
    bits_per_token = math.log2(320)
    split = store.manifest.val
    whole = bits_per_byte(model, store, sequence_length=32, batch_size=8)
    assert whole == pytest.approx(bits_per_token * (split.tokens - 1) / split.bytes, rel=1e-5)
    part = bits_per_byte(model, store, sequence_length=32, batch_size=8, max_tokens=128)
    assert part == pytest.approx(whole, rel=1e-5)


def test_with_documents_masked_a_part_is_charged_like_the_whole(tiny_run_config, store):
    model = build_model(tiny_run_config().model)
    torch.nn.init.zeros_(model.transformer.head.weight)
    settings = {"sequence_length": 16, "batch_size": 4, "mask_documents": True}
    whole = bits_per_byte(model, store, **settings)
    predicted = store.tokens - store.manifest.val.documents
    assert whole == pytest.approx(math.log2(320) * predicted / store.manifest.val.bytes, rel=1e-5)
    # Every token costs the same here, so any part tells what the whole does.
    assert bits_per_byte(model, store, max_tokens=store.tokens // 3, **settings) == pytest.approx(whole, rel=1e-5)


def test_bf16_is_close_and_leaves_weights_and_gradients_alone(tiny_run_config, store):
    model = build_model(tiny_run_config().model, seed=1)
    settings = {"sequence_length": 32, "batch_size": 8, "max_tokens": 256}
    exact = bits_per_byte(model, store, **settings)
    rounded = bits_per_byte(model, store, compute="bf16", **settings)
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
