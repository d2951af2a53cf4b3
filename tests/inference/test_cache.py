import pytest
import torch

from benthic.inference.cache import LatentCache


def filled(lengths, layers=3, batch=2, latent_dim=5):
    """A cache after steps of the given lengths, and the latents it was given."""
    cache = LatentCache(layers, batch, latent_dim, dtype=torch.float32)
    given = torch.randn(layers, batch, sum(lengths), latent_dim)
    for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        for layer in range(layers):
            seen = cache.append(layer, given[layer, :, start : start + length])
            assert torch.equal(seen, given[layer, :, : start + length])
        cache.advance(length)
    return cache, given


def test_returns_everything_appended_so_far_across_growth():
    cache, _ = filled([1, 300, 1, 1, 513, 2])
    assert cache.length == 818


def test_holds_exactly_latent_and_rotary_numbers_per_token_and_layer():
    cache, _ = filled([7, 1], layers=4, batch=1, latent_dim=16 + 8)
    assert cache.nbytes() == 4 * 8 * (16 + 8) * 4


def test_truncated_tokens_are_replaced():
    cache, given = filled([4, 3])
    cache.truncate(5)
    new = torch.randn(2, 1, 5)
    seen = cache.append(1, new)
    assert torch.equal(seen, torch.cat((given[1, :, :5], new), dim=1))


def test_truncates_only_to_what_it_holds():
    cache, _ = filled([4])
    for length in (-1, 5):
        with pytest.raises(ValueError, match="4 tokens"):
            cache.truncate(length)


def test_appending_one_by_one_copies_rarely():
    cache = LatentCache(1, 1, 2, dtype=torch.float32)
    stores = set()
    for _ in range(5000):
        stores.add(cache.append(0, torch.zeros(1, 1, 2)).data_ptr())
        cache.advance(1)
    assert len(stores) <= 10
