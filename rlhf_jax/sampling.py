"""Generation with a key/value cache: one prefill, then a while-loop that stops when every row has ended."""

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.transformer import Cache, Config, Transformer, bind
from rlhf_jax.types import InputError, Leaf, Params


@runtime_checkable
class HasConfig(Protocol):
    """A `models.Model`, or a bare `Transformer`."""

    @property
    def config(self) -> Config: ...


class Sample(struct.PyTreeNode):
    """Responses, padded on the right."""

    tokens: Leaf  # [B, N] int32
    mask: Leaf  # [B, N] bool, the EOS counts
    logp: Leaf  # [B, N] float32 under the distribution that was sampled from, 0 at padding


def left_pad(tokens: Int[Array, "B P"], mask: Bool[Array, "B P"]) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """Move each row's real tokens to its right end, keeping their order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def truncate_logits(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf for all but the `top_k` most likely tokens, and outside the smallest set of likeliest tokens whose
    probability reaches `top_p` (arXiv:1904.09751). `top_k=0` and `top_p=1` keep everything."""
    if top_k > 0:
        lowest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        prob = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(prob, axis=-1) - prob < top_p
        lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def draw(keys: Array, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """One token a row from `softmax(logits)`, by inverting its distribution function at one uniform a row.

    A token of probability 0 is never drawn, also where rounding leaves the cumulative sum not quite monotone.
    """
    prob = jax.nn.softmax(logits, axis=-1)
    cumulative = jnp.where(prob > 0, jnp.cumsum(prob, axis=-1), -1.0)
    uniform = jax.vmap(jax.random.uniform)(keys)[:, None]
    return jnp.argmax(cumulative > uniform * jnp.max(cumulative, axis=-1, keepdims=True), axis=-1).astype(jnp.int32)


def generate(
    model: HasConfig,
    params: Params,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | tuple[int, ...] | None = None,
) -> Sample:
    """Sample a response to each prompt; `temperature=0` is greedy.

    `key` is one key, which row b folds its number into, or an array of keys [B]. A row's sample depends on its own
    prompt and key alone, not on the rest of the batch. Padding may be anywhere in a prompt. Raises InputError when
    the context is too short, or a setting out of range.
    """
    config = model.config
    _check(tokens.shape[1], max_new_tokens, config.max_length, temperature, top_k, top_p)
    if key.ndim == 0:
        key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(tokens.shape[0]))
    settings = (max_new_tokens, float(temperature), top_k, float(top_p), _ends(eos_id))
    return _generate(config, params, tokens, mask, key, *settings)


def stream(
    model: HasConfig,
    params: Params,
    tokens: Sequence[int],
    key: Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | tuple[int, ...] | None = None,
) -> Iterator[int]:
    """The tokens that `generate` answers one prompt with, each as soon as it is sampled, the EOS included.

    Prompts are padded to a power of two, so that prompts of all lengths share a few compiled programs.
    """
    config = model.config
    _check(len(tokens), max_new_tokens, config.max_length, temperature, top_k, top_p)
    columns = min(max(32, 1 << (len(tokens) - 1).bit_length()), config.max_length)
    padded, mask = np.zeros((1, columns), np.int32), np.zeros((1, columns), bool)
    padded[0, columns - len(tokens) :], mask[0, columns - len(tokens) :] = tokens, True
    keys, one, ends = jax.random.fold_in(key, 0)[None], jnp.ones((1, 1), bool), _ends(eos_id)
    cache = jax.tree.map(jnp.copy, Cache.empty(config, 1, columns + max_new_tokens))  # its leaves share memory
    step = functools.partial(_step, config, params, temperature=float(temperature), top_k=top_k, top_p=float(top_p))
    token, cache = step(cache, jnp.asarray(padded), jnp.asarray(mask), keys, jnp.int32(0))
    for n in range(1, max_new_tokens + 1):
        sampled = token
        if n < max_new_tokens:  # the device goes on before the host has the token
            token, cache = step(cache, sampled[:, None], one, keys, jnp.int32(n))
        yield int(sampled[0])
        if int(sampled[0]) in ends:
            return


def _check(columns: int, max_new_tokens: int, max_length: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if columns + max_new_tokens > max_length:
        raise InputError(
            f"{columns} prompt columns and {max_new_tokens} new tokens exceed the model's context of "
            f"{max_length}: shorten the prompts or lower max_new_tokens"
        )
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise InputError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: expected >= 0, >= 0, in (0, 1]")


def _ends(eos_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


def _forward(config: Config, params: Params, tokens: Array, mask: Array, cache: Cache) -> tuple[Array, Cache]:
    """Logits [B, V] after the last of these columns."""
    apply_fn = bind(Transformer(config))
    hidden, cache = apply_fn(params, tokens, mask, None, cache, method="hidden")
    return apply_fn(params, hidden[:, -1:], method="unembed")[:, 0], cache


def _choose(
    logits: Array, keys: Array, n: Array | int, temperature: float, top_k: int, top_p: float
) -> tuple[Array, Array]:
    """Token n of each row and its log-probability."""
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncate_logits(logits / temperature, top_k, top_p)
        token = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, n), logits)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    return token, logp


@functools.partial(jax.jit, static_argnums=0, static_argnames=("temperature", "top_k", "top_p"), donate_argnums=2)
def _step(
    config: Config,
    params: Params,
    cache: Cache,
    tokens: Array,
    mask: Array,
    keys: Array,
    n: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Array, Cache]:
    """Token n of each row, after these columns."""
    logits, cache = _forward(config, params, tokens, mask, cache)
    return _choose(logits, keys, n, temperature, top_k, top_p)[0], cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8, 9))
def _generate(
    config: Config,
    params: Params,
    tokens: Array,
    mask: Array,
    keys: Array,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    ends: tuple[int, ...],
) -> Sample:
    rows, prompt_columns = tokens.shape
    tokens, mask = left_pad(tokens, mask)

    def ended(token: Array) -> Array:
        return jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros(rows, bool)

    logits, cache = _forward(config, params, tokens, mask, Cache.empty(config, rows, prompt_columns + max_new_tokens))
    token, logp = _choose(logits, keys, 0, temperature, top_k, top_p)
    empty = jnp.zeros((rows, max_new_tokens))
    sample = Sample(
        tokens=jnp.full(empty.shape, ends[0] if ends else 0, jnp.int32).at[:, 0].set(token),
        mask=empty.astype(bool).at[:, 0].set(True),
        logp=empty.at[:, 0].set(logp),
    )

    def unfinished(carry: tuple) -> Array:
        n, done = carry[:2]
        return (n < max_new_tokens) & ~jnp.all(done)

    def extend(carry: tuple) -> tuple:
        n, done, token, sample, cache = carry
        logits, cache = _forward(config, params, token[:, None], jnp.ones((rows, 1), bool), cache)
        token, logp = _choose(logits, keys, n, temperature, top_k, top_p)
        live = ~done

        def put(column: Array, values: Array) -> Array:
            return column.at[:, n].set(jnp.where(live, values, column[:, n]))

        sample = Sample(put(sample.tokens, token), put(sample.mask, live), put(sample.logp, logp))
        return n + 1, done | ended(token), token, sample, cache

    carry = (jnp.int32(1), ended(token), token, sample, cache)
    return jax.lax.while_loop(unfinished, extend, carry)[3]
