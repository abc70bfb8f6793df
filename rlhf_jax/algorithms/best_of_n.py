"""Best-of-n sampling: of n responses to a prompt, the one with the highest score. No training, n times the sampling."""

import math

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.types import Prompts, Rollout


def kl(n: int) -> float:
    """KL of best-of-n sampling from what it samples, `ln n - (n - 1) / n` nats (arXiv:2009.01325, appendix G.3).

    Exact where no two responses have the same score, else an upper bound.
    """
    return math.log(n) - (n - 1) / n


def repeat(prompts: Prompts, n: int) -> Prompts:
    """Each prompt n times, in consecutive rows; on the host."""
    return jax.tree.map(lambda x: np.repeat(x, n, axis=0), prompts)


def picking(episodes: Rollout) -> Float[np.ndarray, "B"]:
    """Scores to pick by: those of responses without EOS, which no reward model has read, are below all others."""
    return np.where(episodes.ended, episodes.score, episodes.score - 2 * np.ptp(episodes.score) - 1)


def expected(score: Float[np.ndarray, "P N"], value: Float[np.ndarray, "P N"], n: int) -> float:
    """Mean value of the response with the highest score of n, from N responses to each of P prompts; n <= N.

    Without bias: an average over all ways to draw n of the N (arXiv:2112.09332), and so smoother than one draw.
    """
    total = score.shape[1]
    chance = np.array([math.comb(below, n - 1) / math.comb(total, n) for below in range(total)])  # to be the best of n
    ordered = np.take_along_axis(value, np.argsort(score, axis=1, kind="stable"), axis=1)
    return float(np.mean(ordered @ chance))


def select(episodes: Rollout, n: int) -> Rollout:
    """The episode with the highest score of each n consecutive ones, among equals the first; on the host."""
    score = picking(episodes).reshape(-1, n)
    best = np.argmax(score, axis=1) + n * np.arange(len(score))
    return jax.tree.map(lambda x: x[best], episodes)
