"""Any parts of tensors are what torch draws for the whole of each, one after another."""

import random

import pytest
import torch

from benthic.ops import mersenne, normal_stream
from benthic.ops.normal_stream import NormalStream

SIZES = [48, 1, 7, 16, 17, 31, 5, 400, 3, 8, 1000, 15, 4096, 33, 9, 2]


def drawn_by_torch(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty(size, dtype=dtype).normal_(0.0, 0.02, generator=generator) for size in SIZES]


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_parts_are_those_of_what_torch_draws(monkeypatch, seed, dtype, jumps):
    monkeypatch.setattr(normal_stream, "_CHUNK", 64)
    monkeypatch.setattr(mersenne, "_FARTHEST_DRAWN", 50 if jumps else 2**25)
    choose, stream = random.Random(seed), NormalStream(seed, 0.02)
    for whole in drawn_by_torch(seed, dtype):
        start, stop = sorted(choose.choices(range(len(whole) + 1), k=2))
        start, stop = choose.choice([(start, stop), (0, len(whole)), (0, 0), (start, len(whole))])
        part = torch.full((stop - start,), torch.nan, dtype=dtype)
        stream.fill(part, start, len(whole))
        assert torch.equal(part, whole[start:stop])


def test_parts_may_have_any_shape():
    part = torch.empty(2, 3, 5)
    NormalStream(4, 0.02).fill(part, 15, 60)
    whole = torch.empty(4, 3, 5).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(4))
    assert torch.equal(part, whole[1:3])


def test_parts_of_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"not in torch\.bfloat16"):
        NormalStream(0, 1.0).fill(torch.empty(16, dtype=torch.bfloat16), 0, 32)


def test_whole_tensors_are_drawn_in_any_dtype():
    part = torch.empty(40, dtype=torch.bfloat16)
    NormalStream(0, 1.0).fill(part, 0, 40)
    assert torch.equal(part, torch.empty_like(part).normal_(generator=torch.Generator().manual_seed(0)))
