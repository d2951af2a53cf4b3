"""Intervals against closed forms, against scipy where it is there, and against what they promise: to hold the truth."""

import math

import numpy as np
import pytest

from benthic.evaluate.score import bootstrap_ci95, ratio_score, share_score, wilson_ci95


@pytest.mark.parametrize("seed", range(3))
def test_interval_of_a_mean_is_two_standard_errors(seed):
    values = np.random.default_rng(seed).normal(5.0, 2.0, size=400)
    low, high = bootstrap_ci95(values, np.ones_like(values))
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_pieces_that_agree_leave_no_doubt():
    weights = np.array([3.0, 5.0, 11.0])
    assert bootstrap_ci95(2 * weights, weights) == (2.0, 2.0)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (81, 263), (500, 1000)])
def test_wilson_is_that_of_scipy(right, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_ci95(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_known_cases():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        assert wilson_ci95(right / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_wilson_holds_the_truth_about_as_often_as_it_says(share):
    drawn = np.random.default_rng(1).binomial(60, share, size=4000) / 60
    held = np.mean([low <= share <= high for low, high in (wilson_ci95(mean, 60) for mean in drawn)])
    assert 0.92 <= held <= 0.99


def test_which_interval_a_share_has():
    assert share_score("accuracy", [True, False, True]).interval == "wilson"
    assert share_score("pass@2", [0.5, 1.0, 0.0]).interval == "bootstrap"
    same = share_score("pass@2", [0.5] * 8)
    assert (same.interval, same.value, same.n) == ("wilson", 0.5, 8)
    assert same.ci95[0] < 0.5 < same.ci95[1]


def test_a_ratio_weighs_its_pieces():
    score = ratio_score("bits_per_byte", [2.0, 30.0], [1.0, 10.0])
    assert score.value == pytest.approx(32 / 11)
    assert score.ci95 == pytest.approx((2.0, 3.0))
    assert ratio_score("bits_per_byte", [2.0], [1.0]).ci95 is None
