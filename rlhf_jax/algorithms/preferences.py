"""The parts that DPO and its kin share: log-probabilities of ranked responses, and one update on a batch of rankings.

A ranking of K responses contributes all its pairs, as in `reward`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.algorithms.reward import correct_pairs, pair_mask
from rlhf_jax.devices import parallel
from rlhf_jax.types import LogprobsFn, Metrics, Params, Rankings, TrainState

# (params, rows, keys [B K], count of all prompts that have a pair) -> the share that these rows have in the loss, the
# score [B, K] that should order the responses, and metrics that add up over shares.
Objective = Callable[[Params, Rankings, Array, Array], tuple[Array, Array, Metrics]]


def sequence_logprobs(logp: Float[Array, "*rows T"], mask: Bool[Array, "*rows T"]) -> Float[Array, "*rows"]:
    """The log-probability of each whole sequence: the sum over its valid tokens, not their mean."""
    return jnp.sum(jnp.where(mask, logp, 0.0), axis=-1)


def mean_logprobs(logp: Float[Array, "*rows T"], mask: Bool[Array, "*rows T"]) -> Float[Array, "*rows"]:
    """The log-probability of each sequence, a token: the mean over its valid tokens; 0 where there are none."""
    return sequence_logprobs(logp, mask) / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def response_logprobs(
    params: Params,
    batch: Rankings,
    logprobs_fn: LogprobsFn,
    keys: Array | None = None,
    reduce: Callable[[Array, Array], Array] = sequence_logprobs,
) -> Float[Array, "B K"]:
    """The log-probability of each response given its prompt, whole or a token (`reduce`), in nats.

    A prompt that has a `prefix` is read once for all responses, where that pays. `keys` [B K] turn dropout on.
    """
    rows, responses, length = batch.tokens.shape
    tokens, mask = batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)
    start, group = (batch.prefix - 1, responses) if batch.prefix else (0, 1)
    logp = logprobs_fn(params, tokens, mask, keys, start=start, group=group)[0].reshape(rows, responses, -1)
    column = jnp.arange(start + 1, length)
    in_response = batch.mask[:, :, start + 1 :] & (column[None, None] >= batch.start[:, None, None])
    return reduce(logp, in_response)


def update(
    state: TrainState,
    batch: Rankings,
    objective: Objective,
    *,
    tx: optax.GradientTransformation,
    microbatches: int,
    balance: float,
    axis: str | None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of rankings, whose prompts are spread over `axis`.

    `balance` is the weight of a load-balancing loss, see `algorithms.balance`.

    The metrics are those of the objective, and how many pairs its scores order as the ranks do; they describe the
    parameters before the update.
    """
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), batch.rank.size, axis)
    count = parallel.psum(jnp.sum(jnp.any(pair_mask(batch.rank), axis=(1, 2))), axis)

    def loss(params: Params, batch: Rankings, keys: Array) -> tuple[Array, Metrics]:
        value, score, metrics = objective(params, batch, keys.reshape(-1), count)
        correct, pairs = correct_pairs(score, batch.rank)
        return value, metrics | {"correct": correct, "pairs": pairs}

    params = attach(state.params, balance, microbatches, axis)
    share = functools.partial(jax.grad(loss, has_aux=True), params)
    grads, sums = parallel.accumulate(share, microbatches)(batch, keys.reshape(batch.rank.shape))
    grads, metrics = parallel.psum((grads, jax.tree.map(jnp.sum, sums)), axis)
    grads, load = detach(grads)
    correct, pairs = metrics.pop("correct"), metrics.pop("pairs")
    metrics |= load | {"reward/accuracy": correct / jnp.maximum(pairs, 1), "grad_norm": optax.tree.norm(grads)}
    return optim.apply_gradients(state, grads, tx), metrics
