"""Generation with a key/value cache: one prefill, then a loop over tokens that ends when every row has.

There are two strategies, `_sample_unrolled` for CPUs and GPUs and `_sample_stacked` for TPUs and meshes. On CPU, where
a step takes as long as it has rows, the first has several loops, each over half the rows of the one before. No step
copies or converts weights.

The cache has two parts: what the prompts left, which the rows of a group share, and the columns of new tokens, of which
there are more in each of some successive loops. With `Config.slots`, one loop computes so many rows at a time, and the
next prompt takes the place of a row that has ended.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import models
from rlhf_jax.devices import parallel, ragged
from rlhf_jax.devices import shared as shared_rows
from rlhf_jax.devices.compute import quantize
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.transformer import Transformer, bind, layers_of
from rlhf_jax.settings import Count, NonNegative, Settings, Share, Whole
from rlhf_jax.types import InputError, Leaf, Params


@runtime_checkable
class HasConfig(Protocol):
    """A `models.Model`, or a bare `Transformer`."""

    @property
    def config(self) -> models.Config: ...


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How responses are sampled."""

    max_new_tokens: Count  # the longest response
    temperature: NonNegative = 1.0  # 0 is greedy
    top_k: Whole = 0  # sample from this many of the likeliest tokens; 0: from all
    top_p: Share = 1.0  # sample from the likeliest tokens whose probability reaches this; 1: from all
    eos_id: Whole | tuple[Whole, ...] | None = None  # tokens that end a response; None: there are none
    stop_at_eos: bool = True  # False: a response goes on after its end, up to max_new_tokens
    group: Count = 1  # responses to one prompt, whose rows follow each other: it is read once for all of them
    slots: Whole = 0  # rows at a time on each device, the next in the place of one that has ended; 0: all at once
    parts: Count = 4  # at most, in which the cache of new tokens grows, so that a step reads less
    shared: Whole = 0  # tokens with which all prompts begin, each of which has more: they are read once for all of them

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response, none if there are none."""
        if self.eos_id is None:
            return ()
        return tuple(self.eos_id) if isinstance(self.eos_id, tuple) else (int(self.eos_id),)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens after which nothing more is sampled."""
        return self.ends if self.stop_at_eos else ()


class ByRow(struct.PyTreeNode):
    """How a token of each row is drawn: settings of `Config` as arrays, so that one program serves rows that differ."""

    temperature: Leaf  # [B] float32, 0 is greedy
    top_k: Leaf  # [B] int32, 0: all
    top_p: Leaf  # [B] float32, 1: all

    @classmethod
    def of(cls, rows: Sequence[Config]) -> "ByRow":
        return cls(
            temperature=np.array([cfg.temperature for cfg in rows], np.float32),
            top_k=np.array([cfg.top_k for cfg in rows], np.int32),
            top_p=np.array([cfg.top_p for cfg in rows], np.float32),
        )


class Sample(struct.PyTreeNode):
    """Responses, padded on the right."""

    tokens: Leaf  # [B, N] int32, padding is the first EOS
    mask: Leaf  # [B, N] bool, the EOS counts
    logp: Leaf  # [B, N] float32 under the distribution that was sampled from, 0 at padding


def left_pad(tokens: Int[Array, "B P"], mask: Bool[Array, "B P"]) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """Tokens and mask with each row's real tokens at its right end, in the same order."""
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def truncate_logits(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Logits that are -inf for all but the `top_k` most likely tokens, and outside of the smallest set of likeliest
    tokens whose probability reaches `top_p` (arXiv:1904.09751). `top_k=0` and `top_p=1` keep all tokens."""
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
    """A number in [0, 1) for each row, which decides its token n; n may be each row's own, [B]."""
    one = lambda key, n: jax.random.uniform(jax.random.fold_in(key, n))
    return jax.vmap(one)(keys, jnp.broadcast_to(jnp.asarray(n), keys.shape))


def draw(uniform: Float[Array, "B"], logits: Float[Array, "B V"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row from `softmax(logits)`, by inverting its distribution function, and its log-probability.

    The sums of blocks of the vocabulary decide the block, and cumulative sums within it the token. A token of
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


BLOCK = 128  # tokens of the vocabulary


def _last(reached: Bool[Array, "B X"], possible: Bool[Array, "B X"]) -> Int[Array, "B"]:
    """The last place of each row that is reached and possible, or else the first that is possible."""
    place = jnp.arange(1, reached.shape[1] + 1)
    last = jnp.max(jnp.where(reached & possible, place, 0), axis=1)
    return jnp.where(last > 0, last - 1, jnp.argmax(possible, axis=1)).astype(jnp.int32)


def generate(
    model: HasConfig, params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], key: Array, cfg: Config
) -> Sample:
    """Sample a response to each prompt.

    With `cfg.group`, rows g * group to (g + 1) * group - 1 must hold the same prompt, and the first of them is read;
    with `cfg.shared`, so many tokens are read in the first row alone (on a mesh, which shards rows, in each).
    `key` is one key, into which row b folds its number, or an array of keys [B]. A row's sample depends on its own
    prompt and key alone, not on the rest of the batch. Padding may be anywhere in a prompt. Raises InputError when
    the model's context is too short.
    """
    check_length(tokens.shape[1], cfg.max_new_tokens, model.config.max_length)
    if key.ndim == 0:
        key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(tokens.shape[0]))
    return _generate(model.config, params, tokens, mask, key, cfg)


def check_length(columns: int, max_new_tokens: int, max_length: int) -> None:
    """Raises InputError when the context is too short for these prompts and responses."""
    if columns + max_new_tokens > max_length:
        raise InputError(
            f"{columns} prompt columns and {max_new_tokens} new tokens exceed the model's context of "
            f"{max_length}: shorten the prompts or lower max_new_tokens"
        )


def choose(logits: Array, uniform: Array, cfg: Config) -> tuple[Array, Array]:
    """A token of each row and its log-probability."""
    if cfg.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    return draw(uniform, truncate_logits(logits / cfg.temperature, cfg.top_k, cfg.top_p))


def choose_by_row(logits: Float[Array, "B V"], uniform: Float[Array, "B"], rows: ByRow) -> Int[Array, "B"]:
    """A token of each row, the one that `choose` gives with the row's settings; it sorts only where a row needs it."""
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    truncates = jnp.any((rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1)))
    scaled = jax.lax.cond(truncates, lambda: _truncate_by_row(scaled, rows), lambda: scaled)
    return jnp.where(rows.temperature > 0, draw(uniform, scaled)[0], jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _truncate_by_row(logits: Array, rows: ByRow) -> Array:
    """`truncate_logits` with each row's own `top_k` and `top_p`."""
    vocab = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    kth = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    prob = jax.nn.softmax(ordered, axis=-1)
    top_p = rows.top_p[:, None]
    inside = (jnp.cumsum(prob, axis=-1) - prob < top_p) | (top_p >= 1)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < jnp.maximum(kth, lowest), -jnp.inf, logits)


# The loop of `generate` ---------------------------------------------------------------------------------------------


class _Network(struct.PyTreeNode):
    """The policy that samples, its matrices already in the type that they are multiplied in."""

    config: models.Config = struct.field(pytree_node=False)
    params: Params
    layers: Any = None  # parameters of each layer, to run them unrolled; None is a scan over the stack

    def prefill(self, tokens: Array, mask: Array, cache: Cache) -> tuple[Array, Cache]:
        return bind(Transformer(self.config), Transformer.prefill)(self.params, tokens, mask, cache, self.layers)

    def extend(self, tokens: Array, mask: Array, cache: Cache) -> tuple[Array, Cache]:
        return bind(Transformer(self.config), Transformer.extend)(self.params, tokens, mask, cache, self.layers)

    def decode(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        return bind(Transformer(self.config), Transformer.decode)(self.params, token, cache, self.layers)

    def unrolled(self) -> "_Network":
        return self.replace(layers=layers_of(self.params, self.config))


class _Prompts(struct.PyTreeNode):
    """The inputs of sampling, before the prefill. Each of the A prompts has B / A responses, in consecutive rows."""

    shared: Leaf  # [1, S], with which each of them begins, to be read once; None: each is read as a whole
    tokens: Leaf  # [A, P], what follows, padded on the left
    mask: Leaf  # [A, P]
    uniform: Leaf  # [B, N], which decides each token
    cache: Cache  # empty, of S + P columns, and of A rows, or of one where something is shared

    def split(self, count: int) -> "_Prompts":
        """The same prompts, their first `count` tokens apart."""
        first = jax.lax.dynamic_slice_in_dim(self.tokens[:1], jnp.argmax(self.mask[0]), count, axis=1)
        own = self.mask & (jnp.cumsum(self.mask, axis=1) > count)
        return self.replace(shared=first, tokens=self.tokens[:, count:], mask=own[:, count:])


class _Rows(struct.PyTreeNode):
    """The rows that are being computed.

    All of them write to the same column of their arrays [B, N] and of the cache, which after the last is the first one
    again: a row whose first token is in column `start` has its token i in column (start + i) % N.
    """

    n: Leaf  # [] int32, the number of columns written so far: the next one is n % N
    index: Leaf  # [B] int32, of each row within the batch; beyond it: none
    start: Leaf  # [B] int32
    done: Leaf  # [B] bool
    token: Leaf  # [B] int32, the last one sampled
    uniform: Leaf  # [B, N]
    sample: Sample
    cache: Cache

    def take(self, rows: Array) -> "_Rows":
        """These rows alone, see `parallel.take_rows`."""
        take = lambda x: parallel.take_rows(x, rows)
        return self.replace(
            index=take(self.index),
            start=take(self.start),
            done=take(self.done),
            token=take(self.token),
            uniform=take(self.uniform),
            sample=jax.tree.map(take, self.sample),
            cache=self.cache.take(rows),
        )

    def enter(self, places: Bool[Array, "B"], others: "_Rows") -> "_Rows":
        """The rows with others, of one token each and nothing in the cache, in these places."""
        start = self.n - 1  # their first token's column

        def put(new: Array, old: Array) -> Array:
            if old.ndim == 1:
                return jnp.where(places, new, old)
            return jnp.where(places[:, None], jnp.roll(new, start % new.shape[1], axis=1), old)

        return self.replace(
            index=put(others.index, self.index),
            start=put(start, self.start),
            done=put(others.done, self.done),
            token=put(others.token, self.token),
            uniform=put(others.uniform, self.uniform),
            sample=jax.tree.map(put, others.sample, self.sample),
            cache=self.cache.restart(places, others.cache.prefix),
        )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _generate(config: models.Config, params: Params, tokens: Array, mask: Array, keys: Array, cfg: Config) -> Sample:
    """`generate` with a key for each row, by the strategy of the platform that it is compiled for."""
    group = shared_rows.rows(len(keys), cfg.group)  # a batch, or a device's part of it, may hold parts of groups
    tokens, mask = left_pad(tokens[::group], mask[::group])
    network = _converted(config, params)
    shared = 0 if parallel.has_mesh() else cfg.shared
    rows, columns = 1 if shared else tokens.shape[0], tokens.shape[1]
    cache = Cache.empty(network.config, rows, columns, columns + cfg.max_new_tokens)
    uniform = jax.vmap(noise, (None, 0), 1)(keys, jnp.arange(cfg.max_new_tokens))
    prompts = _Prompts(shared=None, tokens=tokens, mask=mask, uniform=uniform, cache=cache)
    if shared:
        prompts = prompts.split(shared)
    stacked = functools.partial(_sample_stacked, cfg=cfg)
    # As a branch it is compiled to a program that is a tenth faster on CPU than inline. The other is cheap to trace.
    if parallel.platform() == "cpu":
        unrolled = functools.partial(_sample_unrolled, cfg=cfg, loops=1 if parallel.has_mesh() else LOOPS)
        return jax.lax.platform_dependent(network, prompts, cpu=unrolled, default=stacked)
    # On GPUs one loop runs until the last row has ended: further loops would be compiled, layer by layer, for little.
    on_gpu = functools.partial(_sample_unrolled, cfg=cfg, loops=1)
    scanned = parallel.platform() == "tpu" or parallel.has_mesh()
    return jax.lax.platform_dependent(network, prompts, cpu=stacked, default=stacked if scanned else on_gpu)


def _converted(config: models.Config, params: Params) -> _Network:
    """The policy with its matrices converted, once and not in each step, to the type that they are multiplied in.

    Those in int8 stay so, to save memory, with their scales; `compute.rollout` makes all of them int8.
    """
    dtype = config.compute.dtype

    def convert(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key in ("kernel", "kernel_a", "kernel_b") and x.dtype != jnp.int8 else x

    blocks = params["blocks"]
    if config.compute.rollout == "int8":
        blocks = quantize(blocks, others=None)
    blocks = jax.tree_util.tree_map_with_path(convert, blocks)
    table = params["embedding" if config.tie_embeddings else "unembedding"].astype(dtype)
    untied = dataclasses.replace(config, tie_embeddings=False)  # embeddings are looked up as they were, unconverted
    return _Network(config=untied, params={**params, "blocks": blocks, "unembedding": table})


def _sample_unrolled(network: _Network, prompts: _Prompts, cfg: Config, loops: int) -> Sample:
    """Sample with the layers unrolled: XLA for CPU and GPU would copy slices of a stack of layers in each step.

    The rows are halved, up to `loops - 1` times, whenever half of them have ended: the others go on in a loop of their
    own, which on CPU takes half the time.
    """
    network, prompts = network.unrolled(), prompts.replace(cache=prompts.cache.unstacked())
    sizes = _loop_sizes(_width(prompts, cfg), cfg, loops)
    rows, sample = _begin(network, prompts, cfg, sizes[1] if sizes[1:] else 0)
    for size, next_size in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < len(rows.index):
            rows = rows.take(jnp.argsort(rows.done, stable=True)[:size])
        rows = _extend_until(network, rows, cfg, next_size, most=cfg.max_new_tokens - 1)
        sample = _scatter(sample, rows)
    return sample


def _sample_stacked(network: _Network, prompts: _Prompts, cfg: Config) -> Sample:
    """Sample by a scan over the layers: TPUs read a stack where it lies, and a mesh gathers one layer at a time."""
    rows, sample = _begin(network, prompts, cfg, 0)
    *filled, whole = [0, *_widths(cfg)]
    left = whole - 1 - (0 if cfg.slots else filled[-1])  # the first token is of the prefill
    return _scatter(sample, _extend_until(network, rows, cfg, 0, most=left))


LOOPS = 4  # at most, over ever fewer rows: each is compiled
MIN_ROWS = 32  # the fewest of which half are worth a loop of their own


def _loop_sizes(rows: int, cfg: Config, loops: int) -> list[int]:
    """The number of rows of each loop."""
    sizes = [rows]
    while cfg.stops and sizes[-1] >= MIN_ROWS and len(sizes) < loops:
        sizes.append(sizes[-1] // 2)
    return sizes


def _scatter(sample: Sample, rows: _Rows) -> Sample:
    """The sample of the whole batch with the samples of these rows in their places."""
    length = rows.uniform.shape[1]
    columns = (rows.start[:, None] + jnp.arange(length)[None]) % length
    put = lambda whole, x: parallel.put_rows(whole, rows.index, jnp.take_along_axis(x, columns, axis=1))
    return jax.tree.map(put, sample, rows.sample)


def _prefill(network: _Network, prompts: _Prompts, cfg: Config) -> _Rows:
    """The rows after their first token."""
    if prompts.shared is None:
        logits, cache = network.prefill(prompts.tokens, prompts.mask, prompts.cache)
    else:
        _, cache = network.prefill(prompts.shared, jnp.ones(prompts.shared.shape, bool), prompts.cache)
        logits, cache = network.extend(prompts.tokens, prompts.mask, cache.repeat(len(prompts.tokens)))
    group = len(prompts.uniform) // len(prompts.tokens)
    logits, cache = jnp.repeat(logits, group, axis=0), cache.fork(group, 0)
    token, logp = choose(logits, prompts.uniform[:, 0], cfg)
    empty = jnp.zeros(prompts.uniform.shape)
    sample = Sample(
        tokens=jnp.full(empty.shape, cfg.stops[0] if cfg.stops else 0, jnp.int32).at[:, 0].set(token),
        mask=empty.astype(bool).at[:, 0].set(True),
        logp=empty.at[:, 0].set(logp),
    )
    return _Rows(
        n=jnp.int32(1),
        index=jnp.arange(len(token)),
        start=jnp.zeros(len(token), jnp.int32),
        done=_is_stop(token, cfg) | (cfg.max_new_tokens == 1),
        token=token,
        uniform=prompts.uniform,
        sample=sample,
        cache=cache,
    )


PART = 64  # columns at least, by which the cache grows: each width of it is compiled
TURN = 8  # a row in so many has ended when others take their places: each time, all prompts in the cache are copied


def _width(prompts: _Prompts, cfg: Config) -> int:
    """The number of rows that are computed at a time."""
    rows = len(prompts.uniform)
    return min(rows, cfg.slots * parallel.row_devices()) if cfg.slots else rows


def _begin(network: _Network, prompts: _Prompts, cfg: Config, unfinished: int) -> tuple[_Rows, Sample]:
    """The rows that are left to a last loop, whose cache has all columns, and the sample of the whole batch so far.

    Without slots these are all rows. The loops before the last end as soon as at most `unfinished` rows go on.
    """
    rows, width = _prefill(network, prompts, cfg), _width(prompts, cfg)
    if width < len(rows.index):
        return _take_turns(network, rows, cfg, width)
    filled = 0
    *widths, whole = _widths(cfg)
    for width in widths:
        more = lambda now, width=width: (now.n <= width) & (jnp.sum(~now.done) > unfinished)
        rows = rows.replace(cache=rows.cache.widen(width))
        rows = _extend_while(network, rows, cfg, more, most=width - filled)
        filled = width
    return rows.replace(cache=rows.cache.widen(whole)), rows.sample


def _widths(cfg: Config) -> tuple[int, ...]:
    """The columns of new tokens that the cache has in each loop."""
    return ragged.widths(cfg.max_new_tokens, max(1, min(cfg.parts, cfg.max_new_tokens // PART)))


def _take_turns(network: _Network, rows: _Rows, cfg: Config, slots: int) -> tuple[_Rows, Sample]:
    """The rows in the slots, when the last of all rows has got one, and the sample so far.

    On a mesh each device has an equal share of the rows and of the slots, and keeps to its own.
    """
    devices, total = parallel.row_devices(), len(rows.index)
    lanes = lambda x: x.reshape(devices, -1)
    queue = jnp.argsort(lanes(rows.done), axis=1, stable=True) + jnp.arange(devices)[:, None] * (total // devices)
    waiting = jnp.sum(lanes(~rows.done), axis=1)
    some = rows.take(queue[:, : slots // devices].reshape(-1))
    empty = some.replace(
        index=jnp.full(slots, total),
        done=jnp.ones(slots, bool),
        cache=some.cache.widen(cfg.max_new_tokens),
    )

    def turn(state: tuple[_Rows, Sample, Array]) -> tuple[_Rows, Sample, Array]:
        slotted, sample, begun = state
        sample = _scatter(sample, slotted)
        place = begun[:, None] + jnp.cumsum(lanes(slotted.done), axis=1) - 1
        enters = slotted.done & (place < waiting[:, None]).reshape(-1)
        number = jnp.take_along_axis(queue, jnp.minimum(place, queue.shape[1] - 1), axis=1).reshape(-1)
        slotted = slotted.enter(enters, rows.take(number))
        begun = begun + jnp.sum(lanes(enters), axis=1)

        def more(now: _Rows) -> Array:
            free = lanes(now.done) & (begun < waiting)[:, None]
            return (jnp.sum(free) < -(-slots // TURN)) & jnp.any(~now.done)

        return _extend_while(network, slotted, cfg, more, most=cfg.max_new_tokens), sample, begun

    state = empty, rows.sample, jnp.zeros(devices, jnp.int32)
    slotted, sample, _ = jax.lax.while_loop(lambda state: jnp.any(state[2] < waiting), turn, state)
    return slotted, sample


def _extend_until(network: _Network, rows: _Rows, cfg: Config, unfinished: int, most: int) -> _Rows:
    """The rows once at most so many of them are unfinished; see `_extend_while`."""
    return _extend_while(network, rows, cfg, lambda now: jnp.sum(~now.done) > unfinished, most)


def _extend_while(network: _Network, rows: _Rows, cfg: Config, more: Callable[[_Rows], Array], most: int) -> _Rows:
    """The rows with one more token each, as long as `more` says so.

    That is never more than `most` times, which the condition says too, so that the operations can be counted.
    """
    again = lambda state: (state[0] < most) & more(state[1])
    extend = lambda state: (state[0] + 1, _extend(network, state[1], cfg))
    return jax.lax.while_loop(again, extend, (0, rows))[1]


def _extend(network: _Network, rows: _Rows, cfg: Config) -> _Rows:
    """The rows with one more token each, where they are not done."""
    column = rows.n % cfg.max_new_tokens
    logits, cache = network.decode(rows.token, rows.cache)
    token, logp = choose(logits, jax.lax.dynamic_index_in_dim(rows.uniform, column, 1, keepdims=False), cfg)
    live = ~rows.done

    def append(old: Array, values: Array) -> Array:
        return old.at[:, column].set(jnp.where(live, values, old[:, column]))

    sample = Sample(
        tokens=append(rows.sample.tokens, token),
        mask=append(rows.sample.mask, live),
        logp=append(rows.sample.logp, logp),
    )
    n = rows.n + 1
    done = rows.done | _is_stop(token, cfg) | (n - rows.start == cfg.max_new_tokens)
    return rows.replace(n=n, done=done, token=token, sample=sample, cache=cache.replace(column=column))


def _is_stop(token: Array, cfg: Config) -> Array:
    """Whether each token ends its row."""
    return jnp.isin(token, jnp.array(cfg.stops, jnp.int32)) if cfg.stops else jnp.zeros(token.shape, bool)
