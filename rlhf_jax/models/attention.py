"""Grouped-query attention, by plain matrix products or by a kernel whose scores [B, H, T, T] exist a block at a time.

The kernels are JAX's splash attention for TPUs, and cuDNN's. They serve where queries and keys are of the same columns:
training, scoring, and reading a prompt. Their results at padding, which nothing reads, differ from those of `attend`.
Splash attention takes a mask that is the same for all rows: of a `types.Tree`, one with a `fork`. A TPU computes other
trees by `attend`, whose scores [B, H, T, T] exist. cuDNN takes the mask of any tree, as one more input [B, T, T].
Without a kernel, the trees of a fork are computed by `attend_fork`.
On a mesh every device computes its own rows and heads.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.devices import parallel
from rlhf_jax.models.cache import Cache, Int8, KeyValue
from rlhf_jax.models.config import Config
from rlhf_jax.models.layers import ALL, Columns, Linear, Norm, View, soft_cap, split_branches, take_columns
from rlhf_jax.models.rope import layer_rotation, listed, rotate
from rlhf_jax.types import Fork, InputError, Tree

LANES = 128  # every block of columns is a multiple of this
BLOCK = 512  # columns of the largest block


def worthwhile(columns: int) -> bool:
    """Whether the platform that is traced for has a kernel, and this many columns are worth a block of it."""
    return parallel.platform() in ("tpu", "gpu") and columns > LANES


def compute_capability() -> float:
    """The compute capability of this machine's first device; 0 unless that is a GPU by NVIDIA."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0


def _per_device(attention: Callable[..., Array]) -> Callable[..., Array]:
    """`attention(query, key, value, rows)`, computed on a mesh by each device for its own rows and heads."""
    if not parallel.has_mesh():
        return attention
    rows, groups = PartitionSpec(parallel.ROWS), PartitionSpec(parallel.ROWS, "tensor")
    heads = PartitionSpec(parallel.ROWS, None, "tensor")
    return jax.shard_map(attention, in_specs=(heads, groups, groups, rows), out_specs=heads, check_vma=False)


def _pad(x: Array, columns: int, *axes: int) -> Array:
    """`x` with zeros behind it along these axes, up to this many columns."""
    return jnp.pad(x, [(0, columns - size if axis in axes else 0) for axis, size in enumerate(x.shape)])


def cudnn(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    mask: Bool[Array, "B T T"],
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T G R H"]:
    """Causal attention over the keys that the mask allows, by cuDNN, on a GPU of compute capability 8.0 or more.

    Takes bfloat16, and heads of at most 128 features, a multiple of 8. Scores are `scale` times the products of queries
    and keys. The implementation `xla` computes the same on any device, and stores the scores.
    """
    return _per_device(functools.partial(_cudnn, scale=scale, implementation=implementation))(query, key, value, mask)


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Array:
    rows, columns, groups, shared, size = query.shape
    # With a mask, some versions of cuDNN yield NaN gradients at other lengths (pytorch/pytorch#196678).
    padded = LANES * -(-columns // LANES)
    # Every token attends to itself, padding too: the softmax of no scores at all is NaN.
    mask = _pad(mask, padded, 1, 2) | jnp.eye(padded, dtype=bool)[None]
    query = _pad(query, padded, 1).reshape(rows, padded, groups * shared, size)
    key, value = (_pad(x, padded, 2).transpose(0, 2, 1, 3) for x in (key, value))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )
    return mixed[:, :columns].reshape(rows, columns, groups, shared, size)


def splash(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    segment: Int[Array, "B T"] | Bool[Array, "B T"],
    scale: float,
    cap: float | None = None,
    fork: Fork | None = None,
    interpret: bool = False,
) -> Float[Array, "B T G R H"]:
    """Causal attention within documents, by splash attention (after arXiv:2205.14135).

    Scores s are `scale` times the products of queries and keys, and become `cap tanh(s / cap)`. The branches of a
    `fork` do not see each other. `interpret` runs the kernel on any device, slowly.
    """
    attention = functools.partial(_splash, scale=scale, cap=cap, fork=fork, interpret=interpret)
    return _per_device(attention)(query, key, value, segment)


def fork_mask(fork: Fork, columns: int, padded: int) -> np.ndarray:
    """Which of so many padded columns each one attends to in a row without padding. [S, S] bool.

    Splash attention keeps of it the blocks that are neither empty nor full, each once.
    """
    column, width = np.arange(padded), (columns - fork.prefix) // fork.branches
    branch = np.where(column < fork.prefix, -1, (column - fork.prefix) // width)
    seen = (branch[None] < 0) | (branch[None] == branch[:, None])
    return seen & (column[None] <= column[:, None])


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segment: Array,
    *,
    scale: float,
    cap: float | None,
    fork: Fork | None,
    interpret: bool,
) -> Array:
    columns, shared = query.shape[1], query.shape[3]
    unit = LANES if columns <= BLOCK else 2 * LANES
    padded = unit * -(-columns // unit)
    block = math.gcd(padded, BLOCK) if padded > BLOCK else padded
    query, segment = _pad(query * scale, padded, 1), _pad(segment.astype(jnp.int32), padded, 1)
    key, value = _pad(key, padded, 2), _pad(value, padded, 2)
    mask = masks.CausalMask((padded, padded)) if fork is None else masks.NumpyMask(fork_mask(fork, columns, padded))
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * shared),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dq=block,
            block_kv_dq=block,
            block_q_dkv=block,
            block_kv_dkv=block,
        ),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    one_group = lambda query, key, value, segment: kernel(query, key, value, kernels.SegmentIds(segment, segment))
    all_groups = jax.vmap(one_group, (0, 0, 0, None))
    mixed = jax.vmap(all_groups)(query.transpose(0, 2, 3, 1, 4), key, value, segment)
    return mixed.transpose(0, 3, 1, 2, 4)[:, :columns]


def _score(query: Float[Array, "B G Q H"], key: KeyValue) -> Float[Array, "B G Q S"]:
    """Products of queries and keys in float32, of keys in `Int8` with what they stand for."""
    score = functools.partial(jnp.einsum, "bgqh,bgsh->bgqs", preferred_element_type=jnp.float32)
    if isinstance(key, Int8):  # the scale of a key multiplies its scores: no array of all keys in floats is made
        return score(query, key.values.astype(query.dtype)) * key.scale.swapaxes(2, 3)
    return score(query, key)


def _mix(
    weights: Float[Array, "B G Q S"], value: KeyValue, dtype: DTypeLike, out: DTypeLike
) -> Float[Array, "B G Q H"]:
    """Sums of values with these weights, multiplied in `dtype`."""
    if isinstance(value, Int8):
        return _mix(weights * value.scale.swapaxes(2, 3), value.values.astype(dtype), dtype, out)
    return jnp.matmul(weights.astype(dtype), value, preferred_element_type=out)


def attend(
    query: Float[Array, "B T G R H"],
    key: KeyValue,
    value: KeyValue,
    mask: Array,
    config: Config,
) -> Float[Array, "B T G R H"]:
    """Each query's mean of the values under `softmax(query . key / sqrt(H))`, over the keys that mask [B, T, S] allows.

    Keys and values are [B, G, S, H]. `config` may replace H by its `query_size`, and cap the scores. Softmax in
    float32. Heads are moved in front of the columns, so that both products are plain batched matrix products; rows and
    groups stay separate axes, since a mesh may shard them differently.
    """
    rows, columns, groups, shared, size = query.shape
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, groups, shared * columns, size)
    scores = _score(query, key).reshape(rows, groups, shared, columns, -1)
    weights = _softmax(scores, mask[:, None, None], size, config)
    mixed = _mix(weights.reshape(rows, groups, shared * columns, -1), value, query.dtype, query.dtype)
    return mixed.reshape(rows, groups, shared, columns, size).transpose(0, 3, 1, 2, 4)


def attend_behind(
    query: Float[Array, "B T G R H"],
    prefix: tuple[KeyValue, KeyValue],
    own: tuple[KeyValue, KeyValue],
    mask: Bool[Array, "B T X"],
    config: Config,
) -> Float[Array, "B T G R H"]:
    """`attend` to keys and values of a prefix [A, G, P, H] and, behind them, of the row's own columns [B, G, S, H].

    Each of the A prefixes is that of B / A consecutive rows, which read it in one matrix product.
    """
    rows, columns, groups, shared, size = query.shape
    prefixes, columns_before = prefix[0].shape[0], prefix[0].shape[2]

    def together(x: Array) -> Array:  # [B, G, Q, X] as [A, G, B / A * Q, X]
        return x.reshape(prefixes, -1, *x.shape[1:]).swapaxes(1, 2).reshape(prefixes, groups, -1, x.shape[-1])

    def apart(x: Array) -> Array:
        x = x.reshape(prefixes, groups, rows // prefixes, -1, x.shape[-1])
        return x.swapaxes(1, 2).reshape(rows, groups, -1, x.shape[-1])

    mix = functools.partial(_mix, dtype=query.dtype, out=jnp.float32)
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, groups, shared * columns, size)
    scores = jnp.concatenate([apart(_score(together(query), prefix[0])), _score(query, own[0])], axis=3)
    scores = scores.reshape(rows, groups, shared, columns, -1)
    weights = _softmax(scores, mask[:, None, None], size, config)
    weights = weights.reshape(rows, groups, shared * columns, -1)
    before, behind = jnp.split(weights, [columns_before], axis=3)
    mixed = (apart(mix(together(before), prefix[1])) + mix(behind, own[1])).astype(query.dtype)
    return mixed.reshape(rows, groups, shared, columns, size).transpose(0, 3, 1, 2, 4)


@jax.custom_jvp
def softmax(scores: Float[Array, "*A S"]) -> Float[Array, "*A S"]:
    """The softmax over the last axis. Its derivative needs the result alone, while that of JAX's keeps more of it."""
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The weights w, and their change w (ds - sum(w ds)) with the scores' ds."""
    weights, change = softmax(*primals), tangents[0]
    return weights, weights * (change - jnp.sum(weights * change, axis=-1, keepdims=True))


def _softmax(scores: Array, mask: Array, size: int, config: Config) -> Array:
    """The weights of products of queries and keys with `size` features, where the mask allows them."""
    scores = soft_cap(scores * (config.query_size or size) ** -0.5, config.attention_cap)
    return softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))


def attend_fork(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    mask: Bool[Array, "B S S"],
    fork: Fork,
    config: Config,
) -> Float[Array, "B T G R H"]:
    """`attend` in forked trees: a branch has scores with the prefix and with itself, none with other branches.

    The queries are those of all columns, or of the branches alone.
    """
    prefix, branches = fork
    rows, _, groups, shared, size = query.shape
    width = (key.shape[2] - prefix) // branches
    in_prefix, query = jnp.split(query, [query.shape[1] - branches * width], axis=1)
    query = query.reshape(rows, branches, width, groups, shared, size).transpose(0, 3, 1, 4, 2, 5)  # [B G K R M H]
    own_key, own_value = (x[:, :, prefix:].reshape(rows, groups, branches, width, size) for x in (key, value))
    product = functools.partial(jnp.einsum, "...qh,...sh->...qs", preferred_element_type=jnp.float32)
    past = product(query.reshape(rows, groups, -1, size), key[:, :, :prefix])
    own = product(query.reshape(rows, groups, branches, -1, size), own_key)
    past, own = (x.reshape(*query.shape[:5], -1) for x in (past, own))
    block = [slice(first, first + width) for first in range(prefix, key.shape[2], width)]
    seen = jnp.concatenate(
        [split_branches(mask, fork)[..., :prefix], jnp.stack([mask[:, at, at] for at in block], axis=1)], axis=3
    )
    scores = jnp.concatenate([past, own], axis=-1)
    weights = _softmax(scores, seen[:, None, :, None], size, config).astype(value.dtype)
    past, own = jnp.split(weights, [prefix], axis=-1)
    of_prefix = past.reshape(rows, groups, -1, prefix) @ value[:, :, :prefix]
    of_branch = own.reshape(rows, groups, branches, -1, width) @ own_value
    mixed = of_prefix.reshape(query.shape) + of_branch.reshape(query.shape)
    mixed = mixed.transpose(0, 2, 4, 1, 3, 5).reshape(rows, branches * width, groups, shared, size)
    if not in_prefix.shape[1]:
        return mixed
    before = attend(in_prefix, key[:, :, :prefix], value[:, :, :prefix], mask[:, :prefix, :prefix], config)
    return jnp.concatenate([before, mixed], axis=1)


def kernel(config: Config, queries: int, keys: int, tree: bool = False) -> Literal["splash", "cudnn"] | None:
    """The kernel for this many columns of queries and keys on the platform that is traced for; None is `attend`.

    Splash attention has none for the rows of a `tree` without a fork. Raises InputError where `attention=flash` asks
    for a kernel that cannot compute this model.
    """
    c, setting = config, config.compute.attention
    if queries != keys or setting == "plain" or (setting == "auto" and not worthwhile(queries)):
        return None
    name: Literal["splash", "cudnn"] = "cudnn" if parallel.platform() == "gpu" else "splash"
    if tree and name == "splash":
        return None
    if name == "cudnn":
        capability = compute_capability()
        serves = (
            c.compute.dtype == "bfloat16"
            and c.head_dim in range(8, 129, 8)
            and c.attention_cap is None
            and capability >= 8.0
        )
        why = (
            "takes bfloat16, at most 128 features a head by eights, no cap, and compute capability 8.0 or more: here"
            f" are {c.compute.dtype}, {c.head_dim}, {c.attention_cap} and {capability}"
        )
    else:
        serves, why = c.window is None, "has no window, which this model has"
    if not serves and setting == "flash":
        raise InputError(f"attention=flash {why}; use auto or plain")
    return name if serves else None


def fork_of(view: View) -> Fork | None:
    """The shape of the rows, if they are trees that all have it."""
    return view.segment.fork if isinstance(view.segment, Tree) else None


class Attention(nn.Module):
    """Grouped-query causal attention; softmax in float32.

    Yields what these `columns` of x attend to, and the cache, if there is one, with the keys and values of all of x.
    """

    config: Config

    @nn.compact
    def __call__(
        self, x: Array, layer: int | Array, view: View, cache: Cache | None, columns: Columns
    ) -> tuple[Array, Cache | None]:
        c = self.config
        groups, shared = c.n_kv_heads, c.n_heads // c.n_kv_heads
        biased = c.bias in ("all", "attention", "qkv")
        qkv = Linear(c, (c.d_model,), (groups, shared + 2, c.head_dim), 0.02, biased, name="qkv")(x)
        query, key, value = jax.lax.split(qkv, (shared, 1, 1), axis=3)
        query = take_columns(query, columns)
        if c.qk_norm != "none":
            axes = {"head": 1, "whole": 3}[c.qk_norm]
            query, key = Norm(c, axes, name="query_norm")(query), Norm(c, axes, name="key_norm")(key)
        if c.position == "rope":
            rotation = layer_rotation(c, view.rotation, layer)
            query = rotate(query, jax.tree.map(lambda part: take_columns(part, columns), rotation))
            key = rotate(key, rotation)
        if c.inverse_layer_scale:
            query = (query / (layer + 1)).astype(query.dtype)
        key, value = (x[..., 0, :].transpose(0, 2, 1, 3) for x in (key, value))
        if cache is not None:
            cache = cache.put(layer, key, value)
            if view.mask.shape[2] != key.shape[2]:  # a token attends to the whole cache, a prompt to itself alone
                key, value = cache.layer(layer)
        mask = view.mask
        if c.window is not None:
            full = listed(layer, c.full_layers)
            mask = jnp.where(full, view.mask, view.window_mask) if c.full_layers else view.window_mask
        scale = (c.query_size or c.head_dim) ** -0.5
        prefix = None if cache is None else cache.prefix
        fork, tree = fork_of(view), isinstance(view.segment, Tree)
        match None if prefix else kernel(c, query.shape[1], key.shape[2], tree and fork is None):
            case "splash":
                segment = view.segment.reach > 0 if tree else view.segment
                mixed = splash(query, key, value, segment, scale, c.attention_cap, fork)
            case "cudnn":
                mixed = cudnn(query, key, value, mask, scale)
            case None if fork and isinstance(columns, slice) and columns in (ALL, slice(fork.prefix, None)):
                mixed = attend_fork(query, key, value, mask, fork, c)
            case None if prefix:
                mixed = attend_behind(query, prefix.layer(layer), (key, value), take_columns(mask, columns), c)
            case None:
                mixed = attend(query, key, value, take_columns(mask, columns), c)
        std = 0.02 / (2 * c.n_layers) ** 0.5
        out = Linear(c, (groups, shared, c.head_dim), (c.d_model,), std, c.bias in ("all", "attention"), name="out")
        return out(mixed), cache
