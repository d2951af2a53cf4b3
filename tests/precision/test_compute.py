"""Precision applied from outside: rounded weights in the forward pass, fp32 gradients on the master weights."""

import torch

from benthic.precision.compute import call_rounded, compute_dtype


def test_bf16_rounds_all_weights_but_those_kept():
    module = torch.nn.Sequential(torch.nn.Linear(5, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
    seen = {}
    for name, layer in module.named_children():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen.update({name: layer.weight.dtype}))
    x = torch.randn(4, 5)
    out = call_rounded(module[:1], x.bfloat16())
    expected = (x.bfloat16().float() @ module[0].weight.bfloat16().float().T).bfloat16()
    torch.testing.assert_close(out, expected)
    call_rounded(module[1:], torch.randn(4, 3), keep={"1.weight"})
    assert seen == {"0": torch.bfloat16, "1": torch.float32}
    assert module[0].weight.dtype == torch.float32


def test_gradients_pass_through_the_rounding():
    layer = torch.nn.Linear(6, 4, bias=False)
    x = torch.randn(3, 6).bfloat16()
    call_rounded(layer, x).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, x.float().sum(0).expand(4, 6), rtol=1e-2, atol=1e-2)


def test_dtypes_of_results():
    assert (compute_dtype("fp32"), compute_dtype("bf16")) == (torch.float32, torch.bfloat16)
