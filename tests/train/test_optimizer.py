"""AdamW against a float64 reference; which parameters are decayed and which are orthogonalised."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import OptimizerConfig
from benthic.errors import InputError
from benthic.model import build_model
from benthic.train.optimizer import ModelOptimizer


@pytest.fixture
def model():
    return build_model(PRESETS["tiny"], seed=1)


def set_gradients(model, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def update(model, optimizer, factor: float) -> float:
    norm = optimizer.grad_norm().item()
    optimizer.step(factor, norm)
    return norm


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_adamw_equals_its_definition_in_float64(model, scale):
    config = OptimizerConfig(learning_rate=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, clip_norm=0.5)
    optimizer = ModelOptimizer(model, config)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 5):
        set_gradients(model, step, scale)
        grads = {name: p.grad.double() for name, p in model.named_parameters()}
        norm = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        factor = 1 / step
        assert update(model, optimizer, factor) == pytest.approx(norm, rel=1e-5)
        for name, weight in weights.items():
            grad = grads[name] * min(1.0, 0.5 / norm)
            if weight.ndim >= 2:
                weight.mul_(1 - 0.01 * factor * 0.3)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            denominator = (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            weight.sub_(0.01 * factor * first[name] / (1 - 0.8**step) / denominator)
    for name, parameter in model.named_parameters():
        assert (parameter.double() - weights[name]).abs().max() < 1e-6, name


def test_norms_alone_are_not_decayed(model):
    optimizer = ModelOptimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model, optimizer, 1.0)
    for name, parameter in model.named_parameters():
        expected = before[name] if "norm" in name else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected)


def test_muon_takes_hidden_matrices_and_adamw_the_rest(model):
    config = OptimizerConfig(name="muon", matrix_learning_rate=1.0, learning_rate=1e-9, weight_decay=0, clip_norm=1e9)
    optimizer = ModelOptimizer(model, config)
    set_gradients(model, 0, 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update(model, optimizer, 1.0)
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).square().mean().sqrt()
        apart = "norm" in name or "router" in name or "embed" in name or "head" in name
        # An orthogonal matrix times 0.2 sqrt(max(R, C)) has root mean square 0.2.
        assert moved == pytest.approx(1e-9 if apart else 0.2, rel=0.3, abs=1e-7 if apart else 0), name


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_embedding_has_its_rate_where_one_is_given(model, name, moments):
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 0.05, "matrix_learning_rate": 1e-3}
    optimizer = ModelOptimizer(model, OptimizerConfig(name=name, weight_decay=0, **rates), moments)
    set_gradients(model, 0, 1.0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    update(model, optimizer, 0.5)
    for key, parameter in model.named_parameters():
        moved = (parameter.detach() - before[key]).abs().max()  # by AdamW's first step: the rate
        if "embed.weight" in key:
            assert moved == pytest.approx(0.05 * 0.5, rel=1e-3)
        elif name == "adamw" or "head" in key:
            assert moved == pytest.approx(1e-3 * 0.5, rel=1e-3), key


def test_gate_and_up_are_orthogonalised_apart(model):
    optimizer = ModelOptimizer(model, OptimizerConfig(name="muon", matrix_learning_rate=1.0, weight_decay=0))
    set_gradients(model, 0, 1.0)
    ffn = model.transformer.layers[1].ffn
    before = ffn.experts.gate_up.detach().clone()
    update(model, optimizer, 1.0)
    change = (ffn.experts.gate_up.detach() - before) / (0.2 * 64**0.5)
    assert (torch.linalg.svdvals(change.view(-1, 32, 64)) - 1).abs().max() < 0.2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_comes_back_by_parameter_name(model, name):
    config = OptimizerConfig(name=name, learning_rate=0.01)
    optimizer = ModelOptimizer(model, config)
    assert optimizer.state_tensors() == {}
    set_gradients(model, 0, 1.0)
    update(model, optimizer, 1.0)
    tensors = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    twin_model = build_model(PRESETS["tiny"], seed=2)
    twin_model.load_state_dict(model.state_dict())
    twin = ModelOptimizer(twin_model, config)
    twin.load_state_tensors(tensors, "here")
    for each_model, each in ((model, optimizer), (twin_model, twin)):
        set_gradients(each_model, 1, 1.0)
        update(each_model, each, 0.5)
    for (key, parameter), other in zip(model.named_parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(parameter, other), key


def test_state_of_another_optimizer_is_refused(model):
    optimizer = ModelOptimizer(model, OptimizerConfig())
    set_gradients(model, 0, 1.0)
    update(model, optimizer, 1.0)
    with pytest.raises(InputError, match=r"here: tensor .*(missing|unknown)"):
        ModelOptimizer(model, OptimizerConfig(name="muon")).load_state_tensors(optimizer.state_tensors(), "here")


def test_mtp_modules_have_no_state_before_they_count_but_all_or_none(model):
    optimizer = ModelOptimizer(model, OptimizerConfig())
    set_gradients(model, seed=0, scale=1.0)
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            parameter.grad = None
    update(model, optimizer, 1.0)
    saved = optimizer.state_tensors()
    assert saved
    assert not any(key.startswith("mtp.") for key in saved)
    again = ModelOptimizer(model, OptimizerConfig())
    again.load_state_tensors(saved, "here")
    assert again.state_tensors().keys() == saved.keys()
    with pytest.raises(InputError, match="here"):
        again.load_state_tensors(saved | {"mtp.0.project.weight.exp_avg": torch.zeros(1)}, "here")
    with pytest.raises(InputError, match="here"):
        again.load_state_tensors({k: v for k, v in saved.items() if "embed" not in k}, "here")
