"""The same steps compiled for lesser processors, which this one can still run."""

import copy
import ctypes
import dataclasses
import platform

import pytest
import torch

from benthic.inference.native_decode import NativeDecoder
from benthic.inference.weights import round_weights
from benthic.ops import native
from benthic.ops.native import build


@pytest.fixture
def compiled_for(tmp_path, monkeypatch):
    """Puts a library for another architecture in place of this machine's."""

    def install(architecture):
        recipe = build._LIBRARIES["decode"]
        target = tmp_path / f"{architecture}.so"
        flags = (*recipe.flags, f"-march={architecture}")
        build._compile(build._compiler(), dataclasses.replace(recipe, flags=flags), target)
        library = ctypes.CDLL(str(target))
        library.decode_instruction_set.restype = ctypes.c_char_p
        monkeypatch.setattr(native, "decode_library", lambda: (library, "compiled for a test"))
        return library.decode_instruction_set().decode()

    return install


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 architectures")
@pytest.mark.parametrize(
    ("architecture", "name"), [("x86-64", "plain vectors"), ("haswell", "AVX2"), ("skylake-avx512", "AVX-512")]
)
def test_equals_the_transformer_on_any_instruction_set(architecture, name, compiled_for, odd_model, batch_of, close):
    if architecture == "haswell" and "avx2" not in build._processor():
        pytest.skip("this processor has no AVX2")
    if architecture == "skylake-avx512" and "avx512vl" not in build._processor():
        pytest.skip("this processor has no AVX-512")
    lengths = [0, 5, 33, 64, 130, 700]
    model = odd_model(5, first_k_dense_replace=0)
    of_this_machine = {
        precision: NativeDecoder(model, precision=precision)(*batch_of(model, lengths).arguments())[0]
        for precision in ("int8", "int4")
    }
    other = odd_model(3, kv_lora_rank=300)
    of_fp8_cache, _ = NativeDecoder(other)(*batch_of(other, lengths, 3, dtype=torch.float8_e4m3fn).arguments())
    assert compiled_for(architecture) == name
    for seed in range(6):
        model = odd_model(seed)
        logits_BV, _ = NativeDecoder(model, threads=2)(*batch_of(model, lengths, seed).arguments())
        close(logits_BV, batch_of(model, lengths, seed).expected(model)[0])
        decoder = NativeDecoder(model, threads=1)
        for row in range(len(lengths)):
            assert torch.equal(decoder(*batch_of(model, lengths, seed).arguments(row))[0][0], logits_BV[row])
    # Ties of its own latents may be broken otherwise than on this machine.
    model = odd_model(3, kv_lora_rank=300)
    cached = batch_of(model, lengths, 3, dtype=torch.float8_e4m3fn)
    close(NativeDecoder(model)(*cached.arguments())[0], of_fp8_cache, 5e-3)
    model = odd_model(5, first_k_dense_replace=0)
    batch = batch_of(model, lengths)
    for precision in ("bf16", "fp8"):
        logits_BV, _ = NativeDecoder(model, precision=precision)(*batch.arguments())
        close(logits_BV, batch_of(model, lengths).expected(round_weights(copy.deepcopy(model), precision))[0])
    for precision in ("int8", "int4"):
        # Activations a last bit apart may be rounded to different whole numbers.
        close(NativeDecoder(model, precision=precision)(*batch.arguments())[0], of_this_machine[precision], 5e-3)
