from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benthic.config.presets import PRESETS
from benthic.config.schema import InferenceConfig
from benthic.data.tokenizer import Tokenizer
from benthic.inference.engine import Engine
from benthic.model import build_model


class ScriptedTransformer(nn.Module):
    """Stands for a transformer that is certain of each next token, whatever it has read."""

    def __init__(self, vocab_size, prompt_length, script):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 1)
        self.head = nn.Identity()
        self.prompt_length, self.script = prompt_length, script

    def hidden(self, tokens_BT, *, cache):
        position = cache.length + tokens_BT.shape[1] - self.prompt_length
        logits_V = torch.zeros(self.embed.num_embeddings)
        logits_V[self.script[position]] = 100.0
        return logits_V.expand(1, tokens_BT.shape[1], -1), []


class ScriptedModel(nn.Module):
    def __init__(self, config, prompt_length, script):
        super().__init__()
        self.config = config
        self.transformer = ScriptedTransformer(config.vocab_size, prompt_length, script)
        self.mtp = nn.ModuleList()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["hello there, how are you today?", "I am well. Thank you 🙂"] * 3, 290)


@pytest.fixture(scope="session")
def config(tokenizer):
    # Wide initial weights make a fresh model prefer some tokens clearly.
    return PRESETS["tiny"].model_copy(update={"vocab_size": tokenizer.vocab_size, "initializer_range": 0.3})


@pytest.fixture(scope="session")
def engine(tokenizer, config):
    return Engine(build_model(config, seed=3), tokenizer, InferenceConfig(max_new_tokens=24))


@pytest.fixture
def scripted(tokenizer, config):
    """An engine that answers a prompt with the given tokens, and that prompt."""

    def build(script):
        prompt = [tokenizer.bos_id, 40, 41]
        model = ScriptedModel(config, len(prompt), [*script, tokenizer.eos_id])
        return SimpleNamespace(engine=Engine(model, tokenizer, InferenceConfig(temperature=0.0)), prompt=prompt)

    return build
