"""The frozen pytrees that flow through every step, and the legend of their axes.

Axes, in the order in which they appear:

    B  sequences (rows) of a batch; under `pmap`, the rows of one device
    K  responses to one prompt
    P  prompt columns
    N  response columns, of which the last may be padding
    T  columns of a whole sequence (P + N for a rollout)
    V  vocabulary
    D  model width, H attention heads, G key/value heads, L layers

Token ids are int32, masks are bool and mark what counts, everything per-token is float32.
A *segment* array is a mask that can also tell packed documents apart: 0 is padding, and the ids of the
documents of one row ascend from 1. A bool mask is a segment array with one document a row.
"""

import zlib
from typing import Any, Protocol, runtime_checkable

import jax
from flax import struct

Leaf = Any  # an array on device or host, and whatever else jax.tree.map may put in its place
Params = Any  # a nested dict of arrays
Metrics = dict[str, jax.Array]  # scalars by name, such as "loss/policy"


class InputError(ValueError):
    """Something the user supplied cannot be used. The message is one line: what, where, and what to do."""


SEEDS = 2**32  # how many there are: jax takes a larger one by its remainder, and so repeats the noise of a smaller


def named_key(seed: int, use: str) -> jax.Array:
    """The key that `seed` gives for one use of it, such as "ppo/sampling": no two uses share noise."""
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed={seed}: expected at least 0 and less than {SEEDS}")
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode()))


class TrainState(struct.PyTreeNode):
    """All that a run changes. Arrays only, so that it replicates, shards, donates and checkpoints whole."""

    step: Leaf  # [] int32, number of completed calls of the train step
    params: Params
    opt_state: Any
    rng: Leaf  # [] key; a step folds in `step` and the row index, and never replaces it


class Tokens(struct.PyTreeNode):
    """Rows of text to learn from, for `sft.train_step`."""

    tokens: Leaf  # [B, T] int32
    segment: Leaf  # [B, T] int32, see above
    target: Leaf  # [B, T] bool: token t is predicted, from what precedes it in its document


class Prompts(struct.PyTreeNode):
    """Prompts to respond to."""

    tokens: Leaf  # [B, P] int32
    mask: Leaf  # [B, P] bool
    index: Leaf  # [B] int32, the row of the data source, to find its text again


class Rankings(struct.PyTreeNode):
    """K ranked responses to each prompt; each sequence is the prompt and one response."""

    tokens: Leaf  # [B, K, T] int32
    mask: Leaf  # [B, K, T] bool
    start: Leaf  # [B] int32, columns of the prompt, where the responses start
    rank: Leaf  # [B, K] int32: smaller is better, equal is a tie, -1 is absent


class Rollout(struct.PyTreeNode):
    """Sampled responses with everything that the behaviour policy, reference, critic and score source said of them."""

    tokens: Leaf  # [B, P + N] int32, prompt then response
    mask: Leaf  # [B, P + N] bool
    response_mask: Leaf  # [B, N] bool, the EOS counts
    logp: Leaf  # [B, N] under the policy that sampled
    ended: Leaf  # [B] bool, the response has its EOS
    index: Leaf  # [B] int32, as in `Prompts`
    logp_ref: Leaf = None  # [B, N] under the reference policy
    value: Leaf = None  # [B, N] of the state in which each token was chosen; at the first pad, of the ended response
    score: Leaf = None  # [B] of the whole response
    token_score: Leaf = None  # [B, N] of each token, where there is such a source
    disagreement: Leaf = None  # [B] standard deviation of an ensemble's scores

    @property
    def response_tokens(self) -> Leaf:
        """[B, N] int32, the response alone."""
        return self.tokens[:, -self.response_mask.shape[1] :]


# How a loss calls a network: as a function of parameters and tokens, which `rlhf_jax.models` makes of an architecture.


@runtime_checkable
class LogprobsFn(Protocol):
    """A language model: what it says of the tokens after column `start`, N = T - 1 - start."""

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,  # [B, T]
        segment: jax.Array,  # [B, T], see above
        keys: jax.Array | None = None,  # [B], they turn dropout on
        *,
        start: int = 0,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Log-probability of each token [B, N] and, if asked, the entropy of what it was drawn from."""


@runtime_checkable
class ScoreFn(Protocol):
    """A reward model."""

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """The score of each row [B], read at its last real token."""


@runtime_checkable
class ValueFn(Protocol):
    """A critic; `params` are all that is trained, since it may share the policy's trunk."""

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array, start: int) -> jax.Array:
        """The value [B, N] of the state before each token after column `start`, N = T - 1 - start."""
