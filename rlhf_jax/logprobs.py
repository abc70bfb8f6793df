"""What a model says of tokens: log-probabilities, entropy, divergence. Float32 inside, nats outside."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

KLKind = Literal["k1", "k2", "k3"]


def precise(x: Array) -> Array:
    """`x` in float32, or in float64 if that is what it is: where log-probabilities, rewards and losses are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Log-probability of `tokens[b, t]` under `softmax(logits[b, t] / temperature)`: already aligned, no shift."""
    logits = precise(logits) / temperature
    # A sum, and not an index: where the vocabulary is spread over devices, each adds what it has.
    here = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2) == tokens[..., None]
    chosen = jnp.sum(jnp.where(here, logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "B T V"], temperature: float = 1.0) -> Float[Array, "B T"]:
    """Entropy of `softmax(logits / temperature)` at each position, `-sum_v p_v ln p_v`."""
    logp = jax.nn.log_softmax(precise(logits) / temperature)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def by_columns(read: Callable[..., Any], chunk: int, *arrays: Array) -> Any:
    """`read` of arrays [B, N, ...], `chunk` columns at a time; its results are [B, N]. A chunk of 0 is all of them.

    What `read` makes on the way, such as logits [B, N, V], then exists for one chunk only: the backward pass makes it
    anew, chunk by chunk. Chunks are equal but for padding.
    """
    rows, columns = arrays[0].shape[:2]
    if not 0 < chunk < columns:
        return read(*arrays)
    parts = -(-columns // chunk)
    size = -(-columns // parts)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, parts * size - columns)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, parts, size, *x.shape[2:]), 1, 0)

    results = jax.lax.map(jax.checkpoint(lambda part: read(*part), prevent_cse=False), tuple(map(split, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :columns], results)


def kl_estimate(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], kind: KLKind = "k1") -> Float[Array, "B T"]:
    """Estimates of KL(policy || reference) from tokens that the policy sampled, with d = logp - logp_ref.

    k1 = d is unbiased; k2 = d^2 / 2 has low variance and some bias; k3 = exp(-d) - 1 + d is unbiased and never
    negative (Schulman 2020, "Approximating KL divergence").
    """
    d = precise(logp) - precise(logp_ref)
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d**2
        case "k3":
            return jnp.expm1(-d) + d
        case _:
            raise ValueError(f"unknown KL estimator {kind!r}: expected 'k1', 'k2' or 'k3'")


def kl_full(logits_p: Float[Array, "B T V"], logits_q: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """Exact KL(p || q) at each position, by summing over the vocabulary; for checking the estimates."""
    logp = jax.nn.log_softmax(precise(logits_p))
    logq = jax.nn.log_softmax(precise(logits_q))
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def response_mask(tokens: Int[Array, "B N"], eos_id: int | tuple[int, ...]) -> Bool[Array, "B N"]:
    """True up to and including the first EOS of each row; everywhere in a row that has none."""
    is_eos = tokens == eos_id if isinstance(eos_id, int) else jnp.isin(tokens, jnp.array(eos_id, tokens.dtype))
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0


def last_index(mask: Bool[Array, "B T"]) -> Array:
    """Column of each row's last valid token, -1 in an empty row. [B] int32."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask, columns[None], -1), axis=1)


def masked_mean(x: Shaped[Array, "..."], mask: Bool[Array, "..."], count: Array | None = None) -> Float[Array, ""]:
    """Sum of `x` where `mask`, over `count`.

    `count` defaults to the mask's own number of entries. A step that sees only a share of a batch (one device's, one
    micro-batch's) passes the count of the whole batch: its shares then add up to the mean over the whole.
    Entries outside the mask may hold anything, infinities included.
    """
    count = jnp.sum(mask) if count is None else count
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1)
