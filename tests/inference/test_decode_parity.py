import random

import pytest
import torch

from benthic.config.schema import ModelConfig, YarnConfig
from benthic.inference.cache import LatentCache
from benthic.model import build_model
from benthic.model.transformer import attention_context


def test_documents_are_not_masked_over_a_cache():
    config = odd_config(0)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    cache = LatentCache(config.num_hidden_layers, 1, config.latent_dim, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="document_BT"):
        build_model(config).transformer.hidden(tokens, document_BT=tokens, cache=cache)


def odd_config(seed):
    """Sizes that share no factor by design; every third has no query compression, every other one YaRN."""
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 3])
    return ModelConfig(
        vocab_size=rng.randint(30, 60),
        hidden_size=rng.randint(9, 40),
        num_hidden_layers=rng.randint(1, 4),
        first_k_dense_replace=rng.randint(0, 1),
        intermediate_size=rng.randint(5, 50),
        num_attention_heads=rng.randint(1, 5),
        q_lora_rank=None if seed % 3 == 0 else rng.randint(5, 20),
        kv_lora_rank=rng.randint(3, 24),
        qk_nope_head_dim=rng.randint(2, 17),
        qk_rope_head_dim=2 * rng.randint(1, 6),
        v_head_dim=rng.randint(2, 19),
        n_routed_experts=groups * rng.randint(2, 4),
        moe_intermediate_size=11,
        n_shared_experts=rng.randint(0, 2),
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=1,
        routed_scaling_factor=1.7,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=16) if seed % 2 else None,
    )


def decoded(transformer, config, tokens_BT, chunks, dtype):
    """Logits (B, T, V) of tokens read in chunks over a cache."""
    cache = LatentCache(config.num_hidden_layers, len(tokens_BT), config.latent_dim, dtype=dtype)
    logits = []
    for chunk in tokens_BT.split(chunks, dim=1):
        logits.append(transformer(chunk, cache=cache))
        cache.advance(chunk.shape[1])
    assert cache.nbytes() == (
        config.num_hidden_layers * tokens_BT.numel() * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    )
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunks", [[1] * 21, [13, 1, 1, 1, 1, 1, 1, 1, 1], [8, 5, 1, 7]])
def test_reading_over_the_cache_equals_a_full_forward_at_every_position(seed, chunks):
    config = odd_config(seed)
    transformer = build_model(config, seed=seed).transformer
    tokens_BT = torch.randint(config.vocab_size, (2, 21), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = transformer(tokens_BT)
        found = decoded(transformer, config, tokens_BT, chunks, torch.float32)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_absorbed_attention_equals_naive(seed, dtype, tolerance):
    config = odd_config(seed)
    layer = build_model(config, seed=seed, dtype=dtype).transformer.layers[0].attention
    x_BTD = torch.randn(2, 19, config.hidden_size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    tokens_BT = torch.zeros(2, 19, dtype=torch.int64)
    with torch.inference_mode():
        naive = layer(x_BTD, attention_context(config, tokens_BT))
        cache, absorbed = LatentCache(1, 2, config.latent_dim, dtype=dtype), []
        for x_B1D in x_BTD.split(1, dim=1):
            absorbed.append(layer(x_B1D, attention_context(config, tokens_BT[:, :1], cache=cache)))
            cache.advance(1)
    torch.testing.assert_close(torch.cat(absorbed, dim=1), naive, rtol=0, atol=tolerance)


def test_a_truncated_cache_reads_on_as_if_the_rest_had_never_been():
    config = odd_config(1)
    transformer = build_model(config, seed=1).transformer
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(config.vocab_size, (2, 1, 12), generator=generator)
    second[:, :7] = first[:, :7]
    cache = LatentCache(config.num_hidden_layers, 1, config.latent_dim, dtype=torch.float32)
    with torch.inference_mode():
        transformer(first, cache=cache)
        cache.advance(12)
        cache.truncate(7)
        torch.testing.assert_close(
            transformer(second[:, 7:], cache=cache), transformer(second)[:, 7:], rtol=0, atol=1e-5
        )
