"""The key/value cache of generation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import Config
from rlhf_jax.models.rope import rotary_table
from rlhf_jax.types import Leaf


class Cache(struct.PyTreeNode):
    """Keys and values of the columns seen so far.

    The layers are stacked on a leading axis [L], for a scan over them, or `unstacked` in a tuple. Rows are filled
    together, each with its padding, or, in a `by_row` cache, every row from its own first column on, without padding.
    """

    key: Leaf  # [L, B, G, S, head_dim], or L times [B, G, S, head_dim]
    value: Leaf  # as key
    mask: Leaf  # [B, S] bool, columns that hold a real token; None by row, where those are the columns before `column`
    column: Leaf  # [] int32, the next column to fill; by row [B]
    rotary_table: Any  # `rope.Rotations` of S positions; None without RoPE

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int) -> "Cache":
        shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
        zeros = jnp.zeros(shape, config.compute.dtype)
        return cls(
            key=zeros,
            value=zeros,
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            rotary_table=rotary_table(columns, config),
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

    def take(self, rows: Int[Array, "B"]) -> "Cache":
        """An `unstacked` cache of these rows alone."""
        key, value = jax.tree.map(lambda x: x[rows], (self.key, self.value))
        return self.replace(key=key, value=value, mask=self.mask[rows])

    def repeat(self, times: int) -> "Cache":
        """The cache with each row so many times, in consecutive rows."""
        again = lambda x, axis: x if times == 1 else jnp.repeat(x, times, axis=axis)
        rows_axis = 0 if isinstance(self.key, tuple) else 1
        key, value = jax.tree.map(lambda x: again(x, rows_axis), (self.key, self.value))
        return self.replace(key=key, value=value, mask=again(self.mask, 0))
