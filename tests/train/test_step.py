"""One step: micro-batches add up, what is not finite changes nothing, and the bias evens the load."""

import copy
from dataclasses import replace

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import OptimizerConfig
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.train.objective import Objective
from benthic.train.optimizer import ModelOptimizer
from benthic.train.schedule import StepSettings
from benthic.train.step import accumulate_gradients, train_step, update_router_bias

SETTINGS = StepSettings(
    first_sequence=0, batch_size=6, learning_rate_factor=1.0, bias_speed=0.01, mtp_weight=0.3, balance_weight=0.01
)


def build(seed: int = 0, dtype: torch.dtype | None = None) -> Objective:
    return Objective(build_model(PRESETS["tiny"], seed=seed, dtype=dtype))


def batch(seed: int = 0, rows: int = 6, masked: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(320, (rows, 18), generator=generator)
    document = torch.rand(rows, 18, generator=generator).lt(0.3).cumsum(1) if masked else None
    return Batch(tokens, document)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_gradients_and_losses_do_not_depend_on_how_a_batch_is_cut(masked, micro):
    whole, cut = build(dtype=torch.float64), build(dtype=torch.float64)
    expected = accumulate_gradients(whole, batch(masked=masked), SETTINGS, micro_batch_size=6, compute="fp32")
    got = accumulate_gradients(cut, batch(masked=masked), SETTINGS, micro_batch_size=micro, compute="fp32")
    for left, right in zip(expected, got, strict=True):
        torch.testing.assert_close(left, right)
    for (name, left), right in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert (left.grad - right.grad).norm() < 1e-6 * left.grad.norm(), name


def test_gradients_in_bf16_point_where_those_in_fp32_do():
    gradients = []
    for compute in ("fp32", "bf16"):
        objective = build(seed=1)
        accumulate_gradients(objective, batch(), SETTINGS, micro_batch_size=6, compute=compute)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in objective.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


def test_mtp_modules_that_count_for_nothing_do_not_run():
    without, ignored = build(dtype=torch.float64), build(dtype=torch.float64)
    settings = replace(SETTINGS, mtp_weight=0.0)
    tokens = batch().tokens_BS
    losses = accumulate_gradients(ignored, Batch(tokens, None), settings, micro_batch_size=4, compute="fp32")
    without.model.mtp = torch.nn.ModuleList()
    expected = accumulate_gradients(without, Batch(tokens[:, :-1], None), SETTINGS, micro_batch_size=4, compute="fp32")
    for left, right in zip(losses, expected, strict=True):
        torch.testing.assert_close(left, right)
    gradients = dict(without.named_parameters())
    for name, parameter in ignored.named_parameters():
        if name.startswith("model.mtp."):
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name].grad)


def everything(objective: Objective, optimizer: ModelOptimizer) -> dict[str, torch.Tensor]:
    return {
        key: tensor.clone() for key, tensor in (*objective.state_dict().items(), *optimizer.state_tensors().items())
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_is_not_finite_changes_nothing(value, where, name):
    objective = build()
    optimizer = ModelOptimizer(objective.model, OptimizerConfig(name=name))
    assert train_step(objective, optimizer, batch(0), SETTINGS, micro_batch_size=6, compute="fp32").updated
    before = everything(objective, optimizer)
    target = objective.model.transformer.layers[1].attention.o
    if where == "loss":
        hook = target.register_forward_hook(lambda module, inputs, out: out * value)
    else:
        hook = target.weight.register_hook(lambda gradient: gradient * value)
    report = train_step(objective, optimizer, batch(1), SETTINGS, micro_batch_size=2, compute="fp32")
    assert not report.updated
    after = everything(objective, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    hook.remove()
    assert train_step(objective, optimizer, batch(1), SETTINGS, micro_batch_size=2, compute="fp32").updated
    after = everything(objective, optimizer)
    assert not all(torch.equal(before[key], after[key]) for key in before)


def test_bias_moves_by_the_speed_towards_the_mean_load():
    router = build().routers[0]
    update_router_bias([router], torch.tensor([[4, 4, 0, 8, 9, 1, 2, 4]]), 0.25)
    assert router.bias.tolist() == [0, 0, 0.25, -0.25, -0.25, 0.25, 0.25, 0]
    update_router_bias([router], torch.tensor([[4, 4, 0, 8, 9, 1, 2, 4]]), 0.0)
    assert router.bias.tolist() == [0, 0, 0.25, -0.25, -0.25, 0.25, 0.25, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bias_updates_even_the_load_in_every_layer_and_mtp_module(seed):
    objective = build(seed)
    with torch.no_grad():
        for router in objective.routers:
            router.weight.mul_(5)
            # A strong preference for some experts.
            router.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    still = StepSettings(**{**vars(SETTINGS), "learning_rate_factor": 0.0})
    optimizer = ModelOptimizer(objective.model, OptimizerConfig())
    data = batch(seed, rows=32)

    def worst() -> torch.Tensor:
        twin = copy.deepcopy(objective)
        load = accumulate_gradients(twin, data, still, micro_batch_size=32, compute="fp32").load_ME.float()
        return load.amax(1) / load.mean(1)

    before = worst()
    for _ in range(40):
        train_step(objective, optimizer, data, still, micro_batch_size=32, compute="fp32")
    after = worst()
    assert before.shape == (3,)
    assert (before > 1.6).all()
    assert (after < 1.3).all()
