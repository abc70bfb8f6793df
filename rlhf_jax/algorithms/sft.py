"""Next-token prediction: pretraining on raw text, and supervised fine-tuning on demonstrations.

The two differ only in the target tokens: all but the first of each document, or those of the completion.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import masked_mean, token_logprobs
from rlhf_jax.types import LogprobsFn, Metrics, Params, Tokens, TrainState


def next_token_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    count: Array | None = None,
) -> Float[Array, ""]:
    """The cross-entropy -ln p(targets[b, t]) under logits[b, t] in nats, mean over all tokens inside the mask.

    The mean is over tokens, so long rows have more weight than short ones. `count` replaces the number of tokens, see
    `masked_mean`. Only for comparison with other code: training uses `loss`, which takes log-probabilities.
    """
    return masked_mean(-token_logprobs(logits, targets), mask, count)


def loss(
    params: Params, batch: Tokens, logprobs_fn: LogprobsFn, keys: Array | None = None, count: Array | None = None
) -> Float[Array, ""]:
    """The mean of -ln p over the target tokens of a batch, in nats; with `count`, a share of it (see `masked_mean`).

    `keys` [B] turn dropout on.
    """
    logp, _ = logprobs_fn(params, batch.tokens, batch.segment, keys)
    return masked_mean(-logp, batch.target[:, 1:], count)


def train_step(
    state: TrainState,
    batch: Tokens,
    *,
    logprobs_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch, whose rows are spread over `axis`.

    `balance` is the weight of a load-balancing loss, see `algorithms.balance`.

    The metrics describe the parameters before the update; the loss is in nats a token.
    """
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), batch.tokens.shape[0], axis)
    count = parallel.psum(jnp.sum(batch.target[:, 1:]), axis)
    params = attach(state.params, balance, microbatches, axis)

    def share(rows: Tokens, keys: Array) -> tuple[Params, Array]:
        value, grads = jax.value_and_grad(loss)(params, rows, logprobs_fn, keys, count)
        return grads, value

    grads, values = parallel.accumulate(share, microbatches)(batch, keys)
    grads, value = parallel.psum((grads, jnp.sum(values)), axis)
    grads, load = detach(grads)
    metrics = {"loss/next_token": value, "grad_norm": optax.tree.norm(grads), "tokens": count.astype(jnp.float32)}
    return optim.apply_gradients(state, grads, tx), metrics | load


def evaluate(params: Params, batch: Tokens, *, logprobs_fn: LogprobsFn, axis: str | None = None) -> tuple[Array, Array]:
    """The negative log-likelihood in nats, summed over the global batch's target tokens, and their number. [], []."""
    mask = batch.target[:, 1:]
    logp, _ = logprobs_fn(params, batch.tokens, batch.segment)
    return parallel.psum((-jnp.sum(jnp.where(mask, logp, 0.0)), jnp.sum(mask)), axis)


def held_out_loss(params: Params, batches: Tokens, *, logprobs_fn: LogprobsFn, axis: str | None = None) -> Metrics:
    """The mean of -ln p over all target tokens of the batches, which are stacked on a leading axis, in nats."""

    def add(totals: tuple[Array, Array], batch: Tokens) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(jnp.add, totals, evaluate(params, batch, logprobs_fn=logprobs_fn)), None

    totals, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros((), int)), batches)
    nll, count = parallel.psum(totals, axis)
    return {"loss/held_out": nll / count}
