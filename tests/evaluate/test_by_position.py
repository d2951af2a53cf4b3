"""Costs by position add up to the cost of the whole, and each is that of its own token."""

import math

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.data.batches import validation_batches
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.evaluate.by_position import nats_by_position
from benthic.model import build_model


@pytest.fixture(scope="module")
def model():
    return build_model(PRESETS["tiny"].model_copy(update={"initializer_range": 0.3}), seed=1)


def test_their_mean_is_the_cost_of_the_text(model, prepared):
    store = TokenStore(prepared / "data", "val")
    whole = [batch.tokens_BS for batch in validation_batches(store, 3, 32) if batch.tokens_BS.shape[1] == 33]
    # Of the text that whole sequences hold, all but some 31 tokens at its end.
    value = float(nats_by_position(model, whole).mean()) / math.log(2) * (store.tokens - 1) / store.manifest.val.bytes
    assert value == pytest.approx(bits_per_byte(model, store, sequence_length=32).value, rel=0.01)


@torch.no_grad()
def test_each_position_is_that_of_its_token(model):
    tokens = torch.randint(320, (3, 10), generator=torch.Generator().manual_seed(0))
    found = nats_by_position(model, [tokens[:2], tokens[2:]])
    assert (found.shape, found.dtype) == ((9,), torch.float64)
    for place in range(9):
        logits = torch.stack([model(row[None, : place + 1])[0, -1] for row in tokens]).double()
        chosen = logits.log_softmax(-1)[torch.arange(3), tokens[:, place + 1]]
        assert float(found[place]) == pytest.approx(-float(chosen.mean()), abs=1e-5)
