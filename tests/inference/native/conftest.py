"""Shared by the tests of native decoding: odd models, pages of latents, and the reference one row at a time."""

from dataclasses import dataclass

import pytest
import torch

from benthic.model import build_model
from benthic.ops import native
from benthic.precision.latents import LatentFormat
from tests.support import compiled
from tests.support.models import SequenceLatents, odd_config


@dataclass
class Pages:
    """A pool of pages as the engine has it."""

    pages_N: list[torch.Tensor]


@pytest.fixture(autouse=True)
def library():
    """None of these tests is of use without."""
    library, reason = native.decode_library()
    if library is None:
        compiled.missing(reason)


def build_odd_model(seed, *, dtype=None, **changes):
    """A model whose routers are biased, as training leaves them."""
    model = build_model(odd_config(seed, **changes), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("router.bias"):
            buffer.normal_(0.0, 0.1, generator=generator)
    return model


class RandomBatch:
    """Rows of random tokens over random latents, each row's pages scattered over one pool."""

    def __init__(self, model, lengths, seed=0, dtype=torch.float32):
        config, generator = model.config, torch.Generator().manual_seed(seed)
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.tokens_B = torch.randint(config.vocab_size, (len(lengths),), generator=generator)
        self.positions_B = torch.tensor(lengths)
        self.latents = [torch.randn(layers, length, config.latent_dim, generator=generator) for length in lengths]
        needed = [length // 64 + 1 for length in lengths]
        order = torch.randperm(sum(needed) + 2, generator=generator).int().split([*needed, 2])
        self.table_BP = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
        # What no row has written must not matter.
        pool = torch.full((layers, sum(needed) + 2, 64, config.latent_dim), float("nan"))
        for row, (pages, latents_NSL) in enumerate(zip(order, self.latents, strict=False)):
            self.table_BP[row, : len(pages)] = pages
            for page, part in zip(pages, latents_NSL.split(64, dim=1), strict=False):
                pool[:, page, : part.shape[1]] = part
        self.format = LatentFormat(config, dtype)
        self.cache = Pages([self.format.pack(layer) for layer in pool.clone()])

    def arguments(self, *rows):
        """What a decoder is called with, for these rows."""
        index = list(rows) or slice(None)
        return self.tokens_B[index], self.positions_B[index], self.table_BP[index], self.cache

    @torch.inference_mode()
    def expected(self, model, kept=None):
        """Logits (B, V) and hidden states (B, D) by plain PyTorch, row by row, new latents as ``kept(row)`` gives."""
        hidden = [
            model.transformer.hidden(token.view(1, 1), cache=SequenceLatents(latents, kept and kept(row)))[0][0, 0]
            for row, (token, latents) in enumerate(zip(self.tokens_B, self.latents, strict=True))
        ]
        hidden_BD = torch.stack(hidden)
        return model.transformer.head(hidden_BD), hidden_BD


@pytest.fixture
def odd_model():
    """Builds the model of a seed; keywords are sizes."""
    return build_odd_model


@pytest.fixture
def batch_of():
    """Builds rows of given lengths for a model."""
    return RandomBatch


@pytest.fixture
def latents_of():
    """One sequence's latents as a cache."""
    return SequenceLatents


@pytest.fixture
def close():
    """Asserts equality up to a share of the largest number."""

    def check(found, expected, tolerance=1e-5):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)

    return check
