"""Best-of-n sampling: of n responses to a prompt, the one with the highest score. No training, n times the sampling."""

import math

import jax
import numpy as np

from rlhf_jax.types import Prompts, Rollout


def kl(n: int) -> float:
    """KL of best-of-n sampling from what it samples, `ln n - (n - 1) / n` nats (arXiv:2009.01325, appendix G.3).

    Exact where no two responses have the same score, else an upper bound.
    """
    return math.log(n) - (n - 1) / n


def repeat(prompts: Prompts, n: int) -> Prompts:
    """Each prompt n times, in consecutive rows; on the host."""
    return jax.tree.map(lambda x: np.repeat(x, n, axis=0), prompts)


def select(episodes: Rollout, n: int) -> Rollout:
    """The episode with the highest score of each n consecutive ones, among equals the first; on the host.

    A response without EOS is picked only where none of the n has one: a reward model has never read such.
    """
    score = np.where(episodes.ended, episodes.score, episodes.score - 2 * np.ptp(episodes.score) - 1).reshape(-1, n)
    best = np.argmax(score, axis=1) + n * np.arange(len(score))
    return jax.tree.map(lambda x: x[best], episodes)
