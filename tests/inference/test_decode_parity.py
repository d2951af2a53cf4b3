"""Reading over the paged cache, in the absorbed form of attention, against a full forward."""

import pytest
import torch

from benthic.inference.paged_cache import PagedCache, PagedView, pages_for
from benthic.model import build_model
from benthic.model.mla import LatentAttention
from benthic.model.transformer import attention_context
from tests.support.models import SequenceLatents, odd_config


def views(config, tokens, dtype=torch.float32, seed=0):
    """By length, views of one sequence in a cache whose pages are in no order."""
    cache = PagedCache(config, pages_for(tokens) + 1, dtype=dtype)
    table_P = torch.randperm(cache.pages, generator=torch.Generator().manual_seed(seed)).int()
    return lambda length: PagedView(cache, table_P, length, dtype)


def test_documents_are_not_masked_over_a_cache():
    config = odd_config(0)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="document_BT"):
        build_model(config).transformer.hidden(tokens, document_BT=tokens, cache=SequenceLatents.empty(config))


def decoded(transformer, config, tokens_BT, chunks):
    """Logits (1, T, V) of tokens read in chunks over a cache."""
    view, read, logits = views(config, tokens_BT.shape[1]), 0, []
    for chunk_BT in tokens_BT.split(chunks, dim=1):
        logits.append(transformer(chunk_BT, cache=view(read)))
        read += chunk_BT.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunks", [[1] * 71, [60, *[1] * 11], [8, 57, 1, 5]])
def test_reading_over_the_cache_equals_a_full_forward_at_every_position(seed, chunks):
    config = odd_config(seed)
    transformer = build_model(config, seed=seed).transformer
    tokens_BT = torch.randint(config.vocab_size, (1, 71), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = transformer(tokens_BT)
        found = decoded(transformer, config, tokens_BT, chunks)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_long_chunks_over_the_cache_equal_a_full_forward(seed, monkeypatch):
    """Chunks so long that expanding what is cached pays, one that is too short for it, and too much that is cached."""
    config = odd_config(seed).model_copy(update={"kv_lora_rank": 64, "max_position_embeddings": 1024})
    transformer = build_model(config, seed=seed).transformer
    expanded = config.qk_nope_head_dim + config.v_head_dim
    enough = 64 * expanded // (2 * 64 - expanded) + 1
    chunks = [enough, enough, enough + 3, enough - 1]
    tokens_BT = torch.randint(config.vocab_size, (1, sum(chunks)), generator=torch.Generator().manual_seed(seed))
    absorbed, starts = LatentAttention._absorbed, []
    monkeypatch.setattr(
        LatentAttention, "_absorbed", lambda self, *args: starts.append(args[2]) or absorbed(self, *args)
    )
    with torch.inference_mode():
        expected = transformer(tokens_BT)
        found = decoded(transformer, config, tokens_BT, chunks)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)
    assert set(starts) == {sum(chunks[:3])}
    # Nor is more expanded than may be held.
    heads = config.num_attention_heads * expanded
    monkeypatch.setattr("benthic.model.mla._MOST_EXPANDED", 2 * enough * heads)
    starts.clear()
    with torch.inference_mode():
        found = decoded(transformer, config, tokens_BT, chunks)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)
    assert set(starts) == {2 * enough, sum(chunks[:3])}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_absorbed_attention_equals_naive(seed, dtype, tolerance):
    config = odd_config(seed)
    layer = build_model(config, seed=seed, dtype=dtype).transformer.layers[0].attention
    x_BTD = torch.randn(1, 19, config.hidden_size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    tokens_BT = torch.zeros(1, 19, dtype=torch.int64)
    with torch.inference_mode():
        naive = layer(x_BTD, attention_context(config, tokens_BT))
        view = views(config, 19, dtype)
        absorbed = [
            layer(x_B1D, attention_context(config, tokens_BT[:, :1], cache=view(position)))
            for position, x_B1D in enumerate(x_BTD.split(1, dim=1))
        ]
    torch.testing.assert_close(torch.cat(absorbed, dim=1), naive, rtol=0, atol=tolerance)


def test_what_is_written_again_reads_as_if_the_rest_had_never_been():
    config = odd_config(1)
    transformer = build_model(config, seed=1).transformer
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(config.vocab_size, (2, 1, 12), generator=generator)
    second[:, :7] = first[:, :7]
    view = views(config, 12)
    with torch.inference_mode():
        transformer(first, cache=view(0))
        torch.testing.assert_close(
            transformer(second[:, 7:], cache=view(7)), transformer(second)[:, 7:], rtol=0, atol=1e-5
        )
