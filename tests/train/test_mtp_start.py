"""MTP modules that begin late: as the last layer is by then, at the same step however often the run is interrupted."""

import pytest
import torch
from interrupted import Killed, assert_same_run, at_step, kill

from benthic.model import build_model
from benthic.model.moe import Router
from benthic.model.transformer import attention_context
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.state import TrainState

LATE = {"mtp_loss_weight": 0.0, "mtp_late_start": 0.5, "mtp_every": 3, "mtp_from_last_layer": True}
"""Of 20 steps those with MTP are 12, 15 and 18."""


def test_modules_read_as_the_last_layer_does(tiny_run_config):
    config = tiny_run_config({"num_nextn_predict_layers": 2}).model
    model = build_model(config, seed=1).eval()
    with torch.no_grad():
        for parameter in model.transformer.layers[-1].parameters():
            parameter.mul_(5)
        (router,) = (one for one in model.transformer.layers[-1].modules() if isinstance(one, Router))
        router.bias.normal_()
        model.transformer.norm.weight.uniform_(0.5, 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        changed = model.mtp_as_last_layer()
        after = model.state_dict()
        assert all(name.startswith("mtp.") for name in after if not torch.equal(after[name], before[name]))
        assert set(changed) == {name for name, _ in model.named_parameters() if name.startswith("mtp.")}
        tokens = torch.randint(config.vocab_size, (2, 9))
        (first, second, third), _ = model.training_hidden(tokens)
        # By hand: the embedding as the first layer would read it, and a share of the state before.
        for depth, state, found in ((1, first, second), (2, second, third)):
            module = model.mtp[depth - 1]
            embedding = model.transformer.embed(tokens[:, depth : depth + state.shape[1]])
            read = module.embed_norm(embedding) + 0.3 * module.hidden_norm(state)
            context = attention_context(config, tokens[:, : state.shape[1]], None)
            expected = model.transformer.norm(model.transformer.layers[-1](read, context)[0])
            torch.testing.assert_close(found, expected)


def test_a_dense_last_layer_leaves_the_modules_their_own(tiny_run_config):
    model = build_model(tiny_run_config({"first_k_dense_replace": 2}).model, seed=1)
    before = {name: tensor.clone() for name, tensor in model.mtp[0].block.state_dict().items()}
    model.mtp_as_last_layer()
    for name, tensor in model.mtp[0].block.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("moments", [[11], [12], [13], [14, 17]], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_begins_them_at_the_same_moment(tiny_run_config, make_run, monkeypatch, moments, optimizer):
    config = tiny_run_config(
        schedule=LATE, checkpoint_every=4, ema_decay=0.9, optimizer={"name": optimizer, "learning_rate": 3e-3}
    )
    whole, out = make_run("whole"), make_run("killed")
    train(config, whole)
    taken = 0
    for moment in moments:
        with monkeypatch.context() as patch:
            at_step(patch, moment - taken, kill)
            with pytest.raises(Killed):
                train(config, out)
        taken = max(saved for saved in (0, 4, 8, 12, 16) if saved < moment)
    train(config, out)
    assert_same_run(out, whole)


def test_they_begin_once_and_learn_faster(tiny_run_config, make_run, monkeypatch):
    begun = []
    original = TrainState.begin_mtp
    monkeypatch.setattr(TrainState, "begin_mtp", lambda self: (begun.append(self.step), original(self)))
    losses = {}
    for name, schedule in {"drawn": {**LATE, "mtp_from_last_layer": False}, "copied": LATE}.items():
        out = make_run(name)
        train(tiny_run_config(steps=120, checkpoint_every=1000, schedule=schedule), out)
        losses[name] = [row["mtp_losses"][0] for row in read_metrics(out / "metrics.jsonl") if row.get("mtp_losses")]
    assert begun == [62]  # the first step from half of the tokens on that is divisible by three
    assert losses["copied"][0] < losses["drawn"][0] - 0.5
    assert sum(losses["copied"]) < sum(losses["drawn"])


def test_from_the_very_first_step_on_they_begin_as_they_were_drawn(tiny_run_config, make_run, monkeypatch):
    monkeypatch.setattr(TrainState, "begin_mtp", lambda self: pytest.fail("not late"))
    train(tiny_run_config(steps=4, schedule={"mtp_from_last_layer": True}), make_run())
