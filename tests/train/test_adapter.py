"""Low-rank adapters: the gradients and outputs of W0 x + alpha / rank B A x, computed with plain weights."""

import pytest
import torch

from benthic.config.posttrain import AdapterConfig
from benthic.config.presets import PRESETS
from benthic.config.schema import OptimizerConfig
from benthic.data.batches import Batch
from benthic.errors import InputError
from benthic.model import build_model
from benthic.train.adapter import AdapterOptimizer, Adapters
from benthic.train.objective import Objective
from benthic.train.schedule import StepSettings
from benthic.train.step import accumulate_gradients, train_step

CONFIG = PRESETS["tiny"].model_copy(update={"num_hidden_layers": 2, "vocab_size": 50})
SETTINGS = StepSettings(0, 4, 1.0, 0.0, 0.3, 1e-2)


def model():
    return build_model(CONFIG, seed=3)


def batch(seed):
    return Batch(torch.randint(50, (4, 18), generator=torch.Generator().manual_seed(seed)), None)


def moved(adapters):
    """Updates that are not nothing."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for up in adapters.up.values():
            up.normal_(0.0, 0.05, generator=generator)
    adapters.merge()


def unmerged(target_model, adapters, start, scale):
    """The linear layers compute W0 x + scale B (A x), by autograd; returns the leaves A and B."""
    leaves = {}
    for name, module in target_model.named_modules():
        key = f"{name}.weight".replace(".", "/")
        if key in adapters.down:
            down, up = (of[key].detach().clone().requires_grad_() for of in (adapters.down, adapters.up))
            leaves[key] = down, up
            with torch.no_grad():
                module.weight.copy_(start[f"{name}.weight"])
            module.register_forward_hook(
                lambda _, inputs, out, down=down, up=up: out + scale * (inputs[0] @ down.T @ up.T)
            )
    return leaves


@pytest.mark.parametrize("targets", [("attention",), ("q_b", "ffn.shared", "mtp.0.project"), ("down",)])
@pytest.mark.parametrize("micro", [4, 1])
def test_gradients_and_outputs_are_those_of_unmerged_adapters(targets, micro):
    one, other = model(), model()
    start = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    linear = tuple(target for target in targets if target != "down") or ("ffn.shared.down", "ffn.down")
    adapters = Adapters(one, AdapterConfig(rank=4, alpha=6.0, targets=linear), seed=1)
    moved(adapters)
    leaves = unmerged(other, adapters, start, 6.0 / 4)
    tokens = batch(0).tokens_BS
    torch.testing.assert_close(one(tokens), other(tokens), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one(tokens), model()(tokens), atol=1e-3)
    optimizer = AdapterOptimizer(adapters, OptimizerConfig())
    accumulate_gradients(Objective(one), batch(0), SETTINGS, micro_batch_size=micro, compute="fp32")
    accumulate_gradients(Objective(other), batch(0), SETTINGS, micro_batch_size=4, compute="fp32")
    assert leaves.keys() == adapters.down.keys()
    for key, (down, up) in leaves.items():
        torch.testing.assert_close(adapters.down[key].grad, down.grad, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(adapters.up[key].grad, up.grad, atol=1e-6, rtol=1e-3)
    # Nothing of the model itself has a gradient, whether it is frozen or merged.
    assert all(parameter.grad is None for parameter in one.parameters())
    expected = torch.stack([leaf.grad.norm() for pair in leaves.values() for leaf in pair]).norm()
    torch.testing.assert_close(optimizer.grad_norm(), expected, atol=1e-6, rtol=1e-3)


def test_stacked_experts_have_updates_of_their_own():
    one = model()
    adapters = Adapters(one, AdapterConfig(rank=2, alpha=2.0, targets=("experts",)), seed=1)
    weight = one.transformer.layers[1].ffn.experts.gate_up
    key = "transformer/layers/1/ffn/experts/gate_up"
    start = weight.detach().clone()
    moved(adapters)
    accumulate_gradients(Objective(one), batch(2), SETTINGS, micro_batch_size=4, compute="fp32")
    grads = adapters.up[key].grad.clone(), adapters.down[key].grad.clone()
    # The same, from the gradient of the merged weight in a model without adapters.
    plain = model()
    plain.load_state_dict(one.state_dict())
    accumulate_gradients(Objective(plain), batch(2), SETTINGS, micro_batch_size=4, compute="fp32")
    whole = plain.transformer.layers[1].ffn.experts.gate_up.grad
    for expert in range(CONFIG.n_routed_experts):
        up, down = adapters.up[key][expert], adapters.down[key][expert]
        torch.testing.assert_close(weight[expert], start[expert] + up @ down)
        torch.testing.assert_close(grads[0][expert], whole[expert] @ down.T, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(grads[1][expert], up.T @ whole[expert], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
def test_steps_change_the_targets_alone_and_learn(compute):
    one = model()
    before = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    adapters = Adapters(one, AdapterConfig(rank=8, alpha=16.0), seed=1)
    optimizer = AdapterOptimizer(adapters, OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0))
    losses = [
        train_step(Objective(one), optimizer, batch(0), SETTINGS, micro_batch_size=4, compute=compute).cross_entropy[0]
        for _ in range(12)
    ]
    assert losses[-1] < losses[0] - 0.3
    changed = {name for name, weight in one.named_parameters() if not torch.equal(weight, before[name])}
    expected = {name for name, weight in one.named_parameters() if ".attention." in name and weight.ndim > 1}
    assert changed == expected
    assert any(name.startswith("mtp.") for name in changed)
    for name in changed:
        update = (one.get_parameter(name) - before[name]).detach()
        assert torch.linalg.matrix_rank(update, atol=1e-5) <= 8


def test_targets_and_ranks_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"no matrix has 'q_proj' in its name; parts are .*attention.*q_b"):
        Adapters(model(), AdapterConfig(targets=("q_proj",)), seed=0)
    with pytest.raises(InputError, match=r"adapter.rank=17: must be at most 16, a side of .*kv_b.weight"):
        Adapters(model(), AdapterConfig(rank=17, targets=("kv_b",)), seed=0)
