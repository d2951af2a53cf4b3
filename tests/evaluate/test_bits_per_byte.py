"""Bits per byte against a sum written out, and the interval against what statistics says of simple cases."""

import math

import numpy as np
import pytest
import torch

from benthic.config.schema import DataConfig
from benthic.data.prepare import prepare
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.model import build_model


@pytest.fixture(scope="module")
def held_out(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    prepare(DataConfig(sources=(str(texts),), validation_fraction=0.2), 320, out)
    return TokenStore(out / "data", "val")


@pytest.mark.parametrize("length", [7, 64])
def test_value_is_the_nats_of_every_token_over_the_bytes(held_out, tiny_run_config, length):
    model = build_model(tiny_run_config().model, seed=length)
    tokens = torch.from_numpy(held_out.take(np.arange(held_out.tokens)))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            piece = tokens[start : start + length + 1]
            nats += float(torch.nn.functional.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum"))
    score = bits_per_byte(model, held_out, sequence_length=length)
    assert score.value == pytest.approx(nats / math.log(2) / held_out.manifest.val.bytes, rel=1e-5)
    assert score.ci95[0] < score.value < score.ci95[1]


def test_a_single_piece_has_no_interval(held_out, tiny_run_config):
    score = bits_per_byte(build_model(tiny_run_config().model), held_out, sequence_length=held_out.tokens)
    assert (score.n, score.ci95) == (1, None)
