"""The only place that knows devices.

A step is written once, for "the rows that I can see". It takes `axis`, the name of the mapped axis or None, and says
where its sums must cross devices by `psum(x, axis)`. `pmap` binds the axis and maps the step over every device, local
and remote; `jax.jit` of the same step, with `axis` left None, runs it on one.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.types import InputError

AXIS = "device"
T = TypeVar("T")


def psum(tree: T, axis: str | None) -> T:
    """Sum over the mapped axis; the identity on one device."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def pmax(tree: T, axis: str | None) -> T:
    """Maximum over the mapped axis; the identity on one device."""
    return tree if axis is None else jax.lax.pmax(tree, axis)


def all_gather(tree: T, axis: str | None) -> T:
    """Every device's rows, in the order of devices, on every device."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def own_rows(rows: jax.Array, axis: str | None) -> jax.Array:
    """This device's equal share of an array of row numbers that is the same on every device.

    Raises InputError when they do not divide.
    """
    if axis is None:
        return rows
    count = jax.lax.axis_size(axis)
    share, rest = divmod(rows.shape[0], count)
    if rest:
        raise InputError(
            f"a minibatch of {rows.shape[0]} rows does not divide over {count} devices: use fewer minibatches, or a"
            f" batch of which each is a multiple of {count}"
        )
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis) * share, share)


def row_index(rows: int, axis: str | None) -> jax.Array:
    """Number of each of this device's rows within the global batch. [rows] int32."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * rows
    return first + jnp.arange(rows, dtype=jnp.int32)


def row_keys(key: jax.Array, rows: int, axis: str | None, first: int | jax.Array = 0) -> jax.Array:
    """A key a row that depends on the row's place in the global batch, not on the device that holds it. [rows].

    `first` is the number of the batch's first row, where batches are parts of something larger.
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + row_index(rows, axis))


def pmap(step: Callable, *, donate: tuple[int, ...] = (), devices: list | None = None) -> Callable:
    """`step(*args)` on every device: each argument and result has a leading axis of devices (`replicate`, `shard`)."""
    return jax.pmap(functools.partial(step, axis=AXIS), axis_name=AXIS, donate_argnums=donate, devices=devices)


def _sharding(devices: list | None) -> NamedSharding:
    local = jax.local_devices() if devices is None else devices
    return NamedSharding(Mesh(np.array(local), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: T, devices: list | None = None) -> T:
    """A copy on each local device, stacked on a leading axis."""
    sharding = _sharding(devices)
    count = len(sharding.device_set)

    def copy(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(x)  # by way of the host, where a copy needs no compiling
        return jax.device_put(np.broadcast_to(x[None], (count, *x.shape)), sharding)

    return jax.tree.map(copy, tree)


def unreplicate(tree: T) -> T:
    """The first local device's copy of a replicated tree."""
    return _first_row(jax.tree.map(lambda x: x.addressable_data(0), tree))


@jax.jit
def _first_row(tree: T) -> T:
    return jax.tree.map(lambda x: x[0], tree)


def shard(tree: T, devices: list | None = None, rows_axis: int = 0) -> T:
    """Split the rows of a host batch evenly over the local devices, on a new leading axis.

    `rows_axis` is the axis that counts rows. Raises InputError when the rows do not divide.
    """
    sharding = _sharding(devices)
    count = len(sharding.device_set)

    def split(x: Any) -> jax.Array:
        rows = x.shape[rows_axis]
        if rows % count:
            raise InputError(f"a batch of {rows} rows does not divide over {count} devices: use a multiple of {count}")
        x = np.asarray(x)
        x = x.reshape(*x.shape[:rows_axis], count, rows // count, *x.shape[rows_axis + 1 :])
        return jax.device_put(np.moveaxis(x, rows_axis, 0), sharding)

    return jax.tree.map(split, tree)


def gather(tree: T) -> T:
    """The inverse of `shard`, for results: device axis and rows become one axis again, on the host."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)
