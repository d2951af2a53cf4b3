"""What a run learns and leaves behind: falling loss, settings, ledger, averaged weights."""

import json

import pytest
import torch

from benthic.config.load import load_run_config
from benthic.config.schema import DataConfig, PrecisionConfig
from benthic.data.shards import TokenStore
from benthic.evaluate.bits_per_byte import bits_per_byte
from benthic.plan.flops import training_flops
from benthic.train.checkpoint import committed, load
from benthic.train.ema import WeightAverage
from benthic.train.loop import train
from benthic.train.metrics import read_metrics


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_model_learns(tiny_run_config, make_run, optimizer, compute):
    config = tiny_run_config(steps=60, validate_every=30, optimizer={"name": optimizer, "learning_rate": 3e-3})
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": compute})})
    out = make_run()
    result = train(config, out)
    rows = read_metrics(out / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    depths = [row["mtp_losses"][0] for row in rows if "loss" in row]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert sum(depths[-5:]) / 5 < 0.6 * depths[0]
    validations = [row["validation_bits_per_byte"] for row in rows if "validation_bits_per_byte" in row]
    assert validations[-1] == result.bits_per_byte < 0.9


def test_a_run_leaves_settings_and_an_account(tiny_run_config, make_run):
    out, config = make_run(), tiny_run_config(steps=6, schedule={"batch_ramp": 0.5}, batch_size=8)
    train(config, out)
    assert load_run_config(out / "config.toml") == config
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    entry = json.loads((out / "ledger.json").read_text())["stages"]["pretrain"]
    assert entry["tokens"] == rows[-1]["tokens"] == sum(row["batch_size"] for row in rows) * 32
    assert entry["flops"] == pytest.approx(entry["tokens"] * training_flops(config.model, 32, mtp=True))
    assert 0 < entry["wall_hours"] == entry["device_hours"] < 0.1
    assert entry["energy_kwh"] > 0
    assert entry["cost_usd"] is None
    assert rows[0]["share_of_gemm_peak"] > 0
    assert all(ratio >= 1 for ratio in rows[0]["expert_load_max_over_mean"])


def test_the_average_follows_its_definition_and_lends_itself_out():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.75)
    expected = model.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    torch.testing.assert_close(average.tensors["weight"], expected)
    present = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, present)
    torch.testing.assert_close(average.tensors["weight"], expected)


def test_a_run_with_an_average_ends_with_it(tiny_run_config, make_run):
    out = make_run()
    result = train(tiny_run_config(ema_decay=0.5), out)
    saved = load(committed(out / "checkpoints" / "pretrain")[-1]).tensors["average"]
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert result.bits_per_byte == last["average_validation_bits_per_byte"]
    again = train(tiny_run_config(ema_decay=0.5), out)
    assert again.bits_per_byte == result.bits_per_byte
    assert torch.equal(again.model.transformer.head.weight, result.model.transformer.head.weight)
    assert last["average_validation_bits_per_byte"] != last["validation_bits_per_byte"]


def test_the_last_validation_is_in_fp32_whatever_training_computes_in(tiny_run_config, make_run):
    config = tiny_run_config(steps=8, validate_every=4)
    out = make_run()
    result = train(config.model_copy(update={"precision": PrecisionConfig(compute="bf16")}), out)
    exact = bits_per_byte(result.model, TokenStore(out / "data", "val"), sequence_length=32)
    assert result.bits_per_byte == pytest.approx(exact.value, rel=1e-6)


def test_settings_of_the_data_are_those_it_was_prepared_with(tiny_run_config, make_run):
    config = tiny_run_config(steps=1)
    asked = DataConfig(sources=("elsewhere",), validation_fraction=0.9, seed=8, mask_documents=True)
    out = make_run()
    train(config.model_copy(update={"data": asked}), out)
    recorded = load_run_config(out / "config.toml").data
    assert recorded == config.data.model_copy(update={"mask_documents": True})


def test_a_vocabulary_that_does_not_fit_is_refused(tiny_run_config, make_run):
    out = make_run()
    with pytest.raises(ValueError, match=r"vocab_size=100 must be at least .*: give --set model.vocab_size=320$"):
        train(tiny_run_config(model={"vocab_size": 100}), out)
    assert {path.name for path in out.iterdir()} == {"data", "tokenizer"}
