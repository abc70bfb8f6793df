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


class Cache(struct.PyTreeNode):
    """Keys and values of the columns seen so far.

    The layers are stacked on a leading axis [L], for a scan over them, or `unstacked` in a tuple. Rows are filled
    together, each with its padding, or, in a `by_row` cache, every row from its own first column on, without padding.
    A cache may continue another, its `prefix`, whose rows are each continued by as many consecutive ones.
    """

    key: Leaf  # [L, B, G, S, head_dim], or L times [B, G, S, head_dim]
    value: Leaf  # as key
    mask: Leaf  # [B, S] bool, columns that hold a real token; None by row, where those are the columns before `column`
    column: Leaf  # [] int32, the next column to fill; by row [B]
    rotary_table: Any  # `rope.Rotations` of all positions; None without RoPE
    prefix: Any = None  # the `Cache` [A, ..] of the columns before these, which is only read; None: there are none

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int, positions: int | None = None) -> "Cache":
        """An empty cache of rows that may have so many `positions`: by default, as many as there are columns."""
        shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
        zeros = jnp.zeros(shape, config.compute.dtype)
        return cls(
            key=zeros,
            value=zeros,
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            rotary_table=rotary_table(positions or columns, config),
        )

    @classmethod
    def by_row(cls, config: Config, rows: int, columns: int) -> "Cache":
        """An empty cache in which every row is filled on its own; each leaf has memory of its own, to be donated."""
        shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
        return cls(
            key=jnp.zeros(shape, config.compute.dtype),
            value=jnp.zeros(shape, config.compute.dtype),
            mask=None,
            column=jnp.zeros(rows, jnp.int32),
            rotary_table=rotary_table(columns, config),
        )

    def unstacked(self) -> "Cache":
        """The same cache with an array for each layer, of exactly the shape that attention multiplies by.

        XLA for CPU copies whatever is sliced out of a stack, and whatever is both updated and reshaped.
        """
        return self.replace(key=tuple(self.key), value=tuple(self.value))

    def extend_mask(self, mask: Bool[Array, "B T"]) -> "Cache":
        """The cache whose mask has the next T columns too."""
        return self.replace(mask=jax.lax.dynamic_update_slice(self.mask, mask, (0, self.column)))

    def put(self, layer: int | Array, key: Float[Array, "B G T H"], value: Float[Array, "B G T H"]) -> "Cache":
        """The cache with the next T columns of one layer; `advance` it once every layer has them.

        By row, what a row has no column for is left out.
        """

        def write(old: Any, new: Array) -> Any:
            if self.column.ndim:
                rows, columns = jnp.arange(new.shape[0])[:, None], self.column[:, None] + jnp.arange(new.shape[2])[None]
                return old.at[layer, rows, :, columns].set(new.transpose(0, 2, 1, 3), mode="drop")
            if isinstance(old, tuple):
                written = jax.lax.dynamic_update_slice(old[layer], new, (0, 0, self.column, 0))
                return (*old[:layer], written, *old[layer + 1 :])
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, self.column, 0))

        return self.replace(key=write(self.key, key), value=write(self.value, value))

    def advance(self, columns: int) -> "Cache":
        """The cache whose next column to fill is `columns` further."""
        return self.replace(column=self.column + columns)

    def layer(self, layer: int | Array) -> tuple[Float[Array, "B G S H"], Float[Array, "B G S H"]]:
        """Keys and values of one layer, all S columns."""
        if isinstance(self.key, tuple):
            return self.key[layer], self.value[layer]
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.key, self.value))

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


def _repeat(x: Array, times: int, axis: int) -> Array:
    return x if times == 1 else jnp.repeat(x, times, axis=axis)
