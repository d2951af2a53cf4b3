"""A model with random weights, and what transformers says of it."""

import pytest

from benthic.convert.resolve import find_tokenizer, load_model
from benthic.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small(served_model):
    """Model and tokenizer."""
    return load_model(served_model)[0].eval(), Tokenizer.load(find_tokenizer(served_model))


@pytest.fixture(scope="session")
def peer(served_model):
    """The same model in transformers: called with ids (B, T), it gives logits (B, T, V)."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(served_model / "model").eval()
    return lambda ids: model(ids).logits
