"""Huge pages: which memory the system is asked for, and that nothing in it changes."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from benthic.inference import huge_pages

MIB = 2**20


@pytest.fixture
def asked(monkeypatch):
    """Ranges of memory that were to go to huge pages."""
    ranges = []
    library = ctypes.CDLL(None)

    def madvise(start, length, advice):
        ranges.append((start, length, advice))
        return library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    return ranges


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_all_whole_huge_pages_within_a_tensor_are_asked_for_and_nothing_else(asked):
    tensors = [torch.randn(3 * MIB), torch.randn(700, 1500), torch.randn(1000), torch.empty(9 * MIB, device="meta")]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors[:3]]
    huge_pages.use_huge_pages(tensors)
    for tensor, (place, value) in zip(tensors, before, strict=False):
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, value)
    # Every multiple of 2 MiB at which a whole huge page still fits; the last two tensors have none.
    pages = [
        [at for at in range(place + -place % 4096, place + value.nbytes - 2 * MIB + 1, 4096) if at % (2 * MIB) == 0]
        for place, value in before[:2]
    ]
    expected = [(found[0], 2 * MIB * len(found)) for found in pages]
    assert asked == [(*each, advice) for each in expected for advice in (14, 25)]


def test_nothing_is_asked_elsewhere(asked, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    huge_pages.use_huge_pages([torch.empty(3 * MIB)])
    assert not asked
