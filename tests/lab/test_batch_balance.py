"""The auxiliary loss over a batch, against the formula written out."""

import pytest
import torch

from benthic.config.presets import PRESETS
from benthic.lab.batch_balance import BatchBalance, as_one_sequence
from benthic.model import Routing, build_model
from benthic.model.initial import initialise
from benthic.train.loop import train
from benthic.train.metrics import read_metrics


def written_out(scores_BTE, index_BTK):
    """E x sum over experts of (share of all choices) x (mean normalised affinity)."""
    tokens = [
        (scores, chosen) for row in zip(scores_BTE, index_BTK, strict=True) for scores, chosen in zip(*row, strict=True)
    ]
    experts, choices = scores_BTE.shape[-1], index_BTK.numel()
    share = [sum((chosen == e).sum().item() for _, chosen in tokens) / choices for e in range(experts)]
    mean = [sum((scores[e] / scores.sum()).item() for scores, _ in tokens) / len(tokens) for e in range(experts)]
    return experts * sum(s * m for s, m in zip(share, mean, strict=True))


@pytest.mark.parametrize(("batch", "time", "experts", "top"), [(3, 5, 7, 2), (1, 4, 3, 1), (5, 1, 6, 4)])
def test_the_loss_is_over_all_sequences(batch, time, experts, top):
    generator = torch.Generator().manual_seed(batch)
    scores = torch.rand(batch, time, experts, generator=generator, dtype=torch.float64)
    routing = Routing(scores, scores.topk(top, -1).indices)
    joined = as_one_sequence(routing)
    assert joined.balance_loss.item() == pytest.approx(written_out(*vars(routing).values()), rel=1e-12)
    assert torch.equal(joined.load_E, routing.load_E)


def test_sequences_that_balance_each_other_cost_nothing():
    scores = torch.tensor([[[0.9, 0.1]] * 4, [[0.1, 0.9]] * 4])
    routing = Routing(scores, scores.topk(1, -1).indices)
    assert as_one_sequence(routing).balance_loss.item() == pytest.approx(1)
    assert routing.balance_loss.item() == pytest.approx(1.8)


def test_the_model_is_the_usual_one():
    config = PRESETS["tiny"]
    ours, usual = BatchBalance().build(config), build_model(config, seed=3)
    initialise(ours, config.initializer_range, seed=3)
    assert ours.state_dict().keys() == usual.state_dict().keys()
    tokens = torch.randint(config.vocab_size, (2, 17))
    assert torch.equal(ours(tokens), usual(tokens))


def test_it_balances_where_nothing_else_does(tiny_run_config, make_run):
    def load(weight: float) -> float:
        out = make_run(f"weight-{weight}")
        schedule = {"bias_update_speed": 0, "balance_loss_weight": weight}
        train(tiny_run_config(steps=60, validate_every=60, schedule=schedule), out, BatchBalance())
        rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
        return sum(sum(row["expert_load_max_over_mean"]) for row in rows[30:])

    assert load(1.0) < 0.9 * load(0.0)
