import copy

import pytest
import torch

from benthic.data.batches import validation_batches
from benthic.data.prepare import prepare
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.evaluate.precision_loss import precision_loss
from benthic.inference.weights import round_weights
from benthic.model import build_model


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
