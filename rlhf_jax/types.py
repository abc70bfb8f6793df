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

Where several continuations share a prefix, a `Tree` takes the place of a segment array: the prefix is computed once.
"""

import zlib
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
from flax import struct

from rlhf_jax.errors import InputError as InputError
from rlhf_jax.settings import SEEDS as SEEDS

Leaf = Any  # an array on a device or the host, or whatever jax.tree.map puts in its place (a shape, a sharding)
Params = Any  # a nested dict of arrays
Metrics = dict[str, jax.Array]  # scalars by name, such as "loss/policy"


def named_key(seed: int, use: str) -> jax.Array:
    """The random key for one named use of a seed, such as "ppo/sampling": different uses never share noise. [].

    Raises InputError when the seed is not in [0, 2^32).
    """
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed={seed}: expected at least 0 and less than {SEEDS}")
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(use.encode()))


Virtue = Literal["helpful", "honest", "harmless"]  # what people rate a response for
VIRTUES: tuple[Virtue, ...] = get_args(Virtue)
BEST_RATING = 7  # ratings are whole numbers from 1 to this


class TrainState(struct.PyTreeNode):
    """Everything that a training step changes: arrays only, so it can be replicated, sharded, donated, checkpointed."""

    step: Leaf  # [] int32, number of completed train steps
    params: Params
    opt_state: Any
    rng: Leaf  # [] key; a step folds in `step` and the row index, and never replaces the key


class Fork(NamedTuple):
    """The shape that all trees of a batch have: one prefix, and branches of equal width behind it."""

    prefix: int  # columns
    branches: int


class Tree(struct.PyTreeNode):
    """Rows in which a prefix is followed by continuations that attend to it and to themselves, not to each other.

    A continuation may itself be a prefix of others, so the documents of a row are trees, laid out depth first: the
    columns that descend from a token directly follow it. `reach` is their number, with the token's own; 0 is padding. A
    token attends to itself and its ancestors, and its position is the number of these:

        token      a b  c d  e    a and b are shared by c, d and by e
        reach      5 4  2 1  1
        position   0 1  2 3  2

    The token that predicts a continuation's first one is its parent, which need not be in the column before it. Where a
    loss looks for it there, each continuation begins with a copy of the prefix's last token, instead of the prefix
    ending with it.

    Where a `fork` says that all rows have the same shape, which may hold padding, attention computes no scores between
    the branches, and the kernel of a TPU takes the rows.
    """

    reach: Leaf  # [B, T] int32
    fork: Fork | None = struct.field(pytree_node=False, default=None)


class Tokens(struct.PyTreeNode):
    """Rows of text to train on, for `sft.train_step`."""

    tokens: Leaf  # [B, T] int32
    segment: Any  # [B, T] int32, see above, or a `Tree`
    target: Leaf  # [B, T] bool: token t counts in the loss, predicted from the tokens before it in its document


class Prompts(struct.PyTreeNode):
    """Prompts to respond to."""

    tokens: Leaf  # [B, P] int32
    mask: Leaf  # [B, P] bool
    index: Leaf  # [B] int32, row number in the data source, where the prompt's text is
    noise: Leaf | None = None  # [B] int, of two rows with one number and key the noise is the same; None: their places


class Rankings(struct.PyTreeNode):
    """K ranked responses to each prompt; each sequence is the prompt and one response."""

    tokens: Leaf  # [B, K, T] int32
    mask: Leaf  # [B, K, T] bool
    start: Leaf  # [B] int32, number of prompt columns: the column where the responses start
    rank: Leaf  # [B, K] int32: smaller is better, equal is a tie, -1 is absent
    harmful: Leaf = None  # [B, K] bool, for a cost model: the response is rated below the middle
    # Columns of every prompt, padded on the left, which networks read once for its K responses; 0: each has its own.
    prefix: int = struct.field(pytree_node=False, default=0)


class Thumbs(struct.PyTreeNode):
    """Responses, each labelled good or bad, beside one to another prompt; a sequence is the prompt and a response."""

    tokens: Leaf  # [B, 2, T] int32: with the response that is labelled, and with that of another row
    mask: Leaf  # [B, 2, T] bool
    start: Leaf  # [B] int32, number of prompt columns
    good: Leaf  # [B] bool


class Steps(struct.PyTreeNode):
    """Solutions whose steps are labelled; a sequence is the prompt and the solution."""

    tokens: Leaf  # [B, T] int32
    mask: Leaf  # [B, T] bool
    step: Leaf  # [B, T] bool, the last token of a step
    label: Leaf  # [B, T] int32, of the step that ends there: 1 right, 0 neither, -1 wrong; 0 elsewhere


class Rollout(struct.PyTreeNode):
    """Sampled responses, with log-probabilities, values and scores. A field that was not computed is None."""

    tokens: Leaf  # [B, P + N] int32, the prompt followed by the response
    mask: Leaf  # [B, P + N] bool
    response_mask: Leaf  # [B, N] bool, the EOS counts
    logp: Leaf  # [B, N] nats, under the behaviour policy (the one that sampled the response)
    ended: Leaf  # [B] bool, the response contains an EOS
    index: Leaf  # [B] int32, as in `Prompts`
    logp_ref: Leaf = None  # [B, N] nats, under the frozen reference model
    value: Leaf = None  # [B, N] value of the state before each token; at the first pad, of the completed response
    score: Leaf = None  # [B] score of the whole response
    token_score: Leaf = None  # [B, N] score of each token, if the score source gives one
    step: Leaf = None  # [B, N] bool, the tokens at which a step is over, if `token_score` is of steps
    disagreement: Leaf = None  # [B] standard deviation of the scores of several reward models
    unjudged: Leaf = None  # [B] bool, a judge gave no score, so that it is the one set for that case
    scores: Leaf = None  # [B, R] the scores of R reward models, of which `algorithms.rewards` makes one
    cost: Leaf = None  # [B] score of a cost model: above 0 is harmful

    @property
    def response_tokens(self) -> Leaf:
        """The response's part of `tokens`. [B, N] int32."""
        return self.tokens[:, -self.response_mask.shape[1] :]


# A loss calls a network as a function of parameters and tokens, so it does not depend on any architecture.
# `rlhf_jax.models` builds these functions.


@runtime_checkable
class LogprobsFn(Protocol):
    """A language model that scores the N = T - 1 - start tokens after column `start`."""

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,  # [B, T]
        segment: jax.Array | Tree,  # [B, T], see above
        keys: jax.Array | None = None,  # [B], one a row for dropout; None turns dropout off
        *,
        start: int = 0,
        temperature: float = 1.0,
        with_entropy: bool = False,
        group: int = 1,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The log-probability of each token and, if `with_entropy`, its distribution's entropy. [B, N] each, nats.

        Each `group` rows that follow one another have the same prompt through column `start`, see `devices.shared`.
        """


@runtime_checkable
class LogitsFn(Protocol):
    """A language model's distributions over the N = T - 1 - start tokens after column `start`."""

    def __call__(self, params: Params, tokens: jax.Array, segment: jax.Array, *, start: int = 0) -> jax.Array:
        """The logits of each of these tokens. [B, N, V] float32."""


@runtime_checkable
class ScoreFn(Protocol):
    """A reward model, which gives a scalar score to each row."""

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        mask: jax.Array,
        keys: jax.Array | None = None,
        *,
        start: int = 0,
        group: int = 1,
    ) -> jax.Array:
        """The score of each row [B], read at its last token that is not padding; `start`, `group` as `LogprobsFn`."""


@runtime_checkable
class ValueFn(Protocol):
    """A critic. Its `params` are all trained parameters, since it may share the policy's trunk."""

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array, start: int) -> jax.Array:
        """The value [B, N] of the state before each token after column `start`, N = T - 1 - start."""
