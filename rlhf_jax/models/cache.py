"""The key/value cache of generation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.devices import parallel
from rlhf_jax.models.config import Config
from rlhf_jax.models.rope import rotary_table
from rlhf_jax.types import Leaf


class Int8(struct.PyTreeNode):
    """Keys or values in int8, about a quarter of float32: `values * scale`."""

    values: Leaf  # [.., S, head_dim] int8
    scale: Leaf  # [.., S, 1] float32, of each token and head: its largest magnitude / 127

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Int8":
        return cls(values=jnp.zeros(shape, jnp.int8), scale=jnp.zeros((*shape[:-1], 1), jnp.float32))

    @classmethod
    def of(cls, x: Float[Array, "... H"]) -> "Int8":
        """These keys or values, each within half a `scale`."""
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return cls(values=jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale=scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


KeyValue = Array | Int8  # keys or values


class Cache(struct.PyTreeNode):
    """Keys and values of the columns seen so far.

    They are of the dtype that the network computes in, or `Int8` where `compute.cache` says so.

    The layers are stacked on a leading axis [L], for a scan over them, or `unstacked` in a tuple. Rows are filled
    together, each with its padding, or, in a `by_row` cache, every row from its own first column on, without padding.
    A cache may continue another, its `prefix`, whose rows are each continued by as many consecutive ones.
    """

    key: Any  # [L, B, G, S, head_dim], or L times [B, G, S, head_dim], arrays or `Int8`
    value: Any  # as key
    mask: Leaf  # [B, S] bool, columns that hold a real token; None by row, where those are the columns before `column`
    column: Leaf  # [] int32, the next column to fill; by row [B]
    rotary_table: Any  # `rope.Rotations` of all positions; None without RoPE
    prefix: Any = None  # the `Cache` [A, ..] of the columns before these, which is only read; None: there are none

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int, positions: int | None = None) -> "Cache":
        """An empty cache of rows that may have so many `positions`: by default, as many as there are columns."""
        return cls(
            key=_zeros(config, rows, columns),
            value=_zeros(config, rows, columns),
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            rotary_table=rotary_table(positions or columns, config),
        )

    @classmethod
    def by_row(cls, config: Config, rows: int, columns: int) -> "Cache":
        """An empty cache in which every row is filled on its own; each leaf has memory of its own, to be donated."""
        return cls(
            key=_zeros(config, rows, columns),
            value=_zeros(config, rows, columns),
            mask=None,
            column=jnp.zeros(rows, jnp.int32),
            rotary_table=rotary_table(columns, config),
        )

    def unstacked(self) -> "Cache":
        """The same cache with an array for each layer, of exactly the shape that attention multiplies by.

        XLA for CPU copies whatever is sliced out of a stack, and whatever is both updated and reshaped.
        """

        def layers(x: KeyValue) -> tuple:
            return tuple(map(Int8, x.values, x.scale)) if isinstance(x, Int8) else tuple(x)

        return self.replace(key=layers(self.key), value=layers(self.value))

    def extend_mask(self, mask: Bool[Array, "B T"]) -> "Cache":
        """The cache whose mask has the next T columns too."""
        return self.replace(mask=jax.lax.dynamic_update_slice(self.mask, mask, (0, self.column)))

    def put(self, layer: int | Array, key: Float[Array, "B G T H"], value: Float[Array, "B G T H"]) -> "Cache":
        """The cache with the next T columns of one layer; `advance` it once every layer has them.

        By row, what a row has no column for is left out.
        """

        def write(old: Array, new: Array) -> Array:
            if self.column.ndim:
                rows, columns = jnp.arange(new.shape[0])[:, None], self.column[:, None] + jnp.arange(new.shape[2])[None]
                return old.at[layer, rows, :, columns].set(new.transpose(0, 2, 1, 3), mode="drop")
            if old.ndim == 4:
                return jax.lax.dynamic_update_slice(old, new, (0, 0, self.column, 0))
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, self.column, 0))

        def extend(old: Any, new: Array) -> Any:
            stored = Int8.of(new) if self._is_int8 else new
            if isinstance(old, tuple):
                return (*old[:layer], jax.tree.map(write, old[layer], stored), *old[layer + 1 :])
            return jax.tree.map(write, old, stored)

        return self.replace(key=extend(self.key, key), value=extend(self.value, value))

    def advance(self, columns: int) -> "Cache":
        """The cache whose next column to fill is `columns` further."""
        return self.replace(column=self.column + columns)

    def layer(self, layer: int | Array) -> tuple[Any, Any]:
        """Keys and values [B, G, S, head_dim] of one layer, all S columns, arrays or `Int8`."""
        if isinstance(self.key, tuple):
            return self.key[layer], self.value[layer]
        one = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return jax.tree.map(one, self.key), jax.tree.map(one, self.value)

    def positions(self) -> tuple[Int[Array, "B"], Int[Array, "B S"]]:
        """The position of the token in the column to fill, which the mask has already, and those of all columns.

        Arbitrary where nothing was seen.
        """
        rank = jnp.cumsum(self.seen, axis=1, dtype=jnp.int32) - 1
        last = rank[:, -1]
        if self.prefix is None:
            return last, rank
        before, own = self.prefix.mask.shape[1], self.mask.shape[1]
        age = (self.column - jnp.arange(own)) % own  # a row may have begun anywhere, and gone on at the first column
        return last, jnp.concatenate([rank[:, :before], last[:, None] - age[None]], axis=1)

    @property
    def seen(self) -> Bool[Array, "B S"]:
        """The mask of the prefix and of these columns."""
        if self.prefix is None:
            return self.mask
        times = self.mask.shape[0] // self.prefix.mask.shape[0]
        return jnp.concatenate([_repeat(self.prefix.mask, times, 0), self.mask], axis=1)

    def fork(self, times: int, columns: int) -> "Cache":
        """A cache of so many empty columns that continues each row of this one so many times."""
        rows = times * self.mask.shape[0]
        empty = lambda x: jnp.zeros((*x.shape[: x.ndim - 4], rows, x.shape[-3], columns, x.shape[-1]), x.dtype)
        key, value = jax.tree.map(empty, (self.key, self.value))
        return Cache(
            key=key,
            value=value,
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            rotary_table=self.rotary_table,
            prefix=self.replace(rotary_table=None),
        )

    def restart(self, rows: Bool[Array, "B"], prefix: "Cache") -> "Cache":
        """The cache in which these rows begin again, behind what is theirs in another prefix of B rows."""

        def put(new: Array, old: Array, axis: int) -> Array:
            return jnp.where(jnp.expand_dims(rows, [n for n in range(old.ndim) if n != axis]), new, old)

        old, put_rows = self.prefix, lambda new, old: put(new, old, self._rows_axis)
        key, value = jax.tree.map(put_rows, (prefix.key, prefix.value), (old.key, old.value))
        prefix = old.replace(key=key, value=value, mask=put(prefix.mask, old.mask, 0))
        return self.replace(mask=self.mask & ~rows[:, None], prefix=prefix)

    def widen(self, columns: int) -> "Cache":
        """The cache with room for so many columns, without those of its prefix."""
        more = columns - self.mask.shape[1]
        pad = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, more), (0, 0)))
        key, value = jax.tree.map(pad, (self.key, self.value))
        return self.replace(key=key, value=value, mask=jnp.pad(self.mask, ((0, 0), (0, more))))

    def take(self, rows: Int[Array, "B"]) -> "Cache":
        """The cache of these rows alone, see `parallel.take_rows`, each with a prefix of its own."""
        take = lambda x: parallel.take_rows(x, rows, self._rows_axis)
        key, value = jax.tree.map(take, (self.key, self.value))
        prefix = self.prefix
        if prefix is not None:
            prefix = prefix.take(rows // (self.mask.shape[0] // prefix.mask.shape[0]))
        return self.replace(key=key, value=value, mask=parallel.take_rows(self.mask, rows), prefix=prefix)

    def repeat(self, times: int) -> "Cache":
        """The cache with each row so many times, in consecutive rows."""
        key, value = jax.tree.map(lambda x: _repeat(x, times, self._rows_axis), (self.key, self.value))
        return self.replace(key=key, value=value, mask=_repeat(self.mask, times, 0))

    @property
    def _rows_axis(self) -> int:
        return 0 if isinstance(self.key, tuple) else 1

    @property
    def _is_int8(self) -> bool:
        return isinstance(self.key[0] if isinstance(self.key, tuple) else self.key, Int8)


def _zeros(config: Config, rows: int, columns: int) -> KeyValue:
    """Keys or values of a cache with nothing in it."""
    shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
    return Int8.zeros(shape) if config.compute.cache == "int8" else jnp.zeros(shape, config.compute.dtype)


def _repeat(x: Array, times: int, axis: int) -> Array:
    return x if times == 1 else jnp.repeat(x, times, axis=axis)
