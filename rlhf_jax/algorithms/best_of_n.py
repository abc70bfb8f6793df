"""Best-of-n sampling: keep the response with the highest score of n. No training, but n times the sampling."""

import math

import jax
import numpy as np
from jaxtyping import Float

from rlhf_jax.types import Prompts, Rollout


def kl(n: int) -> float:
    """The KL of the best-of-n policy to the policy that it samples: ln n - (n - 1) / n nats.

    Exact if no two responses have the same score, else an upper bound (arXiv:2009.01325, appendix G.3).
    """
    return math.log(n) - (n - 1) / n


def repeat(prompts: Prompts, n: int) -> Prompts:
    """Each prompt repeated n times, in consecutive rows [n B, P], on the host."""
    return jax.tree.map(lambda x: np.repeat(x, n, axis=0), prompts)


def selection_scores(episodes: Rollout) -> Float[np.ndarray, "B"]:
    """The scores to select by: a response without EOS, which no reward model has read, is put below all others."""
    return np.where(episodes.ended, episodes.score, episodes.score - 2 * np.ptp(episodes.score) - 1)


def expected(score: Float[np.ndarray, "P N"], value: Float[np.ndarray, "P N"], n: int) -> float:
    """The expected value of the best of n responses by score, estimated from N >= n responses to each of P prompts.

    The estimate is unbiased: it averages over all ways to draw n of the N responses (arXiv:2112.09332).
    """
    total = score.shape[1]
    chance = np.array(
        [math.comb(below, n - 1) / math.comb(total, n) for below in range(total)]
    )  # of being the best of n, by rank
    ordered = np.take_along_axis(value, np.argsort(score, axis=1, kind="stable"), axis=1)
    return float(np.mean(ordered @ chance))


def select(episodes: Rollout, n: int) -> Rollout:
    """The episode with the highest score of each n consecutive ones, the first among equals. [B / n], on the host."""
    score = selection_scores(episodes).reshape(-1, n)
    best = np.argmax(score, axis=1) + n * np.arange(len(score))
    return jax.tree.map(lambda x: x[best], episodes)
