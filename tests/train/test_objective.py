"""The losses against their definition, and by perturbation: no prediction ever sees what it predicts."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from benthic.config.presets import PRESETS
from benthic.model import build_model
from benthic.ops.cross_entropy import IGNORE
from benthic.train.objective import Losses, Objective, prediction_targets

DEPTHS = 2
LENGTH = 13
SAME = 1e-10
"""In float64, far above rounding; what leaks moves a loss by a millionth at least."""


@pytest.fixture(scope="module")
def objective() -> Objective:
    sizes = {
        **PRESETS["tiny"].model_dump(),
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": DEPTHS,
        "initializer_range": 0.1,
    }
    return Objective(build_model(type(PRESETS["tiny"])(**sizes), seed=3, dtype=torch.float64))


def sequences(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(320, (rows, LENGTH + 1 + DEPTHS), generator=torch.Generator().manual_seed(seed))


def documents(*lengths: int) -> torch.Tensor:
    """One row whose documents have these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def losses_at(objective: Objective, tokens: torch.Tensor, document: torch.Tensor | None = None) -> torch.Tensor:
    """Nats of every prediction (K, B, T)."""
    inner = None if document is None else document[:, :-1]
    states, _ = objective.model.training_hidden(tokens[:, :-1], inner)
    targets = prediction_targets(tokens, None, 1 + DEPTHS)
    head = objective.model.transformer.head.weight
    return torch.stack(
        [
            F.cross_entropy((state @ head.T).transpose(1, 2), target, reduction="none")
            for state, target in zip(states, targets, strict=True)
        ]
    ).detach()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_means_over_the_counted_predictions(objective, masked, seed):
    tokens = sequences(seed, rows=3)
    document = documents(5, 1, 4, 6).expand(3, -1) if masked else None
    expected = losses_at(objective, tokens, document)
    targets = prediction_targets(tokens, document, 1 + DEPTHS)
    losses = objective(tokens, document, targets)
    for k in range(1 + DEPTHS):
        counted = targets[k] != IGNORE
        assert losses.cross_entropy_K[k].item() == pytest.approx(expected[k][counted].mean().item(), rel=1e-6)
    assert losses.load_ME.shape == (1 + DEPTHS, 8)  # one MoE layer of the model and one of each depth
    assert losses.load_ME.sum(1).tolist() == [3 * LENGTH * 2] * 3


def test_targets_are_the_tokens_one_and_more_ahead_within_a_document():
    tokens = torch.arange(10, 18)[None]
    assert prediction_targets(tokens, None, 3)[:, 0].tolist() == [
        [11, 12, 13, 14, 15],
        [12, 13, 14, 15, 16],
        [13, 14, 15, 16, 17],
    ]
    assert prediction_targets(tokens, documents(3, 1, 4), 3)[:, 0].tolist() == [
        [11, 12, IGNORE, IGNORE, 15],
        [12, IGNORE, IGNORE, IGNORE, 16],
        [IGNORE, IGNORE, IGNORE, IGNORE, 17],
    ]


def test_total_weighs_the_mean_over_depths_and_the_balance():
    losses = Losses(torch.tensor([2.0, 3.0, 5.0]), torch.tensor(7.0), torch.zeros(1, 1))
    assert losses.total(0.5, 0.01).item() == pytest.approx(2.0 + 0.5 * (3 + 5) / 2 + 0.01 * 7)
    assert Losses(torch.tensor([2.0]), torch.tensor(7.0), torch.zeros(1, 1)).total(0.5, 0.0).item() == 2.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_state_that_predicts_a_token_does_not_depend_on_it(objective, seed):
    tokens = sequences(seed)
    changed = int(torch.randint(2, LENGTH, (), generator=torch.Generator().manual_seed(seed)))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 320
    before, _ = objective.model.training_hidden(tokens[:, :-1])
    after, _ = objective.model.training_hidden(other[:, :-1])
    for k in range(1 + DEPTHS):
        moved = (before[k] - after[k]).abs().amax((0, 2))
        # Prediction k at position i is of token i + 1 + k: the token seen first is at changed - k.
        assert (moved[: changed - k] < SAME).all()
        assert moved[changed - k] > 1e-6


def test_that_test_would_notice_a_prediction_that_sees_its_target(objective):
    tokens = sequences(0)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 320
    early = [objective.model.training_hidden(rows[:, 1:])[0] for rows in (tokens, other)]  # shifted by one: a leak
    moved = (early[0][1] - early[1][1]).abs().amax((0, 2))
    assert moved[6 - 2] > 1e-6


BOUNDS = (0, 5, 11, LENGTH + 1 + DEPTHS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("changed", [0, 4, 5, 7, 10, 11, 13])
def test_no_loss_depends_on_another_document(objective, changed, seed):
    tokens, document = sequences(seed, rows=1), documents(*(b - a for a, b in pairwise(BOUNDS)))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 320
    counted = prediction_targets(tokens, document, 1 + DEPTHS)[:, 0] != IGNORE
    elsewhere = counted & (document[0, :LENGTH] != document[0, changed])
    assert elsewhere.any()

    def moved(mask: torch.Tensor | None) -> torch.Tensor:
        return (losses_at(objective, tokens, mask) - losses_at(objective, other, mask))[:, 0].abs()

    assert (moved(document)[elsewhere] < SAME).all()
    assert moved(document)[counted & ~elsewhere].max() > 1e-6
    later = elsewhere & (torch.arange(LENGTH) > changed)
    if later.any():  # without the mask the same change is felt in the documents after it
        assert moved(None)[later].max() > 1e-6
