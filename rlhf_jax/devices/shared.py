"""Answers to one prompt, which is computed once for all of them.

A network is told that each `group` rows that follow one another have the same prompt, through a column `start`. Where
that pays it computes them as one row (`types.Tree`): the prompt without its last column, then each row from `start` on.
So every answer begins behind a copy of the prompt's last token, which predicts the answer's first one. A batch, a
device's part of it or a micro-batch may hold parts of groups: then as many rows as divide both share a prompt.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.devices import parallel
from rlhf_jax.types import Fork, Tree

LEAST = 32  # columns of a prompt


def worthwhile(prompt: int, answer: int, group: int) -> bool:
    """Whether a prompt of so many columns is computed once, unless settings say otherwise, for a group of answers.

    It is if it has `LEAST` columns, and that saves a third of all columns.
    """
    return prompt >= LEAST and 3 * (prompt + group * answer) <= 2 * group * (prompt + answer)


def rows(count: int, group: int) -> int:
    """How many of so many rows share a prompt, on each device of a mesh."""
    return math.gcd(count // parallel.row_devices(), group)


def fork(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], start: int, group: int) -> tuple[Int[Array, "A S"], Tree]:
    """Each `group` rows as one: A = B / group trees of S = start + group (T - start) columns.

    The prompt is that of the first row of the group.
    """
    width = tokens.shape[1] - start
    joined = lambda x: jnp.concatenate([x[::group, :start], x[:, start:].reshape(-1, group * width)], axis=1)
    prefix, branch = jnp.arange(start + group * width, 0, -1)[:start], jnp.arange(width, 0, -1)
    reach = jnp.concatenate([prefix, jnp.tile(branch, group)])
    return joined(tokens), Tree(reach=jnp.where(joined(mask), reach[None], 0), fork=Fork(start, group))
