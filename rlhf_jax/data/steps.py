"""Where the steps of a solution end: at a new line, and at the end of the solution.

A process reward model reads a step at its last token, before the new line or EOS that ends it, so that what it reads is
the same whether or not the solution goes on.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from rlhf_jax.data.tokenizer import Tokenizer, token_bytes

Array = jax.Array | np.ndarray


class Marks(NamedTuple):
    """The effect of each token of a vocabulary on a step; an id beyond has that of the last one."""

    ends: np.ndarray  # [V] bool, the token ends with a new line
    blank: np.ndarray  # [V] bool, it is white space with a new line, or ends the solution: it belongs to no step


def marks(tokenizer: Tokenizer, eos_id: Sequence[int]) -> Marks:
    """The marks of a tokenizer's vocabulary, in which `eos_id` end a solution."""
    written = token_bytes(tokenizer)
    ends = np.array([text.endswith(b"\n") for text in written], bool)
    blank = np.array([b"\n" in text and not text.strip() for text in written], bool)
    blank[list(eos_id)] = True
    return Marks(ends, blank)


def find(
    tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], of: Marks
) -> tuple[Bool[Array, "B N"], Int[Array, "B N"]]:
    """The columns at which a step is over, and for each of them the column of the step's last token. [B, N] each.

    A step is over at the new line or EOS that follows its last token; else at that token, where it has the new line in
    itself or is the last of the row. Empty steps are none. The valid tokens of a row must be contiguous.
    """
    xp = jnp if isinstance(tokens, jax.Array) else np
    blank, ends = xp.asarray(of.blank)[tokens], xp.asarray(of.ends)[tokens]
    inside = mask & ~blank
    left_open = inside & ~ends  # the step goes on, unless the next token ends it
    closed = mask & blank & xp.pad(left_open[:, :-1], ((0, 0), (1, 0)))
    last = mask & ~xp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    over = closed | (inside & (ends | last))
    return over, xp.arange(tokens.shape[1], dtype=np.int32)[None] - closed.astype(np.int32)


def text(steps: Sequence[str]) -> str:
    """The solution that consists of these steps, each on a line of its own."""
    return "\n".join(re.sub(r"\s*\n\s*", " ", step.strip()) for step in steps)
