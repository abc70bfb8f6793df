"""Reward models from comparisons: Bradley-Terry over K-way rankings (arXiv:2203.02155, eq. 1) and best-of-n choice."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import optim, parallel
from rlhf_jax.heads import at_last
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.types import Metrics, Params, Rankings, TrainState


def better(rank: Int[Array, "B K"]) -> Bool[Array, "B K K"]:
    """True at [b, i, j] where response i was ranked above response j: ties and absent responses (-1) form no pair."""
    present = rank >= 0
    return (rank[:, :, None] < rank[:, None, :]) & present[:, :, None] & present[:, None, :]


def _margins(score: Float[Array, "B K"], pair: Bool[Array, "B K K"]) -> Float[Array, "B K K"]:
    """score_i - score_j where [i, j] is a pair, else 0: what absent responses hold reaches no value and no gradient."""
    score = jnp.where(jnp.any(pair, axis=1) | jnp.any(pair, axis=2), score, 0.0).astype(jnp.float32)
    return score[:, :, None] - score[:, None, :]


def bradley_terry_loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """`-ln sigmoid(score_better - score_worse)`, mean over each prompt's pairs, then over the prompts that have any.

    All pairs of a prompt stay in one batch element, so that each response is scored once and prompts weigh the same
    whatever their K. `count` replaces the number of prompts with pairs, see `masked_mean`.
    """
    pair = better(rank)
    pairs = jnp.sum(pair, axis=(1, 2))
    loss = jnp.where(pair, -jax.nn.log_sigmoid(_margins(score, pair)), 0.0)
    return masked_mean(jnp.sum(loss, axis=(1, 2)) / jnp.maximum(pairs, 1), pairs > 0, count)


def choice_loss(score: Float[Array, "B K"], best: Int[Array, "B"], count: Array | None = None) -> Float[Array, ""]:
    """`-ln softmax(score)[best]`, mean over rows: a labeler picked one of K (Ziegler et al. 2019, eq. 1)."""
    logp = jax.nn.log_softmax(score.astype(jnp.float32))
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.ones_like(best, bool), count)


def ranked_choice_loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """`choice_loss` where the choice is the response of smallest rank, among equals the first.

    Absent responses (-1) are no candidates; a prompt without a pair counts for nothing, as in `bradley_terry_loss`.
    """
    present = rank >= 0
    logp = jax.nn.log_softmax(jnp.where(present, score, jnp.finfo(jnp.float32).min).astype(jnp.float32))
    best = jnp.argmin(jnp.where(present, rank, jnp.iinfo(rank.dtype).max), axis=1)
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.any(better(rank), axis=(1, 2)), count)


def correct_pairs(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> tuple[Array, Array]:
    """How many pairs the scores order as the ranks do (equal scores count half), and how many pairs there are."""
    pair = better(rank)
    margin = _margins(score, pair)
    return jnp.sum(jnp.where(pair, 0.5 * (1 + jnp.sign(margin)), 0.0)), jnp.sum(pair)


def pairwise_accuracy(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> Float[Array, ""]:
    """Share of all pairs of the batch that the scores order as the ranks do; equal scores count half."""
    correct, pairs = correct_pairs(score, rank)
    return correct / jnp.maximum(pairs, 1)


def scores(params: Params, batch: Rankings, apply_fn: Callable, keys: Array | None = None) -> Float[Array, "B K"]:
    """One forward pass a response. `apply_fn(params, tokens, mask, keys)` returns a scalar a token."""
    rows, responses, length = batch.tokens.shape
    tokens, mask = batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)
    return at_last(apply_fn(params, tokens, mask, keys), mask).reshape(rows, responses)


def train_step(
    state: TrainState,
    batch: Rankings,
    *,
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    loss_fn: Callable = bradley_terry_loss,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the reward model on the global batch of rankings, whose prompts are spread over `axis`.

    `loss_fn` is `bradley_terry_loss` or `ranked_choice_loss`; the metric bears its name.
    """
    rows, responses, _ = batch.tokens.shape
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), rows * responses, axis)
    count = parallel.psum(jnp.sum(jnp.any(better(batch.rank), axis=(1, 2))), axis)

    def loss(params: Params) -> tuple[Array, tuple[Array, Array]]:
        score = scores(params, batch, apply_fn, keys)
        return loss_fn(score, batch.rank, count), correct_pairs(score, batch.rank)

    (value, (correct, pairs)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    value, correct, pairs, grads = parallel.psum((value, correct, pairs, grads), axis)
    metrics = {
        f"loss/{loss_fn.__name__.removesuffix('_loss')}": value,
        "reward/accuracy": correct / jnp.maximum(pairs, 1),
        "reward/pairs": pairs.astype(jnp.float32),
        "grad_norm": optax.tree.norm(grads),
    }
    return optim.apply_gradients(state, grads, tx), metrics


def evaluate(params: Params, batch: Rankings, *, apply_fn: Callable, axis: str | None = None) -> tuple[Array, Array]:
    """Correct pairs and pairs of the global batch."""
    return parallel.psum(correct_pairs(scores(params, batch, apply_fn), batch.rank), axis)


def normalize(params: Params, mean: float | Array, std: float | Array) -> Params:
    """Fold a gain and bias into the head, so that scores with this mean and standard deviation get 0 and 1.

    Ziegler et al. 2019 normalise on samples of the reference policy, before and after training.
    """
    return {**params, "kernel": params["kernel"] / std, "bias": (params["bias"] - mean) / std}
