"""How far a reward model can be believed: its certainty against its record, and where it is right. On the host."""

from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Every pair of responses that a labeler ordered, one entry each."""

    margin: np.ndarray  # score of the preferred one less that of the other
    longer: np.ndarray  # tokens of the preferred one less those of the other


class Bin(NamedTuple):
    """Pairs alike in some way."""

    at: float  # mean of what they are alike in
    accuracy: float  # share whose preferred response has the higher score; equal scores count half
    pairs: int


def pairs(score: np.ndarray, rank: np.ndarray, length: np.ndarray) -> Pairs:
    """The pairs of rankings [B, K]: scores, ranks as in `Rankings`, and lengths in tokens."""
    better = (rank[:, :, None] < rank[:, None, :]) & (rank[:, :, None] >= 0)
    difference = lambda x: (x[:, :, None] - x[:, None, :])[better]
    return Pairs(difference(score.astype(float)), difference(length.astype(int)))


def ties(rank: np.ndarray) -> int:
    """How many pairs of rankings [B, K] a labeler found equal."""
    earlier = np.tril(np.ones((rank.shape[1],) * 2, bool), -1)
    return int(np.sum((rank[:, :, None] == rank[:, None, :]) & (rank[:, :, None] >= 0) & earlier))


def correct(margin: np.ndarray) -> np.ndarray:
    """1 where the preferred response has the higher score, 1/2 where the scores are equal, else 0."""
    return 0.5 * (1 + np.sign(margin))


def confidence(margin: np.ndarray) -> np.ndarray:
    """Bradley-Terry's probability, in [1/2, 1], of the order that the scores give. They may not be normalised."""
    return 1 / (1 + np.exp(-np.abs(margin)))


def reliability(margin: np.ndarray, bins: int = 10) -> tuple[float, list[Bin]]:
    """Expected calibration error (arXiv:1706.04599), and its bins of equal width in confidence.

    The error is the mean over pairs of |accuracy - confidence| of their bin; empty bins are left out.
    """
    certainty, right = confidence(margin), correct(margin)
    number = np.minimum(((certainty - 0.5) * 2 * bins).astype(int), bins - 1)
    found = [_bin(certainty, right, number == n) for n in range(bins) if np.any(number == n)]
    return sum(b.pairs * abs(b.accuracy - b.at) for b in found) / len(margin), found


def binned(value: np.ndarray, margin: np.ndarray, bins: int = 6) -> list[Bin]:
    """Accuracy in bins of about equally many pairs, by what `value` says of each; equal values share a bin."""
    edges = np.unique(np.quantile(value, np.linspace(0, 1, bins + 1)[1:-1]))
    number = np.searchsorted(edges, value, side="right")
    return [_bin(value, correct(margin), number == n) for n in np.unique(number)]


def _bin(value: np.ndarray, right: np.ndarray, inside: np.ndarray) -> Bin:
    return Bin(float(value[inside].mean()), float(right[inside].mean()), int(inside.sum()))
