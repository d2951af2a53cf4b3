"""Training with FP8 products: which parts take them, how near the losses stay, and that a resumed run is the same."""

from contextlib import nullcontext

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import PrecisionConfig
from benthic.model import build_model
from benthic.precision import weight_copies
from benthic.precision.fp8 import quantise
from benthic.precision.weight_copies import quantised_once
from benthic.train import loop, step
from benthic.train.checkpoint import committed, load
from benthic.train.compute import compute_in, fp8_products
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.objective import Objective, prediction_targets
from benthic.train.trial import RandomSequences, Trial

ATTENTION = {f"attention.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")}
SHARED = {"ffn.experts", "ffn.shared", "ffn.shared.gate_up", "ffn.shared.down"}
DENSE = {"ffn.gate_up", "ffn.down"}


def replaced(module):
    return {name for name, part in module.named_modules() if "forward" in vars(part)}


def test_all_linear_layers_and_experts_take_part_and_nothing_else():
    model = build_model(PRESETS["tiny"])
    with fp8_products(model):
        inside = replaced(model)
    expected = {f"transformer.layers.0.{name}" for name in ATTENTION | DENSE}
    expected |= {f"transformer.layers.{layer}.{name}" for layer in (1, 2) for name in ATTENTION | SHARED}
    expected |= {f"mtp.0.block.{name}" for name in ATTENTION | SHARED} | {"mtp.0.project"}
    assert inside == expected
    assert replaced(model) == set()


def test_the_model_is_itself_again_after_an_error():
    model = build_model(PRESETS["tiny"])
    tokens = torch.arange(12).view(1, -1)
    before = model(tokens)
    with pytest.raises(IndexError):
        compute_in("fp8", model, torch.full((1, 4), 10**6))
    assert torch.equal(model(tokens), before)
    assert not torch.equal(compute_in("fp8", model, tokens), before)


def test_gradients_reach_every_parameter_in_fp32_and_near_those_in_fp32():
    tokens = torch.randint(320, (2, 34), generator=torch.Generator().manual_seed(0))
    objective = Objective(build_model(PRESETS["tiny"], seed=3))

    def gradients(compute):
        objective.zero_grad()
        losses = compute_in(compute, objective, tokens, None, prediction_targets(tokens, None, 2))
        losses.total(0.3, 1e-4).backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters()}

    exact, fp8 = gradients("fp32"), gradients("fp8")
    for name, gradient in fp8.items():
        assert gradient.dtype == torch.float32
        # Routing may differ for a token or two, which moves router and experts most.
        assert (gradient - exact[name]).norm() < 0.5 * exact[name].norm(), name
    assert any(not torch.equal(gradient, exact[name]) for name, gradient in fp8.items())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_step_quantises_each_weight_once_and_an_update_makes_new_copies_due(
    micro_batch_size, recompute, tiny_run_config, monkeypatch
):
    """Weights after three steps are those of steps that quantise weights for each pass anew."""
    config = tiny_run_config(micro_batch_size=micro_batch_size, recompute=recompute, batch_size=4)

    def steps(sharing):
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(weight_copies, "quantise", lambda weight: made.append(weight) or quantise(weight))
            patch.setattr(step, "quantised_once", quantised_once if sharing else nullcontext)
            trial = Trial(config, RandomSequences(config), "fp8")
            counts = []
            for _ in range(3):
                made.clear()
                trial.step()
                counts.append((len(made), len(set(map(id, made)))))
        return counts, dict(trial.state.model.named_parameters())

    counts, weights = steps(sharing=True)
    assert len(set(counts)) == 1
    assert counts[0][0] == counts[0][1] > 20
    without, expected = steps(sharing=False)
    assert without[0][0] > counts[0][0] or (micro_batch_size == 4 and not recompute)
    assert without[0][1] == counts[0][1]
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def in_fp8(config):
    return config.model_copy(update={"precision": PrecisionConfig(compute="fp8")})


def losses(out):
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def test_losses_stay_near_those_in_fp32(tiny_run_config, make_run):
    fp32, fp8 = make_run("fp32"), make_run("fp8")
    train(tiny_run_config(), fp32)
    train(in_fp8(tiny_run_config()), fp8)
    assert losses(fp8) == pytest.approx(losses(fp32), rel=0.01)
    assert sum(losses(fp8)) == pytest.approx(sum(losses(fp32)), rel=0.0025)
    assert losses(fp8) != losses(fp32)
    moments = load(committed(fp8 / "checkpoints" / "pretrain")[-1]).tensors["optimizer"]
    assert {tensor.dtype for name, tensor in moments.items() if "exp_avg" in name} == {torch.bfloat16}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_exactly(tiny_run_config, make_run, monkeypatch, optimizer):
    config = in_fp8(
        tiny_run_config(
            steps=8, checkpoint_every=3, validate_every=4, optimizer={"name": optimizer, "learning_rate": 3e-3}
        )
    )
    whole, out = make_run("whole"), make_run("killed")
    result = train(config, whole)
    steps, original = iter(range(6)), loop.train_step

    def killed(*args, **kwargs):
        if next(steps) == 5:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(Killed):
            train(config, out)
    assert train(config, out).bits_per_byte == result.bits_per_byte
    assert losses(out) == losses(whole)
    left, right = (load(committed(run / "checkpoints" / "pretrain")[-1]) for run in (out, whole))
    for group, tensors in right.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(left.tensors[group][name], tensor), (group, name)
