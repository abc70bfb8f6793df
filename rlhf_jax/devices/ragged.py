"""Rows of different lengths in buckets, so that most of their padding is not computed.

Rows are sorted by length and computed in equal parts, each trimmed to the columns that its longest row needs, rounded
up to one of a few widths: the computation is compiled once a width. Arrays are [B, ..., ..N], where the last N columns
of the last axis may be padding, or [B]. The results are those of whole rows, but for rounding.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.devices import parallel, shared

T = TypeVar("T")
Result = TypeVar("Result")


def widths(columns: int, buckets: int) -> tuple[int, ...]:
    """The widths that are compiled: equal steps up to all columns, one a bucket."""
    return tuple(dict.fromkeys(-(-columns * (bucket + 1) // buckets) for bucket in range(buckets)))


def lengths(mask: Bool[Array, "B N"]) -> Int[Array, "B"]:
    """The number of columns of each row through its last real one."""
    return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


def order(mask: Bool[Array, "B N"], parts: int) -> Int[Array, "B"]:
    """Row numbers, such that each of the parts that `parallel.split` makes has rows of similar lengths.

    Raises InputError where the rows do not divide into parts.
    """
    size = parallel.part_size(mask.shape[0], parts)
    return parallel.join(jnp.argsort(lengths(mask)).reshape(parts, size))


def together(count: int, parts: int, group: int) -> int:
    """How many of the rows that share a prompt stay side by side where so many rows are divided into parts."""
    return shared.rows(parallel.part_size(count, parts), group)


def blocks(tree: T, size: int) -> T:
    """The arrays [B, ...] as [B / size, size, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def unblock(tree: T) -> T:
    """The inverse of `blocks`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def trim(tree: T, columns: int, width: int) -> T:
    """Arrays whose last `columns` columns are cut to the first `width` of them."""
    return jax.tree.map(lambda x: x[..., : x.shape[-1] - columns + width] if x.ndim > 1 else x, tree)


def trimmed(
    compute: Callable[..., Result], mask: Callable[[T], Bool[Array, "B N"]], buckets: int
) -> Callable[..., Result]:
    """`compute(rows, *others)` on rows trimmed to the smallest of the widths that has all of `mask(rows)`.

    The others are not trimmed. The shapes of its results must not depend on the width.
    """

    def compute_trimmed(rows: T, *others: Any) -> Result:
        real = mask(rows)
        columns = real.shape[1]
        sizes = widths(columns, buckets)
        branches = [lambda rows, *others, width=width: compute(trim(rows, columns, width), *others) for width in sizes]
        narrowest = jnp.searchsorted(jnp.array(sizes), jnp.max(lengths(real)))
        return jax.lax.switch(narrowest, branches, rows, *others)

    return compute_trimmed


def in_buckets(
    compute: Callable[..., Any], mask: Bool[Array, "B N"], buckets: int, *rows: Array, group: int = 1
) -> Any:
    """`compute(*rows)`, a bucket of the rows at a time; results are [B, N] or [B], and 0 in columns that were trimmed.

    Rows of a `group` that share a prompt stay together, see `devices.shared`. Raises InputError where the rows do not
    divide into buckets.
    """
    if buckets == 1:
        return compute(*rows)
    block = together(mask.shape[0], buckets, group)
    columns, index = mask.shape[1], order(jnp.any(blocks(mask, block), axis=1), buckets)

    def compute_padded(masked: tuple[Array, ...]) -> Any:
        _, *rows = masked
        pad = lambda x: jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))) if x.ndim > 1 else x
        return jax.tree.map(pad, compute(*rows))

    def mask_of(masked: tuple[Array, ...]) -> Bool[Array, "B N"]:
        return masked[0]

    trimmed_rows = trimmed(compute_padded, mask_of, buckets)
    split = tuple(parallel.split(blocks(x, block)[index], buckets) for x in (mask, *rows))
    results = jax.lax.map(lambda part: blocks(trimmed_rows(unblock(part)), block), split)
    inverse = jnp.argsort(index)
    return jax.tree.map(lambda x: unblock(parallel.join(x)[inverse]), results)
