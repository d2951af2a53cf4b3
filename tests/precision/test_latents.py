"""Rows of latents in memory, beside arithmetic in float64 and DeepSeek's published layout."""

import ctypes
import math

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.ops import native
from benthic.plan.flops import cache_bytes_per_token
from benthic.precision.latents import LatentFormat
from tests.support import compiled

SIZES = [(512, 64), (75, 18), (3, 2), (128, 2), (129, 4), (300, 16)]
FP8_KIND = 2


def form(latent, rope, dtype=torch.float8_e4m3fn):
    return LatentFormat(PRESETS["tiny"].model_copy(update={"kv_lora_rank": latent, "qk_rope_head_dim": rope}), dtype)


def latents_of(rows, width, seed):
    """Numbers over many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * torch.exp(2 * torch.randn(rows, width, generator=generator))


def test_v3_s_tokens_take_656_bytes_a_layer_laid_out_as_deepseek_s_kernels_read_them():
    kept = form(512, 64)
    assert kept.row_bytes == 656
    assert cache_bytes_per_token(PRESETS["v3-671b"], "fp8") == 61 * 656
    latent_TL = latents_of(5, 576, 0)
    row_TW = kept.pack(latent_TL)
    assert (row_TW.shape, row_TW.dtype) == ((5, 656), torch.uint8)
    numbers = row_TW[:, :512].contiguous().view(torch.float8_e4m3fn).double()
    scales = row_TW[:, 512:528].contiguous().view(torch.float32).double()
    rope = row_TW[:, 528:].contiguous().view(torch.bfloat16)
    assert torch.equal(rope, latent_TL[:, 512:].bfloat16())
    tiles = latent_TL[:, :512].double().unflatten(-1, (4, 128))
    torch.testing.assert_close(scales, tiles.abs().amax(-1) / 448, rtol=1e-6, atol=0)
    # Half a unit of a 3-bit mantissa, or of the smallest subnormal.
    worth = numbers.unflatten(-1, (4, 128)) * scales[..., None]
    assert ((worth - tiles).abs() <= (tiles.abs() / 16).maximum(scales[..., None] * 2**-10) * (1 + 1e-6)).all()
    assert torch.equal(kept.unpack(row_TW)[:, :512], worth.flatten(1).float())


@pytest.mark.parametrize(("latent", "rope"), SIZES)
def test_what_has_been_rounded_stays_as_it_is(latent, rope):
    kept = form(latent, rope)
    once = kept.rounded(latents_of(9, latent + rope, 1))
    assert kept.row_bytes == latent + 4 * math.ceil(latent / 128) + 2 * rope
    torch.testing.assert_close(kept.rounded(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wider_types_keep_numbers_as_they_are_in_them(dtype):
    latent_TL = latents_of(3, 93, 2)
    kept = form(75, 18, dtype)
    assert torch.equal(kept.rounded(latent_TL), latent_TL.to(dtype).float())
    assert kept.row_bytes == 93 * dtype.itemsize


def test_what_is_not_finite_does_not_become_so():
    latent_TL = latents_of(3, 302, 3)
    latent_TL[0, 130], latent_TL[1, 5], latent_TL[2, 301] = math.nan, -math.inf, math.inf
    worth_TL = form(300, 2).rounded(latent_TL)
    assert worth_TL[0, 128:256].isnan().all()
    assert worth_TL[1, :128].isnan().all()
    assert worth_TL[2, 301] == math.inf
    assert worth_TL.isfinite().sum() == 3 * 302 - 2 * 128 - 1


@pytest.mark.parametrize(("latent", "rope"), SIZES)
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-39, 1e30, 1e38])
def test_native_decoding_keeps_and_reads_the_same_bits(latent, rope, magnitude):
    library, reason = native.decode_library()
    if library is None:
        compiled.missing(reason)
    kept, width = form(latent, rope), latent + rope
    latent_TL = latents_of(24, width, 4) * magnitude
    latent_TL[0, :latent] = 0
    latent_TL[1, 0], latent_TL[2, -1], latent_TL[3, latent - 1] = math.nan, math.inf, -math.inf
    for row_L in latent_TL:
        row_W, back_L = torch.empty(kept.width, dtype=torch.uint8), torch.empty(width)
        library.decode_keep(
            *map(ctypes.c_int64, (FP8_KIND, latent, width)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (row_L, row_W, back_L)),
        )
        expected_W = kept.pack(row_L[None])
        assert torch.equal(row_W, expected_W[0])
        torch.testing.assert_close(back_L, kept.unpack(expected_W)[0], rtol=0, atol=0, equal_nan=True)
