import pytest
import torch

from benthic.ops.latent_attention import latent_attention, latent_attention_reference


def explicit(q_latent, q_rope, latent, scale, start):
    """One query, one head and one position at a time."""
    B, H, T, C = q_latent.shape
    out = torch.empty_like(q_latent)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = latent[b, : start + t + 1]
                query = torch.cat((q_latent[b, h, t], q_rope[b, h, t]))
                out[b, h, t] = torch.softmax(seen @ query * scale, dim=0) @ seen[:, :C]
    return out


@pytest.mark.parametrize("attend", [latent_attention, latent_attention_reference])
@pytest.mark.parametrize(
    ("B", "H", "T", "start", "C", "R"),
    [(1, 1, 1, 0, 3, 2), (1, 8, 1, 37, 17, 6), (3, 5, 1, 11, 8, 4), (2, 3, 7, 0, 13, 2), (2, 3, 5, 9, 7, 10)],
)
def test_agrees_with_one_query_at_a_time(attend, B, H, T, start, C, R):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q_latent, q_rope, latent = draw(B, H, T, C), draw(B, H, T, R), draw(B, start + T, C + R)
        out = attend(q_latent, q_rope, latent, scale=0.3, start=start)
        torch.testing.assert_close(out, explicit(q_latent, q_rope, latent, 0.3, start), rtol=0, atol=1e-12)


def test_reads_a_view_of_a_longer_cache():
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 32, 12, generator=generator)
    q_latent, q_rope = torch.randn(2, 3, 1, 8, generator=generator), torch.randn(2, 3, 1, 4, generator=generator)
    out = latent_attention(q_latent, q_rope, cache[:, :9], scale=1.0, start=8)
    cache[:, 9:] = float("nan")
    again = latent_attention(q_latent, q_rope, cache[:, :9], scale=1.0, start=8)
    assert torch.equal(out, again)
    torch.testing.assert_close(out, latent_attention_reference(q_latent, q_rope, cache[:, :9], scale=1.0, start=8))


def test_a_query_does_not_see_later_positions():
    generator = torch.Generator().manual_seed(1)
    q_latent, q_rope = torch.randn(1, 2, 4, 6, generator=generator), torch.randn(1, 2, 4, 2, generator=generator)
    latent = torch.randn(1, 10, 8, generator=generator)
    before = latent_attention(q_latent, q_rope, latent, scale=0.5, start=6)
    latent[:, 8] += 1.0
    after = latent_attention(q_latent, q_rope, latent, scale=0.5, start=6)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2])
