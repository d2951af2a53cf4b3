"""What a training begins with: the spread of its weights."""

import pytest
import torch

from benthic.lab.dense import Dense, DenseSizes
from benthic.model import build_model
from benthic.train.architecture import DEEPSEEK_V3
from benthic.train.state import TrainState
from tests.support.spread import settings

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "intermediate_size": 40}


def beginning(architecture=DEEPSEEK_V3, model=None, **train):
    config = settings(model=model, **train)
    state = TrainState(config, architecture)
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def test_weights_are_those_of_a_model_that_is_built():
    config = settings(seed=3).model
    built = build_model(config, seed=3).state_dict()
    for name, tensor in beginning(seed=3).items():
        assert torch.equal(tensor, built[name]), name


@pytest.mark.parametrize("std", [0.001, 1.0])
@pytest.mark.parametrize("dense", [False, True])
def test_the_embedding_alone_has_a_spread_of_its_own(dense, std):
    kind = (Dense(DenseSizes(**SIZES)), {"num_nextn_predict_layers": 0}) if dense else (DEEPSEEK_V3, None)
    usual, other = beginning(*kind), beginning(*kind, embedding_std=std)
    for name, tensor in usual.items():
        if "embed.weight" in name:
            torch.testing.assert_close(other[name], tensor * (std / 0.1))
            assert other[name].std() == pytest.approx(std, rel=0.1)
        else:
            assert torch.equal(other[name], tensor), name
