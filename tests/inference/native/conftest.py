"""Shared by the tests of native decoding: odd models, pages of latents, and the reference one row at a time."""

import platform
import random
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch

from benthic.config.schema import ModelConfig, YarnConfig
from benthic.model import build_model
from benthic.ops import native


@dataclass
class Pages:
    """A pool of pages as the engine has it."""

    pages_N: list[torch.Tensor]


class SequenceLatents:
    """One sequence's latents in every layer, in the form ``Transformer.hidden`` reads and appends to."""

    def __init__(self, latents_NSL):
        self.latents_NSL, self.length = list(latents_NSL), latents_NSL[0].shape[0]

    def append(self, layer, latent_BTL):
        self.latents_NSL[layer] = torch.cat((self.latents_NSL[layer][: self.length], latent_BTL[0]))
        return self.latents_NSL[layer][None]


@pytest.fixture(autouse=True)
def library():
    """Where a compiler is expected, a build that fails must not pass as tests skipped."""
    library, reason = native.decode_library()
    if library is None:
        expected = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
        (pytest.fail if expected else pytest.skip)(reason)


def odd_config(seed, **changes):
    """Sizes that share no factor by design; every third has no query compression, every other one YaRN."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    sizes = {
        "vocab_size": rng.randint(30, 60), "hidden_size": rng.randint(9, 90), "num_hidden_layers": rng.randint(1, 3),
        "first_k_dense_replace": rng.randint(0, 1), "intermediate_size": rng.randint(5, 70),
        "num_attention_heads": rng.choice([1, 2, 3, 5, 8, 9, 11]),
        "q_lora_rank": None if seed % 3 == 0 else rng.randint(5, 40), "kv_lora_rank": rng.randint(3, 75),
        "qk_nope_head_dim": rng.randint(2, 35), "qk_rope_head_dim": 2 * rng.randint(1, 9),
        "v_head_dim": rng.randint(2, 35), "n_routed_experts": groups * rng.randint(2, 5),
        "moe_intermediate_size": rng.randint(3, 40), "n_shared_experts": rng.randint(0, 2), "num_experts_per_tok": 2,
        "n_group": groups, "topk_group": rng.randint(1, groups), "norm_topk_prob": rng.random() < 0.7,
        "routed_scaling_factor": 1.7, "max_position_embeddings": 4096, "initializer_range": 0.2,
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=16) if seed % 2 else None,
    }  # fmt: skip
    return ModelConfig(**sizes | changes)


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
        self.cache = Pages([layer.clone().to(dtype) for layer in pool])

    def arguments(self, *rows):
        """What a decoder is called with, for these rows."""
        index = list(rows) or slice(None)
        return self.tokens_B[index], self.positions_B[index], self.table_BP[index], self.cache

    @torch.inference_mode()
    def expected(self, model):
        """Logits (B, V) and hidden states (B, D) by plain PyTorch, a row at a time."""
        hidden = [
            model.transformer.hidden(token.view(1, 1), cache=SequenceLatents(latents))[0][0, 0]
            for token, latents in zip(self.tokens_B, self.latents, strict=True)
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
