"""The key/value cache of generation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from rlhf_jax.models.config import Config
from rlhf_jax.models.rope import turns
from rlhf_jax.types import Leaf


class Cache(struct.PyTreeNode):
    """Keys and values of the columns seen so far, for generation.

    The layers are stacked on a leading axis [L], for a scan over them, or `apart` in a tuple.
    """

    key: Leaf  # [L, B, G, S, head_dim], or L times [B, G, S, head_dim]
    value: Leaf  # as key
    mask: Leaf  # [B, S] bool, columns that hold a real token
    column: Leaf  # [] int32, the next column to fill
    turns: Any  # `turns` of S positions; None without RoPE

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int) -> "Cache":
        shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
        zeros = jnp.zeros(shape, config.compute.dtype)
        return cls(
            key=zeros,
            value=zeros,
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            turns=turns(columns, config),
        )

    def apart(self) -> "Cache":
        """Each layer as an array of its own, of the very shape that attention multiplies by: XLA for CPU copies
        whatever is cut out of a stack, and whatever is both updated and reshaped."""
        return self.replace(key=tuple(self.key), value=tuple(self.value))

    def put(self, layer: int | Array, key: Float[Array, "B G T H"], value: Float[Array, "B G T H"]) -> "Cache":
        """With these columns of a layer; `column` moves on when all layers have theirs."""

        def into(old: Any, new: Array) -> Any:
            if isinstance(old, tuple):
                changed = jax.lax.dynamic_update_slice(old[layer], new, (0, 0, self.column, 0))
                return (*old[:layer], changed, *old[layer + 1 :])
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, self.column, 0))

        return self.replace(key=into(self.key, key), value=into(self.value, value))

    def at(self, layer: int | Array) -> tuple[Float[Array, "B G S H"], Float[Array, "B G S H"]]:
        """All columns of a layer."""
        if isinstance(self.key, tuple):
            return self.key[layer], self.value[layer]
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.key, self.value))

    def rows(self, index: Int[Array, "B"]) -> "Cache":
        """These rows alone, of a cache that is `apart`."""
        key, value = jax.tree.map(lambda x: x[index], (self.key, self.value))
        return self.replace(key=key, value=value, mask=self.mask[index])
