import pytest
import torch

from benthic.ops.experts import routed_experts, routed_experts_reference


@pytest.mark.parametrize(("D", "F", "E", "K"), [(5, 3, 4, 1), (12, 7, 9, 4), (33, 20, 6, 6)])
def test_decoding_agrees_with_the_reference_without_gradients(D, F, E, K):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, gate = torch.randn(1, D, generator=generator), torch.rand(1, K, generator=generator)
        index = torch.randperm(E, generator=generator)[:K].unsqueeze(0)
        gate_up = torch.randn(E, 2 * F, D, generator=generator)
        down = torch.randn(E, D, F, generator=generator)
        with torch.inference_mode():
            out = routed_experts(x, index, gate, gate_up, down)
        expected = routed_experts_reference(x, index, gate, gate_up, down)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_one_token_still_has_gradients():
    x = torch.randn(1, 6, requires_grad=True)
    gate_up, down = torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    routed_experts(x, torch.tensor([[2, 0]]), torch.ones(1, 2), gate_up, down).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
