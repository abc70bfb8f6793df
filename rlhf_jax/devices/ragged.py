"""Responses of different lengths, without computing what is padding.

Rows are put in the order of their lengths and computed in parts, each as wide as its longest row needs: one of a few
widths, for each of which the computation is compiled. Arrays are [B, ..., ..N] with N columns at the end of the last
axis that may be padding, or [B]. What comes out is what whole rows give, but for rounding.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlhf_jax.devices import parallel

T = TypeVar("T")
Result = TypeVar("Result")


def widths(columns: int, parts: int) -> tuple[int, ...]:
    """The widths of responses that are compiled: `parts` equal steps up to all columns."""
    return tuple(dict.fromkeys(-(-columns * (part + 1) // parts) for part in range(parts)))


def order(live: Bool[Array, "B N"], parts: int) -> Int[Array, "B"]:
    """Row numbers, such that each of the parts that `parallel.split` makes has rows of like length.

    Raises InputError where the rows do not divide.
    """
    last = jnp.max(jnp.where(live, jnp.arange(1, live.shape[1] + 1), 0), axis=1)
    return parallel.join(jnp.argsort(last).reshape(parts, parallel.part_size(len(last), parts)))


def narrow(tree: T, columns: int, width: int) -> T:
    """Arrays without the last `columns - width` columns."""
    return jax.tree.map(lambda x: x[..., : x.shape[-1] - columns + width] if x.ndim > 1 else x, tree)


def as_wide_as_needed(
    compute: Callable[..., Result], live: Callable[[T], Bool[Array, "B N"]], parts: int
) -> Callable[..., Result]:
    """`compute(rows, *others)` of rows without the columns at the end in which none of them is `live(rows)`.

    The others stay as they are. Its results must not have the width as a shape.
    """

    def computed(rows: T, *others: Any) -> Result:
        needed = live(rows)
        columns = needed.shape[1]
        last = jnp.max(jnp.where(needed, jnp.arange(1, columns + 1), 0))
        sizes = widths(columns, parts)
        at = [lambda rows, *others, width=width: compute(narrow(rows, columns, width), *others) for width in sizes]
        return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), last), at, rows, *others)

    return computed


def read(compute: Callable[..., Any], live: Bool[Array, "B N"], parts: int, *rows: Array) -> Any:
    """`compute(*rows)`, a part of the rows at a time; its results are [B, N] or [B], and 0 in columns it did not see.

    Raises InputError where the rows do not divide into `parts`.
    """
    if parts == 1:
        return compute(*rows)
    columns, index = live.shape[1], order(live, parts)

    def padded(rows: tuple[Array, ...]) -> Any:
        pad = lambda x: jnp.pad(x, ((0, 0), (0, columns - x.shape[1]))) if x.ndim > 1 else x
        return jax.tree.map(pad, compute(*rows[1:]))

    def of_part(rows: tuple[Array, ...]) -> Bool[Array, "B N"]:
        return rows[0]

    split = tuple(parallel.split(x[index], parts) for x in (live, *rows))
    results = jax.lax.map(as_wide_as_needed(padded, of_part, parts), split)
    back = jnp.argsort(index)
    return jax.tree.map(lambda x: parallel.join(x)[back], results)
