"""Scaling laws of gold reward by distance from the initial policy (Gao et al. 2022, arXiv:2210.10760).

d is the square root of the KL to the initial policy, in nats. Rewards are gains over the initial policy: 0 at d = 0.
"""

from collections.abc import Callable

import numpy as np

Curve = Callable[[np.ndarray, float, float], np.ndarray]


def best_of_n(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The gold reward of best-of-n sampling, d (alpha - beta d), with coefficients alpha and beta."""
    return d * (alpha - beta * d)


def reinforcement(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The gold reward of reinforcement learning, d (alpha - beta ln d), with its limit 0 at d = 0."""
    return alpha * d - beta * d * np.log(np.where(d > 0, d, 1.0))


def fit(curve: Curve, d: np.ndarray, reward: np.ndarray) -> tuple[float, float]:
    """The coefficients alpha and beta of a curve that minimise the squared error over points [N], without intercept.

    Both curves are linear in the coefficients. Raises ValueError unless there are two different d above 0.
    """
    d, reward = np.asarray(d, float), np.asarray(reward, float)
    terms = np.stack([curve(d, 1.0, 0.0), curve(d, 0.0, 1.0)], axis=1)
    if len(set(d[d > 0])) < 2:
        raise ValueError("two coefficients need points at two distances above 0 at least")
    (alpha, beta), *_ = np.linalg.lstsq(terms, reward, rcond=None)
    return float(alpha), float(beta)
