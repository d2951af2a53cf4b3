"""Accuracies against predictions made one position at a time, entropies against their definition."""

import math

import pytest
import torch

from benthic.data.shards import TokenStore
from benthic.model import build_model
from benthic.train.loop import train
from benthic.train.metrics import read_metrics
from benthic.train.probe import affinity_entropy, probe, top1_hits


@pytest.fixture(scope="module")
def store(prepared) -> TokenStore:
    return TokenStore(prepared / "data", "val")


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_accuracies_are_those_of_whole_logits(tiny_run_config, store, monkeypatch, depths):
    config = tiny_run_config(model={"num_nextn_predict_layers": depths, "initializer_range": 0.2}).model
    model, length = build_model(config, seed=depths), 9
    monkeypatch.setattr("benthic.train.probe.PROBED_TOKENS", 10**9)
    got = probe(model, store, sequence_length=length, batch_size=5)
    text = torch.tensor(store.take(torch.arange(store.tokens).numpy()))
    right, positions = [0] * (1 + depths), 0
    for start in range(0, len(text) - 1, length):
        tokens = text[start : start + length + 1][None]
        if tokens.shape[1] < depths + 2:
            continue
        with torch.no_grad():
            states, _ = model.training_hidden(tokens[:, :-1])
        for k, state in enumerate(states):
            guess = model.transformer.head(state)[0].argmax(-1)
            right[k] += int((guess == tokens[0, 1 + k : 1 + k + len(guess)]).sum())
        positions += len(guess)
    assert sum(right) > 0
    assert got.top1_accuracy == pytest.approx([hits / positions for hits in right])
    assert len(got.router_entropy) == 1 + depths


def test_a_head_that_knows_the_text_is_always_right():
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.eye(11), torch.randint(11, (1300,), generator=generator)
    assert top1_hits(weight[target], weight, target) == 1300
    assert top1_hits(weight[(target + 1) % 11], weight, target) == 0
    assert top1_hits(weight[target], weight, torch.full_like(target, -100)) == 0


def test_entropy_of_indifferent_and_of_decided_routers():
    assert affinity_entropy(torch.full((2, 3, 8), 0.3)) == pytest.approx(math.log(8) * torch.ones(2, 3))
    decided = torch.zeros(2, 3, 8)
    decided[..., 5] = 0.7
    assert affinity_entropy(decided).tolist() == [[0.0] * 3] * 2
    assert affinity_entropy(torch.tensor([[[0.1, 0.3]]])).item() == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_documents_and_precision_make_little_difference(tiny_run_config, store, masked):
    model = build_model(tiny_run_config().model, seed=1)
    exact = probe(model, store, sequence_length=32, batch_size=4, mask_documents=masked)
    rounded = probe(model, store, sequence_length=32, batch_size=4, mask_documents=masked, compute="bf16")
    assert rounded.router_entropy == pytest.approx(exact.router_entropy, rel=1e-2)
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_a_split_too_short_for_all_depths_says_nothing(tiny_run_config, store):
    model = build_model(tiny_run_config(model={"num_nextn_predict_layers": 3}).model)
    assert probe(model, store, sequence_length=2, batch_size=4) == ([], [])


def test_validations_log_what_the_model_has_learned(tiny_run_config, make_run):
    out = make_run()
    train(tiny_run_config(steps=60, validate_every=30), out)
    _, last = (row for row in read_metrics(out / "metrics.jsonl") if "top1_accuracy" in row)
    assert all(0 < entropy < math.log(8) for entropy in last["router_entropy"])
    assert len(last["router_entropy"]) == 2
    assert len(last["top1_accuracy"]) == 2
    assert all(0.2 < accuracy < 1 for accuracy in last["top1_accuracy"])  # by chance, 1 of 320
