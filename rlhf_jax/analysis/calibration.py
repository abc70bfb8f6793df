"""Calibration and accuracy of a reward model on pairs of ranked responses, computed on the host."""

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """The pairs of responses that labelers ordered, one entry a pair."""

    margin: np.ndarray  # score of the preferred response minus that of the other
    longer: np.ndarray  # tokens of the preferred response minus those of the other


class Bin(NamedTuple):
    """A group of pairs with similar values of some quantity."""

    at: float  # mean of that quantity
    accuracy: float  # share whose preferred response has the higher score; equal scores count half
    pairs: int


def pairs(score: np.ndarray, rank: np.ndarray, length: np.ndarray) -> Pairs:
    """The pairs of rankings, given score, rank (as in `types.Rankings`) and length in tokens of responses [B, K]."""
    pair = (rank[:, :, None] < rank[:, None, :]) & (rank[:, :, None] >= 0)
    difference = lambda x: (x[:, :, None] - x[:, None, :])[pair]
    return Pairs(difference(score.astype(float)), difference(length.astype(int)))


def ties(rank: np.ndarray) -> int:
    """The number of pairs of responses with equal rank in rankings [B, K]."""
    earlier = np.tril(np.ones((rank.shape[1],) * 2, bool), -1)
    return int(np.sum((rank[:, :, None] == rank[:, None, :]) & (rank[:, :, None] >= 0) & earlier))


def correct(margin: np.ndarray) -> np.ndarray:
    """The accuracy of each pair: 1 if the preferred response has the higher score, 1/2 if scores are equal, else 0."""
    return 0.5 * (1 + np.sign(margin))


def confidence(margin: np.ndarray) -> np.ndarray:
    """The Bradley-Terry probability, in [1/2, 1], of the order that the scores give: sigmoid(|margin|).

    Margins must be of scores as trained, not normalised ones.
    """
    return 1 / (1 + np.exp(-np.abs(margin)))


def reliability(margin: np.ndarray, bins: int = 10) -> tuple[float, list[Bin]]:
    """The expected calibration error (arXiv:1706.04599, eq. 3), and its bins of equal width in confidence.

        sum_b (pairs_b / pairs) |accuracy_b - confidence_b|

    The confidence of a bin b is the mean over its pairs. Empty bins are left out.
    """
    certainty, right = confidence(margin), correct(margin)
    number = np.minimum(((certainty - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [_bin(certainty, right, number == n) for n in range(bins) if np.any(number == n)]
    return sum(b.pairs * abs(b.accuracy - b.at) for b in filled) / len(margin), filled


def binned(value: np.ndarray, margin: np.ndarray, bins: int = 6) -> list[Bin]:
    """The accuracy in bins of `value` that have about equally many pairs; equal values are in the same bin."""
    edges = np.unique(np.quantile(value, np.linspace(0, 1, bins + 1)[1:-1]))
    number = np.searchsorted(edges, value, side="right")
    return [_bin(value, correct(margin), number == n) for n in np.unique(number)]


def _bin(value: np.ndarray, right: np.ndarray, inside: np.ndarray) -> Bin:
    return Bin(float(value[inside].mean()), float(right[inside].mean()), int(inside.sum()))
