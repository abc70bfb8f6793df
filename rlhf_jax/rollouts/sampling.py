"""Generation with a key/value cache: one prefill, then a loop that stops when every row has ended.

On CPU, whose time goes with the number of rows, the loop is several, each over half the rows of the one before.
No step of `generate`'s loop copies or converts weights.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.transformer import Transformer, bind, layers_of
from rlhf_jax.types import InputError, Leaf, Params


@runtime_checkable
class HasConfig(Protocol):
    """A `models.Model`, or a bare `Transformer`."""

    @property
    def config(self) -> models.Config: ...


@dataclasses.dataclass(frozen=True)
class Config:
    """How responses are sampled."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # sample from this many of the likeliest tokens; 0 is from all
    top_p: float = 1.0  # sample from the likeliest tokens whose probability reaches this; 1 is from all
    eos_id: int | tuple[int, ...] | None = None  # tokens that end a response; None is none
    stop_at_eos: bool = True  # False: a response goes on after its end, up to max_new_tokens

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature={self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected a probability in (0, 1]")

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response, none if there are none."""
        return () if self.eos_id is None else (self.eos_id,) if isinstance(self.eos_id, int) else tuple(self.eos_id)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens after which nothing more is sampled."""
        return self.ends if self.stop_at_eos else ()


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


def noise(keys: Array, n: int | Array) -> Float[Array, "B"]:
    """What decides token n of each row: a number in [0, 1)."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, n)))(keys)


def draw(uniform: Float[Array, "B"], logits: Float[Array, "B V"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row from `softmax(logits)`, by inverting its distribution function, and its log-probability.

    The sum of a block of the vocabulary decides which block, and then that block alone is looked into. A token of
    probability 0 is never drawn, also where rounding leaves a cumulative sum not quite monotone.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.pad(jnp.exp(logits - top), ((0, 0), (0, blocks * BLOCK - vocab))).reshape(rows, blocks, BLOCK)
    block_weight = jnp.sum(weight, axis=-1)
    before = jnp.cumsum(block_weight, axis=-1) - block_weight
    total = jnp.sum(block_weight, axis=-1)
    block = _last(before <= (uniform * total)[:, None], block_weight > 0)
    inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
    rest = uniform * total - jnp.take_along_axis(before, block[:, None], axis=1)[:, 0]
    place = _last(jnp.cumsum(inside, axis=-1) - inside <= rest[:, None], inside > 0)
    token = block * BLOCK + place
    logp = jnp.take_along_axis(logits - top, token[:, None], axis=1)[:, 0] - jnp.log(total)
    return token, logp


BLOCK = 128  # tokens


def _last(reached: Bool[Array, "B X"], possible: Bool[Array, "B X"]) -> Int[Array, "B"]:
    """The last place of each row that is reached and possible; where there is none, the first that is possible."""
    place = jnp.arange(1, reached.shape[1] + 1)
    last = jnp.max(jnp.where(reached & possible, place, 0), axis=1)
    return jnp.where(last > 0, last - 1, jnp.argmax(possible, axis=1)).astype(jnp.int32)


def generate(
    model: HasConfig, params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], key: Array, cfg: Config
) -> Sample:
    """Sample a response to each prompt.

    `key` is one key, which row b folds its number into, or an array of keys [B]. A row's sample depends on its own
    prompt and key alone, not on the rest of the batch. Padding may be anywhere in a prompt. Raises InputError when
    the context is too short.
    """
    _check(tokens.shape[1], cfg.max_new_tokens, model.config.max_length)
    if key.ndim == 0:
        key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(tokens.shape[0]))
    return _generate(model.config, params, tokens, mask, key, cfg)


def stream(model: HasConfig, params: Params, tokens: Sequence[int], key: Array, cfg: Config) -> Iterator[int]:
    """The tokens that `generate` answers one prompt with, each as soon as it is sampled, the EOS included.

    Prompts are padded to a power of two, so that prompts of all lengths share a few compiled programs.
    """
    config = model.config
    _check(len(tokens), cfg.max_new_tokens, config.max_length)
    columns = min(max(32, 1 << (len(tokens) - 1).bit_length()), config.max_length)
    padded, mask = np.zeros((1, columns), np.int32), np.zeros((1, columns), bool)
    padded[0, columns - len(tokens) :], mask[0, columns - len(tokens) :] = tokens, True
    keys, one = jax.random.fold_in(key, 0)[None], jnp.ones((1, 1), bool)
    cache = Cache.empty(config, 1, columns + cfg.max_new_tokens)
    cache = jax.tree.map(jnp.copy, cache)  # its leaves share memory
    max_new_tokens, cfg = (
        cfg.max_new_tokens,
        dataclasses.replace(cfg, max_new_tokens=1),
    )  # of the compiled step, which is the same for any number
    token, cache = _step(config, cfg, params, cache, jnp.asarray(padded), jnp.asarray(mask), keys, jnp.int32(0))
    for n in range(1, max_new_tokens + 1):
        sampled = token
        if n < max_new_tokens:  # the device goes on before the host has the token
            token, cache = _step(config, cfg, params, cache, sampled[:, None], one, keys, jnp.int32(n))
        yield int(sampled[0])
        if int(sampled[0]) in cfg.stops:
            return


def _check(columns: int, max_new_tokens: int, max_length: int) -> None:
    if columns + max_new_tokens > max_length:
        raise InputError(
            f"{columns} prompt columns and {max_new_tokens} new tokens exceed the model's context of "
            f"{max_length}: shorten the prompts or lower max_new_tokens"
        )


def _forward(
    config: models.Config, params: Params, tokens: Array, mask: Array, cache: Cache, layers: list[Params] | None = None
) -> tuple[Array, Cache]:
    """Logits [B, V] after the last of these columns."""
    module = Transformer(config)
    hidden, unembed = bind(module, Transformer.hidden), bind(module, Transformer.unembed)
    last, cache = hidden(params, tokens, mask, None, cache, layers, slice(-1, None))
    return unembed(params, last)[:, 0], cache


def _converted(config: models.Config, params: Params) -> tuple[models.Config, Params]:
    """The same model, its matrices already in the type that they are multiplied in."""
    dtype = config.compute.dtype

    def convert(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key.startswith("kernel") else x

    blocks = jax.tree_util.tree_map_with_path(convert, params["blocks"])
    table = params["embedding" if config.tie_embeddings else "unembedding"].astype(dtype)
    config = dataclasses.replace(config, tie_embeddings=False)  # what is looked up stays as it was
    return config, {**params, "blocks": blocks, "unembedding": table}


def _choose(logits: Array, uniform: Array, cfg: Config) -> tuple[Array, Array]:
    """A token of each row and its log-probability."""
    if cfg.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    return draw(uniform, truncate_logits(logits / cfg.temperature, cfg.top_k, cfg.top_p))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    config: models.Config,
    cfg: Config,
    params: Params,
    cache: Cache,
    tokens: Array,
    mask: Array,
    keys: Array,
    n: Array,
) -> tuple[Array, Cache]:
    """Token n of each row, after these columns."""
    logits, cache = _forward(config, params, tokens, mask, cache)
    return _choose(logits, noise(keys, n), cfg)[0], cache


class _Rows(struct.PyTreeNode):
    """Where each row that is still computed has got to."""

    number: Leaf  # [B] int32, of the row within the batch
    done: Leaf  # [B] bool
    token: Leaf  # [B] int32, the last one
    uniform: Leaf  # [B, N]
    sample: Sample
    cache: Cache

    def take(self, index: Array) -> "_Rows":
        pick = functools.partial(jax.tree.map, lambda x: x[index])
        return _Rows(
            number=pick(self.number),
            done=pick(self.done),
            token=pick(self.token),
            uniform=pick(self.uniform),
            sample=pick(self.sample),
            cache=self.cache.rows(index),
        )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _generate(config: models.Config, params: Params, tokens: Array, mask: Array, keys: Array, cfg: Config) -> Sample:
    max_new_tokens, ends = cfg.max_new_tokens, cfg.stops
    batch, prompt_columns = tokens.shape
    tokens, mask = left_pad(tokens, mask)
    config, params = _converted(config, params)
    choose = functools.partial(_choose, cfg=cfg)

    def ended(token: Array) -> Array:
        return jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros(token.shape, bool)

    def prefill(params: Params, layers: list[Params] | None, cache: Cache, uniform: Array) -> _Rows:
        logits, cache = _forward(config, params, tokens, mask, cache, layers)
        token, logp = choose(logits, uniform[:, 0])
        empty = jnp.zeros((batch, max_new_tokens))
        sample = Sample(
            tokens=jnp.full(empty.shape, ends[0] if ends else 0, jnp.int32).at[:, 0].set(token),
            mask=empty.astype(bool).at[:, 0].set(True),
            logp=empty.at[:, 0].set(logp),
        )
        return _Rows(jnp.arange(batch), ended(token), token, uniform, sample, cache)

    def extend(params: Params, layers: list[Params] | None, carry: tuple[Array, _Rows]) -> tuple[Array, _Rows]:
        n, rows = carry
        here = jnp.ones((len(rows.token), 1), bool)
        logits, cache = _forward(config, params, rows.token[:, None], here, rows.cache, layers)
        token, logp = choose(logits, jax.lax.dynamic_index_in_dim(rows.uniform, n, 1, keepdims=False))
        live = ~rows.done

        def put(column: Array, values: Array) -> Array:
            return column.at[:, n].set(jnp.where(live, values, column[:, n]))

        old = rows.sample
        sample = Sample(put(old.tokens, token), put(old.mask, live), put(old.logp, logp))
        return n + 1, rows.replace(done=rows.done | ended(token), token=token, sample=sample, cache=cache)

    def written_out(params: Params, cache: Cache, uniform: Array, loops: int) -> Sample:
        """Layers by themselves: XLA for CPU and GPU copies what is cut out of a stack, in each step.

        Whenever half the rows have ended, the others go on by themselves, in up to so many loops.
        """
        layers = layers_of(params, config)
        rows = prefill(params, layers, cache.apart(), uniform)
        n, sample, sizes = jnp.int32(1), rows.sample, [batch]
        while ends and sizes[-1] >= FEWEST and len(sizes) < loops:
            sizes.append(sizes[-1] // 2)
        for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
            if size < batch:
                rows = rows.take(jnp.argsort(rows.done, stable=True)[:size])

            def unfinished(carry: tuple[Array, _Rows], smaller: int = smaller) -> Array:
                return (carry[0] < max_new_tokens) & (jnp.sum(~carry[1].done) > smaller)

            n, rows = jax.lax.while_loop(unfinished, functools.partial(extend, params, layers), (n, rows))
            sample = jax.tree.map(lambda whole, x, number=rows.number: whole.at[number].set(x), sample, rows.sample)
        return sample

    def stacked(params: Params, cache: Cache, uniform: Array) -> Sample:
        """A loop over the layers, which TPUs read where they lie; on a mesh it gathers one at a time."""

        def unfinished(carry: tuple[Array, _Rows]) -> Array:
            return (carry[0] < max_new_tokens) & ~jnp.all(carry[1].done)

        start = (jnp.int32(1), prefill(params, None, cache, uniform))
        return jax.lax.while_loop(unfinished, functools.partial(extend, params, None), start)[1].sample

    # On GPUs all rows go on until the last has ended: each further loop would be compiled, layer by layer.
    on_cpu, on_gpu = (functools.partial(written_out, loops=loops) for loops in (LOOPS, 1))
    cache = Cache.empty(config, batch, prompt_columns + max_new_tokens)
    uniform = jax.vmap(noise, (None, 0), 1)(keys, jnp.arange(max_new_tokens))
    default = stacked if parallel.has_mesh() else on_gpu
    return jax.lax.platform_dependent(params, cache, uniform, cpu=on_cpu, tpu=stacked, default=default)


FEWEST, LOOPS = 32, 4  # rows of which half are worth a loop of their own, and the most loops: each is compiled
