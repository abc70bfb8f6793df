import numpy as np
import pytest

from rlhf_jax.analysis import calibration


def test_pairs_are_those_that_a_labeler_ordered():
    score = np.array([[1.0, 3.0, 0.5], [2.0, 2.0, 9.0]])
    rank, length = np.array([[0, 1, 1], [1, 0, -1]]), np.array([[4, 6, 1], [5, 5, 0]])
    found = calibration.pairs(score, rank, length)
    assert found.margin.tolist() == [-2.0, 0.5, 0.0] and found.longer.tolist() == [-2, 3, 0]
    assert calibration.correct(found.margin).tolist() == [0.0, 1.0, 0.5]


def test_ties_are_counted_once_and_absent_answers_not_at_all():
    assert calibration.ties(np.array([[0, 1, 1, 1], [2, 0, -1, -1], [0, 0, 3, 3]])) == 3 + 0 + 2


def test_reliability_by_hand():
    margin = np.log(np.array([0.6 / 0.4, 0.6 / 0.4, 0.4 / 0.6, 0.9 / 0.1]))  # sure to .6, .6, .6 (wrongly) and .9
    error, bins = calibration.reliability(margin, bins=5)
    assert [(round(b.at, 6), round(b.accuracy, 6), b.pairs) for b in bins] == [(0.6, 0.666667, 3), (0.9, 1.0, 1)]
    assert error == pytest.approx((3 * abs(2 / 3 - 0.6) + 0.1) / 4)


def test_scores_that_are_right_about_themselves_have_no_error():
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 2, 200_000)
    margin = np.where(rng.random(200_000) < 1 / (1 + np.exp(-difference)), difference, -difference)
    assert calibration.reliability(margin)[0] < 0.005
    assert calibration.reliability(2 * margin)[0] > 0.05  # too sure of itself


def test_accuracy_by_something():
    value = np.array([1, 1, 1, 1, 2, 3, 4, 5])
    margin = np.array([1.0, 1.0, -1.0, 0.0, 1.0, 1.0, -1.0, -1.0])
    bins = calibration.binned(value, margin, bins=2)
    assert sum(b.pairs for b in bins) == 8
    assert bins[0] == (1.0, 0.625, 4) and bins[-1].accuracy == 0.5
