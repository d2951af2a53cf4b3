"""Formulas of what is kept for the backward pass, against what autograd keeps."""

import pytest
import torch
from torch import Tensor, nn

from benthic.config.presets import PRESETS
from benthic.config.schema import ModelConfig
from benthic.model import build_model
from benthic.model.transformer import attention_context
from benthic.ops import native
from benthic.plan.activations import Arithmetic, block_bytes, fp8_bytes, head_bytes, mtp_bytes
from benthic.train.compute import compute_in
from benthic.train.objective import Objective, prediction_targets
from benthic.train.recompute import recompute_activations
from tests.support.kept import kept_bytes

WIDE = PRESETS["tiny"].model_copy(
    update={"hidden_size": 160, "q_lora_rank": 96, "kv_lora_rank": 72, "intermediate_size": 320, "n_shared_experts": 2,
            "moe_intermediate_size": 48, "qk_nope_head_dim": 24, "v_head_dim": 16, "vocab_size": 352}
)  # fmt: skip
CONFIGS = {
    "tiny": PRESETS["tiny"],
    "wide": WIDE,
    "no query latent": WIDE.model_copy(update={"q_lora_rank": None, "v_head_dim": 40, "norm_topk_prob": False}),
    "no shared expert": PRESETS["tiny"].model_copy(update={"n_shared_experts": 0, "num_experts_per_tok": 3}),
}
B, T = 2, 32


class _RMSNormOnGpus(torch.autograd.Function):
    """Keeps what the kernel of GPUs keeps; on CPUs PyTorch composes the norm of parts, which keep more."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = x.float()
        rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd)
        return exact * rstd * (1 if weight is None else weight)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError


@pytest.fixture(params=["native", "torch"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "off"))
        norm = lambda x, _, weight=None, eps=None: _RMSNormOnGpus.apply(x, weight, eps)  # noqa: E731
        monkeypatch.setattr("torch.nn.functional.rms_norm", norm)
    elif native._load()[0] is None:
        pytest.skip(native.status())
    return request.param == "native"


def model_for(config: ModelConfig, compute: str, recompute: bool) -> nn.Module:
    """In bf16 with rounded weights: those that are rounded for a pass are no activations."""
    model = build_model(config)
    if recompute:
        recompute_activations(model)
    if compute == "bf16":
        for name, parameter in model.named_parameters():
            if "router" not in name:
                parameter.data = parameter.data.bfloat16()
    return model


class _Called(nn.Module):
    """A block with its context."""

    def __init__(self, block: nn.Module, *arguments: object) -> None:
        super().__init__()
        self.block, self.arguments = block, arguments

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out, routing = self.block(x, *self.arguments)
        return (out,) if routing is None else (out, routing.balance_loss)


def kept_of(part: nn.Module, compute: str, config: ModelConfig, monkeypatch, *arguments: Tensor) -> int:
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    x = torch.randn(B, T, config.hidden_size, dtype=dtype, requires_grad=True)
    arguments = tuple(argument.to(dtype).requires_grad_() for argument in arguments)
    context = attention_context(config, torch.zeros(B, T, dtype=torch.long))
    called = _Called(part, *arguments, context)
    besides = [*part.parameters(), context.cos_TP, context.sin_TP]
    how = "fp8" if compute == "fp8" else "fp32"
    return kept_bytes(lambda: compute_in(how, called, x), monkeypatch, lambda: besides)


PER_EXPERT = 8
"""Bytes of the count of an expert's tokens."""


def few(config: ModelConfig) -> int:
    """What does not grow with tokens, of routed experts, a shared one, and each sequence's balance."""
    return PER_EXPERT * config.n_routed_experts + PER_EXPERT + 2 * B * 4 * config.n_routed_experts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks(fused, name, compute, recompute, monkeypatch):
    config, arithmetic = CONFIGS[name], Arithmetic(compute, recompute, fused)
    model = model_for(config, compute, recompute)
    for layer, dense in ((0, True), (1, False)):
        kept = kept_of(model.transformer.layers[layer], compute, config, monkeypatch)
        expected = B * T * block_bytes(config, arithmetic, dense=dense)
        assert 0 <= kept - expected <= (0 if dense else few(config))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
def test_mtp_modules(fused, compute, recompute, monkeypatch):
    config = CONFIGS["wide"]
    model = model_for(config, compute, recompute)
    kept = kept_of(model.mtp[0], compute, config, monkeypatch, torch.randn(B, T, config.hidden_size))
    expected = B * T * mtp_bytes(config, Arithmetic(compute, recompute, fused))
    assert 0 <= kept - expected <= few(config)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_the_whole_objective(fused, compute, depths, recompute, monkeypatch):
    config = CONFIGS["wide"].model_copy(update={"num_nextn_predict_layers": depths})
    objective = Objective(model_for(config, compute, recompute))
    tokens = torch.randint(config.vocab_size, (B, T + depths + 1))
    targets = prediction_targets(tokens, None, 1 + depths)
    how = "fp8" if compute == "fp8" else "fp32"
    kept = kept_bytes(lambda: compute_in(how, objective, tokens, None, targets)[:2], monkeypatch, objective.parameters)
    arithmetic = Arithmetic(compute, recompute, fused)
    layers = config.num_hidden_layers - 1
    per_token = block_bytes(config, arithmetic, dense=True) + layers * block_bytes(config, arithmetic, dense=False)
    expected = B * T * (per_token + depths * mtp_bytes(config, arithmetic))
    expected += head_bytes(config, arithmetic, B * T, 1 + depths)
    # Tokens, rotations and the like besides.
    assert kept == pytest.approx(expected, rel=0.01)


def test_rows_in_fp8():
    assert [fp8_bytes(width) for width in (1, 128, 129, 7168)] == [5, 132, 137, 7168 + 4 * 56]
