"""Native decoding with weights in fewer bits: products one by one, then whole steps."""

import copy
import ctypes

import pytest
import torch

from benthic.inference.native_decode import NativeDecoder
from benthic.inference.native_layout import Matrix
from benthic.inference.weights import block_matrices, blocks_of, round_weights
from benthic.ops import native
from benthic.precision.blocks import dequantise_blocks, quantise_blocks
from benthic.precision.panels import pack_panels
from benthic.precision.quantise import PRECISIONS, bits_of, dequantise_groups, quantise_groups

SHAPES = [(1, 1), (3, 5), (16, 16), (17, 31), (40, 64), (33, 129), (144, 300), (260, 257)]


def kept(weight_SMK, precision):
    """A stack as native decoding keeps it, the tensors behind it, and what it is worth in float64."""
    rows, columns = weight_SMK.shape[1:]
    scales = None
    if precision in ("int8", "int4"):
        bits = bits_of(precision)
        groups = quantise_groups(weight_SMK, bits)
        data, worth_SMK = pack_panels(*groups, bits), dequantise_groups(*groups)
        kind = Matrix.INT8 if bits == 8 else Matrix.INT4
    elif precision == "fp8":
        data, scales = quantise_blocks(weight_SMK)
        worth_SMK, kind = dequantise_blocks(data, scales), Matrix.FP8
    else:
        data = weight_SMK.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        worth_SMK, kind = data, Matrix.BF16 if precision == "bf16" else Matrix.FP32
    matrix = Matrix(
        data=data.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        kind=kind,
        rows=rows,
        columns=columns,
    )
    return matrix, (data, scales), worth_SMK.double()


def product(matrix, index, x_NK):
    library, _ = native.decode_library()
    out_NM = torch.full((len(x_NK), matrix.rows), float("nan"))
    x_NK = x_NK.contiguous()
    library.decode_multiply(
        ctypes.byref(matrix), ctypes.c_int64(index), ctypes.c_void_p(x_NK.data_ptr()), ctypes.c_int64(len(x_NK)),
        ctypes.c_void_p(out_NM.data_ptr()),
    )  # fmt: skip
    return out_NM


def in_8_bits(x_NK):
    """Activations as int8 and int4 products take them: whole numbers up to 127 times an fp32 scale, in groups of 32."""
    groups = torch.nn.functional.pad(x_NK, (0, -x_NK.shape[-1] % 32)).unflatten(-1, (-1, 32))
    top = groups.abs().amax(-1, keepdim=True)
    whole = (groups * torch.where(top > 0, 127 / top, 0)).round()
    return (whole.double() * (top / 127).double()).flatten(-2)[..., : x_NK.shape[-1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_those_of_float64(shape, precision):
    generator = torch.Generator().manual_seed(sum(shape))
    weight_SMK = torch.randn(3, *shape, generator=generator)
    x_NK = torch.randn(7, shape[1], generator=generator) * 3
    matrix, _alive, worth_SMK = kept(weight_SMK, precision)
    seen_NK = in_8_bits(x_NK) if precision in ("int8", "int4") else x_NK.double()
    for index in range(3):
        expected_NM = seen_NK @ worth_SMK[index].T
        found_NM = product(matrix, index, x_NK)
        scale = float((seen_NK.abs() @ worth_SMK[index].abs().T).max())
        torch.testing.assert_close(found_NM.double() / scale, expected_NM / scale, rtol=0, atol=2e-7)
        for count in (1, 2, 3, 4, 5):
            assert torch.equal(product(matrix, index, x_NK[:count]), found_NM[:count])


def test_every_e4m3_number_is_read_exactly():
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers.view(torch.float8_e4m3fn).float().isfinite()]
    data, one = numbers.view(-1, 1).clone(), torch.ones(2, 1)
    matrix = Matrix(data=data.data_ptr(), scales=one.data_ptr(), kind=Matrix.FP8, rows=len(data), columns=1)
    assert torch.equal(product(matrix, 0, torch.ones(1, 1))[0], numbers.view(torch.float8_e4m3fn).float())
    wide = data.expand(-1, 32).contiguous()
    matrix = Matrix(data=wide.data_ptr(), scales=one.data_ptr(), kind=Matrix.FP8, rows=len(data), columns=32)
    assert torch.equal(product(matrix, 0, torch.ones(1, 32))[0], 32 * numbers.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_activations_that_are_not_finite_are_not_hidden(precision):
    matrix, _alive, _ = kept(torch.randn(1, 20, 70), precision)
    for value in ("nan", "inf", "-inf"):
        x_NK = torch.randn(2, 70)
        x_NK[1, 50] = float(value)
        found_NM = product(matrix, 0, x_NK)
        assert found_NM[0].isfinite().all()
        assert not found_NM[1].isfinite().any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-5), ("fp8", 1e-5)])
def test_steps_equal_those_of_the_rounded_model(seed, precision, tolerance, odd_model, batch_of, close):
    model = odd_model(seed, num_nextn_predict_layers=1)
    lengths = [0, 5, 64, 130]
    decoder = NativeDecoder(model, precision=precision, threads=2)
    logits_BV, _ = decoder(*batch_of(model, lengths, seed).arguments())
    plain_BV, _ = batch_of(model, lengths, seed).expected(model)
    expected_BV, _ = batch_of(model, lengths, seed).expected(round_weights(model, precision))
    close(logits_BV, expected_BV, tolerance)
    if precision != "fp32":
        assert float((expected_BV - plain_BV).abs().max()) > 100 * float((logits_BV - expected_BV).abs().max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_activations_add_little(seed, precision, odd_model, batch_of):
    # One dense layer: no router, whose choice a rounding may turn over.
    model = odd_model(seed, num_hidden_layers=1, first_k_dense_replace=1, hidden_size=64)
    lengths = [0, 5, 64, 130]
    logits_BV, _ = NativeDecoder(model, precision=precision, threads=2)(*batch_of(model, lengths, seed).arguments())
    plain_BV, _ = batch_of(model, lengths, seed).expected(model)
    expected_BV, _ = batch_of(model, lengths, seed).expected(round_weights(model, precision))
    assert float((logits_BV - expected_BV).norm() / expected_BV.norm()) < 0.03
    if precision == "int4":
        assert float((plain_BV - expected_BV).norm() / expected_BV.norm()) > 0.03


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_a_row_is_the_same_bits_in_any_batch_in_any_precision(precision, odd_model, batch_of):
    model = odd_model(1, first_k_dense_replace=0)
    lengths = [3, 64, 0, 130, 7, 31, 200]
    batch = batch_of(model, lengths, 0)
    whole_BV, _ = NativeDecoder(model, precision=precision, threads=2)(*batch.arguments())
    for threads, rows in ((1, [3]), (2, [0]), (3, [6, 2, 4]), (2, [1, 2, 3, 4, 5])):
        found_BV, _ = NativeDecoder(model, precision=precision, threads=threads)(*batch.arguments(*rows))
        assert torch.equal(found_BV, whole_BV[rows])


def test_only_matrices_are_rounded(odd_model):
    model = odd_model(2, num_nextn_predict_layers=1, first_k_dense_replace=0)
    before = copy.deepcopy(model.state_dict())
    round_weights(model, "int4")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    kept_whole = {name for name in before if "norm" in name or "router" in name or "embed" in name}
    assert same == kept_whole
    head = before["transformer.head.weight"]
    error = (model.transformer.head.weight - head).norm() / head.norm()
    assert error < 0.01, "the head is kept in 8 bits"


def test_the_matrices_of_a_block_are_all_there_is(odd_model):
    for seed in range(4):
        for block in blocks_of(odd_model(seed, num_nextn_predict_layers=1)):
            matrices = sum(weight.numel() for weight in block_matrices(block).values())
            others = sum(p.numel() for name, p in block.named_parameters() if "norm" in name or "router" in name)
            assert matrices + others == sum(p.numel() for p in block.parameters())
