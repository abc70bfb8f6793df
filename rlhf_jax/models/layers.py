"""The layers of a block, and the view of the rows that all of them share: who attends to whom, and from which position.

A view is made once a forward pass: by `whole_view` where all columns are computed at once (training, scoring, reading a
prompt), by `token_view` where one column is appended to a cache, by `continued_view` where several are, and by
`appended_view` in a cache that is filled by row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.devices import parallel
from rlhf_jax.models import rope
from rlhf_jax.models.config import Config
from rlhf_jax.types import Fork, Leaf, Tree

# Columns of a row: a slice, the same for every row, or indices, each row's own.
Columns = slice | Int[Array, "B N"]
ALL = slice(None)


def take_columns(x: Shaped[Array, "B T ..."], columns: Columns) -> Shaped[Array, "B N ..."]:
    """These columns of each row."""
    return x[:, columns] if isinstance(columns, slice) else jax.vmap(lambda row, n: row[n])(x, columns)


class View(struct.PyTreeNode):
    """The masks and positions that every layer needs, of T columns that are computed and S that they may attend to."""

    position: Leaf  # [B, T] int32, within the document; arbitrary at padding
    rotation: Any  # `rope.Rotations` of these positions; None without RoPE
    mask: Leaf  # [B, T, S] bool, the columns that a token attends to
    window_mask: Leaf  # [B, T, S] bool, those of them within the window; None without one
    segment: Any  # [B, T], see `types`, or a `Tree`
    keys: Leaf  # [B] dropout keys, or None to evaluate
    balance: Leaf = None  # [2], see `experts.Mixture`; None to evaluate, and without experts


def whole_view(
    config: Config,
    segment: Int[Array, "B T"] | Bool[Array, "B T"] | Tree,
    table: rope.Rotations | None,
    keys: Array | None = None,
) -> View:
    """The view of T columns that attend to each other alone."""
    if isinstance(segment, Tree):
        position, mask = tree_positions(segment), ancestor_mask(segment)
    else:
        position, mask = positions(segment), causal_mask(segment)
    return View(
        position=position,
        rotation=rope.look_up(table, position),
        mask=mask,
        window_mask=within_window(config, mask, position, position),
        segment=segment,
        keys=keys,
    )


def token_view(
    config: Config,
    mask: Bool[Array, "B S"],
    position: Int[Array, "B"],
    key_position: Int[Array, "B S"],
    table: rope.Rotations | None,
) -> View:
    """The view of one token of each row, which attends to all the real columns of a cache with this mask."""
    position, attended = position[:, None], mask[:, None, :]
    return View(
        position=position,
        rotation=rope.look_up(table, position),
        mask=attended,
        window_mask=within_window(config, attended, position, key_position),
        segment=jnp.ones_like(position, bool),
        keys=None,
    )


def continued_view(
    config: Config, mask: Bool[Array, "B S"], column: Int[Array, ""], columns: int, table: rope.Rotations | None
) -> View:
    """The view of so many columns from `column` on, which attend to all the real ones up to themselves of a cache with
    this mask; each row has a real one before them."""
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    position = jax.lax.dynamic_slice_in_dim(rank, column, columns, axis=1)
    attended = mask[:, None, :] & (jnp.arange(mask.shape[1])[None] <= column + jnp.arange(columns)[:, None])[None]
    return View(
        position=position,
        rotation=rope.look_up(table, position),
        mask=attended,
        window_mask=within_window(config, attended, position, rank),
        segment=jnp.ones_like(position, bool),
        keys=None,
    )


def appended_view(
    config: Config, column: Int[Array, "B"], columns: int, size: int, table: rope.Rotations | None
) -> View:
    """The view of so many columns of each row from its `column` on, in a cache `by_row` of this size.

    A row's columns are its tokens, so a column is a position; one beyond the cache, which nothing reads, gets the last.
    """
    position = jnp.minimum(column[:, None] + jnp.arange(columns)[None], size - 1)
    key_position = jnp.broadcast_to(jnp.arange(size)[None], (len(column), size))
    mask = key_position[:, None, :] <= position[:, :, None]
    return View(
        position=position,
        rotation=rope.look_up(table, position),
        mask=mask,
        window_mask=within_window(config, mask, position, key_position),
        segment=jnp.ones_like(position, bool),
        keys=None,
    )


def real_tokens(segment: Int[Array, "B T"] | Bool[Array, "B T"] | Tree) -> Bool[Array, "B T"]:
    """A mask of the tokens that are no padding."""
    return (segment.reach if isinstance(segment, Tree) else segment) > 0


def positions(segment: Int[Array, "B T"] | Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """How many real tokens of its own document precede each token. Arbitrary at padding."""
    segment = segment.astype(jnp.int32)
    real = (segment > 0).astype(jnp.int32)
    count = jnp.cumsum(real, axis=1) - real
    latest = jax.lax.cummax(segment, axis=1)
    starts = segment > jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)


def causal_mask(segment: Int[Array, "B T"] | Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """The mask of attention: each token sees itself and the earlier real tokens of its own document."""
    columns = jnp.arange(segment.shape[1])
    same = (segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] > 0)
    return same & (columns[:, None] >= columns[None, :])[None]


def ancestor_mask(tree: Tree) -> Bool[Array, "B T T"]:
    """The mask of attention in a tree: each token sees itself and its ancestors."""
    columns = jnp.arange(tree.reach.shape[1])
    behind = (columns[:, None] - columns[None, :])[None]
    return (behind >= 0) & (behind < tree.reach[:, None, :])


def tree_positions(tree: Tree) -> Int[Array, "B T"]:
    """The number of ancestors of each token. Arbitrary at padding."""
    if tree.fork is None:
        return jnp.maximum(jnp.sum(ancestor_mask(tree), axis=2, dtype=jnp.int32) - 1, 0)
    real = (tree.reach > 0).astype(jnp.int32)
    prefix, branches = real[:, : tree.fork.prefix], split_branches(real, tree.fork)
    before = jnp.cumsum(branches, axis=2) - branches + jnp.sum(prefix, axis=1)[:, None, None]
    return jnp.concatenate([jnp.cumsum(prefix, axis=1) - prefix, before.reshape(len(real), -1)], axis=1)


def depth(columns: int, segment: Array | Tree) -> int:
    """The number of positions that a row of so many columns may have."""
    fork = segment.fork if isinstance(segment, Tree) else None
    return columns if fork is None else fork.prefix + (columns - fork.prefix) // fork.branches


def split_branches(x: Shaped[Array, "B T ..."], fork: Fork) -> Shaped[Array, "B K M ..."]:
    """The columns of each of K branches of M columns."""
    return x[:, fork.prefix :].reshape(x.shape[0], fork.branches, -1, *x.shape[2:])


def within_window(
    config: Config, mask: Bool[Array, "B T S"], position: Int[Array, "B T"], key_position: Int[Array, "B S"]
) -> Bool[Array, "B T S"] | None:
    """The part of the mask that lies within the model's window of positions; None where the model has none."""
    if config.window is None:
        return None
    return mask & (position[:, :, None] - key_position[:, None, :] < config.window)


def dropout(x: Float[Array, "B T D"], keys: Array | None, site: int | Array, rate: float) -> Float[Array, "B T D"]:
    """Inverted dropout whose mask depends on the row's key and the site alone, never on batch size or devices."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`: about x where it is small, and never beyond the cap; x itself where the cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


# Recompute cheap elementwise operations in the backward pass: storing their intermediates, several of each and all as
# large as their input, costs more memory traffic than computing them again.
recompute = functools.partial(jax.checkpoint, prevent_cse=False)


class Norm(nn.Module):
    """LayerNorm or RMSNorm of [B, T, ..., D] over the last axis, or the last `axes` together, in float32."""

    config: Config
    axes: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, over = self.config, tuple(range(-self.axes, 0))
        shape = x.shape[-self.axes :]
        features = (1,) * (x.ndim - self.axes) + shape
        scale = self.param("scale", nn.initializers.zeros if c.unit_offset else nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape) if c.norm == "layernorm" else None

        def normalize(x: Array, scale: Array, bias: Array | None) -> Array:
            x = x.astype(jnp.float32)
            if bias is not None:
                x = x - jnp.mean(x, axis=over, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True) + c.norm_eps)
            scale = scale.astype(jnp.float32)  # 1 + w in bfloat16 would lose most of w
            x = x * (scale + 1.0 if c.unit_offset else scale).reshape(features)
            if bias is not None:
                x = x + bias.reshape(features)
            return x.astype(c.compute.dtype)

        return recompute(normalize)(x, scale, bias)


class Linear(nn.Module):
    """`x @ kernel + bias`, from the last axes of x [B, T, *inputs] to [B, T, *outputs].

    Where its parameters have LoRA's factors beside the kernel, `x @ kernel_a @ kernel_b` is added. An int8 kernel has a
    scale beside it, which multiplies its outputs.
    """

    config: Config
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*self.inputs, *self.outputs))
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        shape = *x.shape[:2], *self.outputs

        def matmul(x: Array, kernel: Array) -> Array:
            kernel = kernel.astype(x.dtype)
            if parallel.has_mesh():  # flat outputs [2 F] could not be sharded over F
                return jnp.tensordot(x, kernel, len(self.inputs))
            # One plain matrix product: XLA for CPU takes three times as long over the gradient of anything else.
            return (x.reshape(-1, fan_in) @ kernel.reshape(fan_in, fan_out)).reshape(shape)

        adapted, quantized = (self.has_variable("params", name) for name in ("kernel_a", "kernel_scale"))
        # The backward pass keeps a frozen kernel itself, not a cast and reshaped copy of it for each layer.
        y = (recompute(matmul) if adapted or quantized else matmul)(x, kernel)
        if quantized:
            y = (y * self.variables["params"]["kernel_scale"][None, None]).astype(x.dtype)
        if adapted:
            a, b = (self.variables["params"][f"kernel_{factor}"].astype(x.dtype) for factor in "ab")
            y = y + (x.reshape(-1, fan_in) @ a @ b).reshape(shape)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs).astype(x.dtype)[None, None]
        return y


# jax's GELU is the tanh form, by default.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}


def activation(config: Config) -> Callable[[Array], Array]:
    """The nonlinearity of an MLP, from what its first projection yields: [..., F], or with a gate [..., 2, F]."""
    nonlinearity = ACTIVATIONS[config.mlp]
    return (lambda x: nonlinearity(x[..., 0, :]) * x[..., 1, :]) if config.gated else nonlinearity


class MLP(nn.Module):
    """A nonlinearity between two projections or, where it is gated, times one of two, which lie in one matrix."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        biased = c.bias in ("all", "mlp")
        hidden = Linear(c, (c.d_model,), (2, c.d_ff) if c.gated else (c.d_ff,), 0.02, biased, name="up")(x)
        hidden = recompute(activation(c))(hidden)
        return Linear(c, (c.d_ff,), (c.d_model,), 0.02 / (2 * c.n_layers) ** 0.5, biased, name="down")(hidden)
