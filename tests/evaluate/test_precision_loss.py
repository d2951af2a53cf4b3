import copy
import math

import pytest
import torch

from benthic.data.batches import validation_batches
from benthic.data.prepare import prepare
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.evaluate.precision_loss import cache_loss, precision_loss
from benthic.inference.paged_cache import PagedCache, PagedView
from benthic.inference.weights import round_weights
from benthic.model import build_model
from benthic.precision.latents import CACHE_DTYPES


@pytest.fixture(scope="module")
def held_out(tiny_run_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(tiny_run_config().data, 320, out)
    return TokenStore(out / "data", "val")


def agreement_by_hand(model, other, store, length):
    same = total = 0
    with torch.inference_mode():
        for batch in validation_batches(store, 1, length):
            tokens_BT = batch.tokens_BS[:, :-1]
            same += int((model(tokens_BT).argmax(-1) == other(tokens_BT).argmax(-1)).sum())
            total += tokens_BT.numel()
    return same / total


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compares_the_rounded_model_with_what_it_was(precision, held_out, tiny_run_config):
    model = build_model(tiny_run_config(model={"initializer_range": 0.2}).model, seed=1)
    other = round_weights(copy.deepcopy(model), precision)
    expected = agreement_by_hand(model, other, held_out, 32)
    loss = precision_loss(model, held_out, precision, sequence_length=32)
    assert loss.greedy_agreement.value == pytest.approx(expected)
    assert loss.greedy_agreement.ci95[0] <= expected <= loss.greedy_agreement.ci95[1]
    assert loss.bits_per_byte == bits_per_byte(other, held_out, sequence_length=32)
    assert (0.8 if precision == "int8" else 0.3) < expected < 1


def test_the_model_s_own_precision_loses_nothing(held_out, tiny_run_config):
    model = build_model(tiny_run_config().model)
    whole = bits_per_byte(model, held_out, sequence_length=32)
    loss = precision_loss(model, held_out, "fp32", sequence_length=32)
    assert loss.greedy_agreement.value == 1.0
    assert loss.bits_per_byte == whole


def token_by_token(model, tokens_BT, dtype):
    """Logits of each sequence, read a token at a time over a cache of this type."""
    logits = []
    for tokens_T in tokens_BT:
        cache, table_P = PagedCache(model.config, 1, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        steps = [
            model.transformer(token.view(1, 1), cache=PagedView(cache, table_P, at, torch.float32))[0]
            for at, token in enumerate(tokens_T)
        ]
        logits.append(torch.cat(steps))
    return torch.stack(logits)


@pytest.mark.parametrize("kept", ["fp32", "bf16", "fp8"])
def test_latents_in_fewer_bits_cost_what_decoding_over_such_a_cache_loses(kept, held_out, tiny_run_config):
    model = build_model(tiny_run_config(model={"initializer_range": 0.3}).model, seed=2)
    nats = same = total = 0
    with torch.inference_mode():
        for batch in validation_batches(held_out, 1, 32):
            tokens_BT, next_BT = batch.tokens_BS[:, :-1], batch.tokens_BS[:, 1:]
            logits_BTV = token_by_token(model, tokens_BT, CACHE_DTYPES[kept])
            nats += float(
                torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten(), reduction="sum")
            )
            same += int((model(tokens_BT).argmax(-1) == logits_BTV.argmax(-1)).sum())
            total += tokens_BT.numel()
    whole = bits_per_byte(model, held_out, sequence_length=32)
    loss = cache_loss(model, held_out, kept, sequence_length=32)
    assert loss.greedy_agreement.value == pytest.approx(same / total, abs=2 / total)
    bytes_of_text = held_out.manifest.val.bytes
    assert loss.bits_per_byte.value == pytest.approx(nats / math.log(2) / bytes_of_text, rel=1e-4)
    assert (loss.bits_per_byte.value == whole.value) == (kept == "fp32")
    assert bits_per_byte(model, held_out, sequence_length=32) == whole
