"""A step that is timed is all of one that training takes, at the full batch."""

import pytest
import torch

from benthic.data.batches import Batches, training_batches
from benthic.data.shards import TokenStore
from benthic.train import trial
from benthic.train.state import TrainState
from benthic.train.step import train_step
from benthic.train.trial import RandomSequences, Trial, heaviest_mtp


@pytest.fixture
def taken(monkeypatch):
    """Batches and settings of the steps that a trial takes."""
    steps = []

    def step(objective, optimizer, batch, settings, **options):
        steps.append((batch, settings, options))
        return train_step(objective, optimizer, batch, settings, **options)

    monkeypatch.setattr(trial, "train_step", step)
    return steps


def schedule(early: float, late: float, start: float) -> dict[str, float]:
    return {"mtp_loss_weight": early, "mtp_late_loss_weight": late, "mtp_late_start": start}


def test_steps_are_full_batches_in_order(tiny_run_config, prepared, taken):
    config = tiny_run_config(batch_size=6, micro_batch_size=2, schedule={"batch_ramp": 1.0}, mask_documents=True)
    batches = training_batches(config, TokenStore(prepared / "data", "train"))
    made = Trial(config, batches, "fp32").warm_up()
    made.step()
    for number, (batch, settings, options) in enumerate(taken):
        expected = batches.at(6 * number, 6)
        assert torch.equal(batch.tokens_BS, expected.tokens_BS)
        assert torch.equal(batch.document_BS, expected.document_BS)
        assert settings.batch_size == 6
        assert (options["micro_batch_size"], options["compute"]) == (2, "fp32")
    assert made.state.step == len(taken) == 3


@pytest.mark.parametrize(
    ("model", "weights", "heaviest"),
    [
        ({}, schedule(0.0, 0.3, 0.65), 0.3),
        ({}, schedule(0.3, 0.0, 0.65), 0.3),
        ({}, schedule(0.1, 0.3, 1.0), 0.1),
        ({}, schedule(0.5, 0.3, 0.0), 0.3),
        ({}, schedule(0.0, 0.0, 0.5), 0.0),
        ({"num_nextn_predict_layers": 0}, schedule(0.3, 0.1, 0.5), 0.0),
    ],
)
def test_mtp_runs_as_it_does_where_it_weighs_most(tiny_run_config, taken, model, weights, heaviest):
    config = tiny_run_config(model=model, schedule=weights)
    assert heaviest_mtp(config) == heaviest
    made = Trial(config, RandomSequences(config), "fp32")
    made.step()
    made.step(0.0)
    assert [settings.mtp_weight for _, settings, _ in taken] == [heaviest, 0.0]
    has_moments = any(name.startswith("mtp.") for name in made.state.optimizer.state_tensors())
    assert has_moments == (heaviest > 0)


@pytest.mark.parametrize("average", [{"ema_decay": 0.9}, {"ema_span": 0.5}])
def test_an_average_is_kept_where_the_run_keeps_one(tiny_run_config, average):
    config = tiny_run_config(**average)
    made = Trial(config, RandomSequences(config), "fp32")
    before = {name: tensor.clone() for name, tensor in made.state.average.tensors.items()}
    made.step()
    assert any(not torch.equal(made.state.average.tensors[name], tensor) for name, tensor in before.items())
    assert Trial(tiny_run_config(), RandomSequences(config), "fp32").state.average is None


def test_precision_is_that_asked_for(tiny_run_config, taken):
    config = tiny_run_config()
    made = Trial(config, RandomSequences(config), "fp8")
    made.step()
    assert taken[0][2]["compute"] == "fp8"
    moments = {name: tensor for name, tensor in made.state.optimizer.state_tensors().items() if "exp_avg" in name}
    assert {tensor.dtype for tensor in moments.values()} == {torch.bfloat16}


def test_weights_stay_near_their_start_and_learn_all_the_same(tiny_run_config):
    config = tiny_run_config()
    made, fresh = Trial(config, RandomSequences(config), "fp32").warm_up(), TrainState(config)
    moved = [
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(made.state.model.parameters(), fresh.model.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-5


def test_random_batches_are_the_same_for_all_sides(tiny_run_config):
    config = tiny_run_config()
    first, second = (RandomSequences(config).at(8, 4).tokens_BS for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, 32 + 1 + config.model.num_nextn_predict_layers)
    assert not torch.equal(first, RandomSequences(config).at(12, 4).tokens_BS)
    assert 0 <= first.min() < first.max() < config.model.vocab_size


def test_training_batches_are_those_of_the_settings(tiny_run_config, prepared):
    store = TokenStore(prepared / "data", "train")
    config = tiny_run_config(seed=5, model={"num_nextn_predict_layers": 2}, mask_documents=True)
    ours = training_batches(config, store).at(3, 2)
    expected = Batches(store, 32, 3, seed=5, mask_documents=True).at(3, 2)
    assert torch.equal(ours.tokens_BS, expected.tokens_BS)
    assert torch.equal(ours.document_BS, expected.document_BS)
