"""Log-probabilities, entropy and KL divergence from logits; computed in float32, returned in nats."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.devices import parallel

KLKind = Literal["k1", "k2", "k3"]


def precise(x: Array) -> Array:
    """`x` cast to at least float32 (float64 stays), in which log-probabilities, rewards and losses are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], temperature: float = 1.0
) -> Float[Array, "B T"]:
    """The log-probability of tokens[b, t] under softmax(logits[b, t] / temperature), in nats; no shift is applied."""
    logits = precise(logits) / temperature
    if parallel.platform() == "cpu":
        return _on_cpu(logits, tokens)
    # A masked sum in place of an index: with a vocabulary sharded over devices, each device sums its own part.
    chosen = jnp.sum(jnp.where(_is_token(logits, tokens), logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@jax.custom_vjp
def _on_cpu(logits: Array, tokens: Array) -> Array:
    """The log-probabilities, with a gradient of their own. TPUs would need more memory for it than for JAX's."""
    return _forward(logits, tokens)[0]


def _forward(logits: Array, tokens: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """The log-probabilities, and what their gradient needs: the logits, the tokens and ln(sum(exp(logits)))."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    return chosen - total, (logits, tokens, total)


def _backward(saved: tuple[Array, Array, Array], grads: Array) -> tuple[Array, None]:
    """The gradient with respect to the logits in one pass; JAX's own would keep exp(logits) from the forward pass."""
    logits, tokens, total = saved
    return grads[..., None] * (_is_token(logits, tokens) - jnp.exp(logits - total[..., None])), None


def _is_token(logits: Array, tokens: Array) -> Array:
    """A mask of each distribution's entry for its token."""
    return jax.lax.broadcasted_iota(tokens.dtype, logits.shape, 2) == tokens[..., None]


_on_cpu.defvjp(_forward, _backward)


def entropy(logits: Float[Array, "B T V"], temperature: float = 1.0) -> Float[Array, "B T"]:
    """The entropy -sum_v p_v ln p_v at each position, in nats, with p = softmax(logits / temperature)."""
    logp = jax.nn.log_softmax(precise(logits) / temperature)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def map_columns(read: Callable[..., Any], chunk: int, *arrays: Array) -> Any:
    """Apply `read` to arrays [B, N, ...], at most `chunk` columns at a time (0: all at once); it returns such arrays.

    This saves memory: the intermediates of `read`, such as logits [B, N, V], exist for one chunk at a time, and the
    backward pass recomputes them chunk by chunk. Chunks have equal width; the last one is padded.
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
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :columns], results)


def kl_estimate(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], kind: KLKind = "k1") -> Float[Array, "B T"]:
    """Per-token estimates of KL(policy || reference), in nats, from tokens that the policy sampled.

    With d = logp - logp_ref: k1 = d is unbiased; k2 = d^2 / 2 has low variance and some bias; k3 = exp(-d) - 1 + d is
    unbiased and never negative (Schulman 2020, "Approximating KL divergence"). ValueError for another kind.
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
    """The exact KL(p || q) = sum_v p_v ln(p_v / q_v) at each position, in nats. Only tests use it."""
    logp = jax.nn.log_softmax(precise(logits_p))
    logq = jax.nn.log_softmax(precise(logits_q))
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def response_mask(tokens: Int[Array, "B N"], eos_id: int | tuple[int, ...]) -> Bool[Array, "B N"]:
    """A mask of each row up to and including its first EOS; all True in a row without EOS."""
    is_eos = tokens == eos_id if isinstance(eos_id, int) else jnp.isin(tokens, jnp.array(eos_id, tokens.dtype))
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0


def last_index(mask: Bool[Array, "B T"]) -> Array:
    """The column of each row's last valid token, or -1 in an empty row. [B] int32."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask, columns[None], -1), axis=1)


def masked_mean(x: Shaped[Array, "..."], mask: Bool[Array, "..."], count: Array | None = None) -> Float[Array, ""]:
    """The sum of `x` inside the mask, divided by `count`, which defaults to the number of True entries of `mask`.

    A step that sees a share of a batch (one device's rows, one micro-batch) passes the count of the whole batch: the
    shares then add up to the mean over the whole. Entries outside the mask may hold anything, even infinities.
    """
    count = jnp.sum(mask) if count is None else count
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1)
