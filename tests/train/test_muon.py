"""Muon against the singular value decomposition and a plain loop over matrices."""

import pytest
import torch

from benthic.train.muon import POLAR_EXPRESS, Muon, orthogonalize


def polar_factor(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def approximate_polar_factor(x: torch.Tensor) -> torch.Tensor:
    """The polynomials on singular values, in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (1.02 * s.norm())
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


@pytest.mark.parametrize("shape", [(3, 17, 40), (2, 40, 17), (5, 32, 32), (1, 1, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_orthogonalize_is_the_polar_factor(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    # Singular values spread over a factor of 100.
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    x = u * torch.logspace(0, -2, u.shape[-1]) @ vh * 7.0
    got = orthogonalize(x)
    assert torch.linalg.matrix_norm(got - polar_factor(x), 2).max() < 0.15
    for row, matrix in zip(got, x, strict=True):
        assert (row - approximate_polar_factor(matrix)).abs().max() < 1e-4
    rounded = orthogonalize(x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(rounded.double() - polar_factor(x), 2).max() < 0.3


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_equal_a_loop_over_single_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    lr, momentum, decay = 0.03, 0.9, 0.2
    experts = torch.nn.Parameter(torch.randn(3, 10, 7, generator=generator))
    plain = torch.nn.Parameter(torch.randn(5, 7, generator=generator))
    expected = [m.detach().double().clone() for m in (*experts.view(6, 5, 7), plain)]
    buffers = [torch.zeros_like(m) for m in expected]
    optimizer = Muon(
        [{"params": [experts], "parts": 2}, {"params": [plain]}], lr, momentum=momentum, weight_decay=decay
    )
    for _ in range(4):
        experts.grad = torch.randn(3, 10, 7, generator=generator)
        plain.grad = torch.randn(5, 7, generator=generator)
        optimizer.step()
        for i, grad in enumerate((*experts.grad.view(6, 5, 7), plain.grad)):
            buffers[i] = momentum * buffers[i] + (1 - momentum) * grad.double()
            update = momentum * buffers[i] + (1 - momentum) * grad.double()
            expected[i] = expected[i] * (1 - lr * decay) - lr * 0.2 * 7**0.5 * approximate_polar_factor(update)
    for got, want in zip((*experts.view(6, 5, 7), plain), expected, strict=True):
        assert (got.double() - want).abs().max() < 1e-5


def test_parts_of_a_fused_weight_are_orthogonal_by_themselves():
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [weight], "parts": 2}], lr=1.0).step()
    for part in weight.detach().view(2, 4, 6) / (0.2 * 6**0.5):
        assert (torch.linalg.svdvals(part) - 1).abs().max() < 0.15
    assert (torch.linalg.svdvals(weight.detach() / (0.2 * 6**0.5)) - 1).abs().max() > 0.3
