"""AdamW with moments in few bits: torch's own when they are fp32, close to it when they are bf16."""

import pytest
import torch

from benthic.train.adamw import LowPrecisionAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def trajectory(make, steps=30):
    torch.manual_seed(0)
    params = [torch.randn(7, 5).requires_grad_(), torch.randn(11).requires_grad_()]
    optimizer = make([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}])
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param) * 10.0 ** torch.randn(()) + param.detach()
        optimizer.step()
    return params, optimizer


def test_in_fp32_it_is_torchs():
    ours, _ = trajectory(lambda groups: LowPrecisionAdamW(groups, **SETTINGS, moments=torch.float32))
    theirs, _ = trajectory(lambda groups: torch.optim.AdamW(groups, **SETTINGS))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_moments_are_bf16_and_weights_fp32():
    ours, optimizer = trajectory(lambda groups: LowPrecisionAdamW(groups, **SETTINGS))
    theirs, _ = trajectory(lambda groups: torch.optim.AdamW(groups, **SETTINGS))
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == torch.float32
        assert {optimizer.state[left][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        assert 0 < (left - right).abs().max() < 1e-2


def test_a_parameter_without_gradient_stays():
    param = torch.ones(3, requires_grad=True)
    LowPrecisionAdamW([{"params": [param]}], **SETTINGS, weight_decay=0.5).step()
    assert param.tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_first_step_is_the_learning_rate_whatever_the_gradients_size(scale):
    param = torch.zeros(5, requires_grad=True)
    param.grad = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0]) * scale
    LowPrecisionAdamW([{"params": [param]}], **{**SETTINGS, "eps": 0.0}).step()
    torch.testing.assert_close(param.detach(), -0.01 * param.grad.sign())
