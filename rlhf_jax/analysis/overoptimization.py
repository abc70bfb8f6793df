"""How gold reward goes with distance from the initial policy (Gao et al. 2022, arXiv:2210.10760).

d is the square root of the KL from the initial policy, in nats; rewards are gains over it, 0 at d = 0.
"""

from collections.abc import Callable

import numpy as np

Curve = Callable[[np.ndarray, float, float], np.ndarray]


def best_of_n(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Gold reward of best-of-n sampling: d (alpha - beta d)."""
    return d * (alpha - beta * d)


def reinforcement(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Gold reward of reinforcement learning: d (alpha - beta ln d), 0 at d = 0 by its limit."""
    return alpha * d - beta * d * np.log(np.where(d > 0, d, 1.0))


def fit(curve: Curve, d: np.ndarray, reward: np.ndarray) -> tuple[float, float]:
    """alpha and beta that minimise the squared error over points of equal weight, without an intercept.

    Both curves are linear in them. At least two different d above 0 are needed.
    """
    d, reward = np.asarray(d, float), np.asarray(reward, float)
    terms = np.stack([curve(d, 1.0, 0.0), curve(d, 0.0, 1.0)], axis=1)
    if len(set(d[d > 0])) < 2:
        raise ValueError("two coefficients need points at two distances above 0 at least")
    (alpha, beta), *_ = np.linalg.lstsq(terms, reward, rcond=None)
    return float(alpha), float(beta)
