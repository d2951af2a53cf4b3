"""MTP modules go on learning from conversations while the model below them learns from rewards."""

import json

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.config.schema import RunConfig
from benthic.data.batches import Batch
from benthic.model import build_model
from benthic.ops.cross_entropy import linear_cross_entropy_reference
from benthic.posttrain.rehearsal import rehearse
from benthic.train.checkpoint import load
from benthic.train.metrics import read_metrics
from benthic.train.objective import prediction_targets


@pytest.mark.parametrize("depths", [1, 2])
def test_the_gradients_are_those_of_the_modules_loss(depths):
    config = PRESETS["tiny"].model_copy(update={"num_nextn_predict_layers": depths})
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    tokens_BS = torch.randint(0, config.vocab_size, (3, 20), generator=generator)
    document_BS = torch.tensor([0] * 9 + [1] * 11).expand(3, -1)
    learn_BS = torch.rand(3, 20, generator=generator) < 0.4
    states, _ = model.training_hidden(tokens_BS[:, :-1], document_BS[:, :-1])
    targets_KBT = prediction_targets(tokens_BS, document_BS, 1 + depths, learn_BS)
    nats = [
        linear_cross_entropy_reference(x_BTD.flatten(0, 1), model.transformer.head.weight, target_BT.flatten())
        for x_BTD, target_BT in zip(states[1:], targets_KBT[1:], strict=True)
    ]
    expected = torch.autograd.grad(0.7 * torch.stack(nats).mean(), list(model.mtp.parameters()), allow_unused=True)
    found_J = rehearse(model, Batch(tokens_BS, document_BS, learn_BS), 0.7, "fp32")
    torch.testing.assert_close(found_J, torch.stack(nats).detach())
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for parameter, gradient in zip(model.mtp.parameters(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.transformer.parameters())


@pytest.mark.parametrize("sequences", [0, 2])
def test_conversations_are_those_of_fine_tuning(sft_config, make_sft_run, run_all, tmp_path, sequences):
    """Of a run with both stages; without rewards, nothing but the modules moves, and without rehearsal less of them."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{n}", "answer": "never that"}) + "\n" for n in range(20)))
    rl = {
        "problems": [{"file": str(problems)}], "steps": 2, "prompts": 2, "group_size": 2, "max_new_tokens": 2,
        "held_out": 4, "kl_weight": 0.0, "mtp_loss_weight": 0.3, "mtp_rehearsal": sequences, "learning_rate": 1e-3,
    }  # fmt: skip
    settings = sft_config().model_dump(mode="json")
    config = RunConfig.model_validate({**settings, "posttrain": {**settings["posttrain"], "rl": rl}})
    out = make_sft_run()
    run_all(config, out)
    rows = [row for row in read_metrics(out / "metrics.jsonl", "rl") if "loss" in row]
    assert [len(row.get("rehearsal", [])) for row in rows] == [int(sequences > 0)] * 2
    before = load(max((out / "checkpoints" / "sft").iterdir(), key=lambda path: int(path.name[5:]))).tensors["model"]
    after = load(out / "checkpoints" / "rl" / "step-2").tensors["model"]
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("mtp.") for name in moved)
