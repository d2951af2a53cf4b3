import pytest
import torch

from benthic.precision.panels import pack_panels
from benthic.precision.quantise import (
    PRECISIONS,
    bytes_per_number,
    dequantise_groups,
    quantise_groups,
    rounded,
)

SHAPES = [(1, 1), (3, 31), (5, 32), (17, 33), (16, 64), (40, 200)]


def by_hand(row, bits):
    """One group's numbers and scale in plain Python."""
    extreme = max(row, key=abs)
    if bits == 4:
        scale = float(torch.tensor(extreme / -8).bfloat16())
    else:
        nearest = torch.tensor(abs(extreme) / 127).bfloat16()
        scale = float(nearest)
        if scale < torch.tensor(abs(extreme) / 127):
            scale = float((nearest.view(torch.int16) + 1).view(torch.bfloat16))
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    return [min(max(round(x / scale), low), high) if scale else 0 for x in row], scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_and_scales_are_those_computed_by_hand(shape, bits):
    weight_MK = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    numbers_MK, scale_MQ = quantise_groups(weight_MK, bits)
    assert numbers_MK.shape == shape
    for row, numbers, scales in zip(weight_MK.tolist(), numbers_MK.tolist(), scale_MQ.tolist(), strict=True):
        for q, scale in enumerate(scales):
            expected, expected_scale = by_hand(row[32 * q : 32 * q + 32], bits)
            assert scale == pytest.approx(expected_scale, rel=1e-6)
            found = numbers[32 * q : 32 * q + 32]
            # Halves may go either way, for a product with the inverse is not quite a quotient.
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= (1 if bits == 8 else 0)
            assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(8, -127, 127), (4, -8, 7)])
def test_the_whole_range_is_used_and_errors_are_at_most_half_a_step(bits, lowest, highest):
    weight_MK = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    numbers_MK, scale_MQ = quantise_groups(weight_MK, bits)
    assert (int(numbers_MK.min()), int(numbers_MK.max())) == (lowest, highest)
    error_MQG = (dequantise_groups(numbers_MK, scale_MQ) - weight_MK).abs().unflatten(-1, (-1, 32))
    step_MQ = scale_MQ.float().abs()
    # With four bits the side opposite the extreme ends at 7, so that a number there may lose up to one step.
    assert (error_MQG.amax(-1) <= step_MQ * (0.5001 if bits == 8 else 1.04)).all()
    assert float((error_MQG.mean((-1)) / step_MQ).mean()) < 0.27


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_finite(bits):
    weight_MK = torch.zeros(3, 64)
    weight_MK[1, 40], weight_MK[2, 3] = float("inf"), float("nan")
    numbers_MK, scale_MQ = quantise_groups(weight_MK, bits)
    worth_MK = dequantise_groups(numbers_MK, scale_MQ)
    assert worth_MK[0].eq(0).all()
    assert not worth_MK[1, 32:].isfinite().any()
    assert not worth_MK[2, :32].isfinite().any()
    assert worth_MK[1, :32].eq(0).all()


@pytest.mark.parametrize(
    ("precision", "error"), [("fp32", 0.0), ("bf16", 0.003), ("fp8", 0.04), ("int8", 0.008), ("int4", 0.11)]
)
def test_error_of_normal_weights(precision, error):
    weight_MK = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    found = float((rounded(weight_MK, precision) - weight_MK).norm() / weight_MK.norm())
    assert error / 2 <= found <= error


def test_bytes_are_those_of_the_tensors():
    weight_SMK = torch.randn(1, 256, 512)
    for precision, bits in (("int8", 8), ("int4", 4)):
        panels = pack_panels(*quantise_groups(weight_SMK, bits), bits)
        assert panels.nbytes == weight_SMK.numel() * bytes_per_number(precision)
    assert [bytes_per_number(precision) for precision in PRECISIONS] == [4, 2, 1 + 4 / 128**2, 1.0625, 0.5625]


@pytest.mark.parametrize("shape", [(1, *shape) for shape in SHAPES] + [(3, 18, 70)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_is_where_the_layout_says(shape, bits):
    stack, rows, columns = shape
    weight_SMK = torch.randn(shape, generator=torch.Generator().manual_seed(columns))
    numbers_SMK, scale_SMG = quantise_groups(weight_SMK, bits)
    panels = pack_panels(numbers_SMK, scale_SMG, bits)
    assert panels.shape == (stack, -(-rows // 16), -(-columns // 64), 64 + (1024 if bits == 8 else 512))
    for s in range(stack):
        for m in range(rows):
            for k in range(columns):
                pair = panels[s, m // 16, k // 64]
                group, quad, i = k % 64 // 32, k % 32 // 4, k % 4
                scale = pair[:64].view(torch.bfloat16)[16 * group + m % 16]
                assert scale == scale_SMG[s, m, k // 32]
                if bits == 8:
                    number = int(pair[64 + 512 * group + 64 * quad + 4 * (m % 16) + i]) - 128
                else:
                    both = int(pair[64 + 256 * group + 64 * (quad % 4) + 4 * (m % 16) + i])
                    number = (both >> 4 if quad >= 4 else both & 15) - 8
                assert number == numbers_SMK[s, m, k]
