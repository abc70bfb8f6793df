"""The only place that knows devices.

A step is written once, for "the rows that I can see". It takes `axis`, the name of the mapped axis or None, and says
where its sums must cross devices by `psum(x, axis)`. A layout places it: `Pmap` binds the axis and maps the step over
every device, local and remote, each of which holds all parameters; `Mesh` leaves the axis None, so that the step sees
all rows, and compiles it for arrays that are spread over devices, from which the compiler finds what must cross them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rlhf_jax.devices import hosts
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError, TrainState

AXIS = "device"
ROWS = "data", "fsdp"  # axes of a mesh over which rows are spread
HOST = "pinned_host"  # what jax calls the memory of a device's host
T = TypeVar("T")
G = TypeVar("G")  # gradients
M = TypeVar("M")  # metrics


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
    count = _row_devices() if axis is None else jax.lax.axis_size(axis)
    share, rest = divmod(rows.shape[0], count)
    if rest:
        raise InputError(
            f"a minibatch of {rows.shape[0]} rows does not divide over {count} devices: use fewer minibatches, or a"
            f" batch of which each is a multiple of {count}"
        )
    if axis is None:
        return rows
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


def part_size(rows: int, parts: int) -> int:
    """Of equal parts; raises InputError when rows do not divide into them, or the parts over the mesh."""
    size, rest = divmod(rows, parts)
    if rest or size % _row_devices():
        raise InputError(
            f"{rows // _row_devices()} rows a device do not divide into {parts} parts (microbatches, buckets): use"
            " fewer, or a larger batch"
        )
    return size


def split(x: jax.Array, parts: int) -> jax.Array:
    """Rows [B, ...] in equal parts [parts, B / parts, ...]: row b in part b % parts, so that a part has rows of every
    device of a mesh."""
    parted = x.reshape(part_size(x.shape[0], parts), parts, *x.shape[1:])
    return constrain(jnp.swapaxes(parted, 0, 1), None, ROWS)


def join(x: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    return constrain(jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), ROWS)


def accumulate(share: Callable[[T], tuple[G, M]], rows: T, parts: int) -> tuple[G, M]:
    """Gradients and metrics of a batch of rows, of which `share(some of them)` gives a part, a micro-batch at a time.

    The gradients are summed, so `share` divides by the count of the whole batch; metrics are stacked, [parts]. The
    activations of one micro-batch exist at a time. Raises InputError when the rows do not divide.
    """
    if parts == 1:
        grads, metrics = share(rows)
        return grads, jax.tree.map(lambda x: x[None], metrics)
    rows = jax.tree.map(lambda x: split(x, parts), rows)
    total, _ = jax.eval_shape(share, jax.tree.map(lambda x: x[0], rows))

    def add(total: G, part: T) -> tuple[G, M]:
        grads, metrics = share(part)
        return jax.tree.map(jnp.add, total, grads), metrics

    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total), rows)


# How arrays lie on a mesh ---------------------------------------------------------------------------------------------

# Axes of the mesh over which the last dimensions of a parameter are spread, by the end of its path. All else is whole,
# layers always are.
RULES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),  # [V, D]
    "unembedding": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),  # [T, D]
    "qkv/kernel": ("fsdp", "tensor", None, None),  # [D, G, R + 2, H]
    "qkv/bias": ("tensor", None, None),
    "out/kernel": ("tensor", None, None, "fsdp"),  # [G, R, H, D]
    "up/kernel": ("fsdp", "tensor"),  # [D, F]
    "up/bias": ("tensor",),
    "down/kernel": ("tensor", "fsdp"),  # [F, D]
    "kernel_a": ("fsdp", None),  # [inputs, rank]
    "kernel_b": (None, "fsdp"),  # [rank, outputs]
}


def parameter_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """What RULES say of each dimension of the parameter at this path, such as "params/blocks/mlp/up/kernel"."""
    names = path.split("/")
    axes = RULES.get("/".join(names[-2:])) or RULES.get(names[-1], ())
    if names[-2:] == ["up", "kernel"] and shape[-2] == 2:  # of a gated MLP, [D, 2, F]
        axes = ("fsdp", None, "tensor")
    return (None,) * (len(shape) - len(axes)) + axes


def _spec(shape: tuple[int, ...], axes: tuple, sizes: Any) -> PartitionSpec:
    """`axes` of a mesh with these sizes, where each dimension divides; without what says nothing."""
    count = lambda names: math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))
    kept = [
        names if count(names) > 1 and size % count(names) == 0 else None
        for size, names in zip(shape, axes, strict=True)
    ]
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def on_mesh() -> bool:
    """Whether what is being traced is for arrays that are spread over a `Mesh`."""
    return "fsdp" in jax.sharding.get_abstract_mesh().shape


def platform() -> str:
    """Of the devices that what is being traced is for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Lays `x` over these axes of the mesh, a dimension each and whole along the others; the identity without a mesh.

    A dimension that does not divide is whole.
    """
    if not on_mesh():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, axes + (None,) * (x.ndim - len(axes)), sizes))


def spread(tree: T) -> T:
    """Lays the rows of arrays [B, ...] over the mesh, as a batch's; the identity without a mesh."""
    return jax.tree.map(lambda x: constrain(x, ROWS) if x.ndim else x, tree)


def _row_devices() -> int:
    """Among how many parts of the mesh rows are split; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in ROWS)


# Layouts --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How a run lies on its devices. By default each holds whole models, and its share of the rows.

    Any of the first three makes it a mesh of data x fsdp x tensor devices, for models that outgrow one.
    """

    data: Count | None = None  # groups of devices that hold whole models between them; None is as many as there are
    fsdp: Count = 1  # devices of a group between which parameters and rows are split
    tensor: Count = 1  # devices between which heads, the width of MLPs and the vocabulary are split
    whole: tuple[str, ...] = ()  # models that each device of a mesh holds whole, such as critic
    offload: bool = False  # reference and reward models wait in the hosts' memory, of a mesh, until they are asked
    microbatches: Count = 1  # parts of an update's rows whose activations exist one after another

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole and not self.meshed:
            raise InputError("whole has no effect without a mesh, where every device holds whole models: leave it out")
        if self.offload and not self.meshed:
            raise InputError("offload needs a mesh: name its axes, as by data=8 for eight devices with whole models")

    @property
    def meshed(self) -> bool:
        return self.data is not None or self.fsdp * self.tensor > 1


@runtime_checkable
class Layout(Protocol):
    """Everything that an experiment does with devices."""

    def state(self, tree: T) -> T:
        """What is not rows, on the devices: a `TrainState`, parameters, keys. Arrays that lie so already may stay."""

    def frozen(self, tree: T) -> T:
        """`state` of models that are not trained, which may wait on the host until a step takes them."""

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        """A host batch on the devices, its rows spread evenly; InputError when they do not divide."""

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        """`step(*args, axis=)` compiled for arguments that `state` and `rows` have placed, and its own results."""

    def get(self, tree: T) -> T:
        """The inverse of `state`, for results: what a step returns that is not rows, such as metrics."""

    def fetch(self, tree: T) -> T:
        """The inverse of `rows`, for results: this process's rows, on the host. All processes must call it."""

    def gather(self, tree: T) -> T:
        """The rows of all processes, on the host of each. All must call it."""

    def sharding(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """Where `models.load` is to place a parameter, for `state` to take it from there."""


def layout(cfg: Config = Config(), devices: list | None = None) -> Layout:
    """The layout that `cfg` asks for, over `devices` or else all.

    Raises InputError when the mesh is not of as many devices as there are.
    """
    if not cfg.meshed:
        return Pmap(devices)
    devices = jax.devices() if devices is None else devices
    group = cfg.fsdp * cfg.tensor
    sizes = cfg.data or max(len(devices) // group, 1), cfg.fsdp, cfg.tensor
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"a mesh of data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} devices, but there are {len(devices)}:"
            " use sizes whose product is that"
        )
    automatic = (jax.sharding.AxisType.Auto,) * 3
    near = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)  # along a TPU slice's links
    return Mesh(jax.sharding.Mesh(near, (*ROWS, "tensor"), axis_types=automatic), cfg.whole, cfg.offload)


@dataclasses.dataclass(frozen=True)
class Pmap:
    """Every device holds a copy of the state and its share of the rows; both have a leading axis of devices."""

    devices: list | None = None

    def state(self, tree: T) -> T:
        return replicate(tree, self.devices)

    def frozen(self, tree: T) -> T:
        return self.state(tree)

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        return shard(tree, self.devices, rows_axis)

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        return pmap(step, donate=donate, devices=self.devices)

    def get(self, tree: T) -> T:
        return unreplicate(tree)

    def fetch(self, tree: T) -> T:
        return fetch(tree)

    def gather(self, tree: T) -> T:
        return gather(tree)

    def sharding(self, path: str, shape: tuple[int, ...]) -> SingleDeviceSharding:
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])  # the copies alone lie on the devices


PMAP = Pmap()  # over all devices


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Arrays keep their shapes and are spread over a mesh: parameters by RULES, rows over its axes ROWS."""

    mesh: jax.sharding.Mesh
    whole: tuple[str, ...] = ()  # names in the paths of parameters that every device holds
    offload: bool = False  # whether frozen models wait on the host

    def sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        whole = any(name in self.whole for name in path.split("/"))
        axes = (None,) * len(shape) if whole else parameter_axes(path, shape)
        return NamedSharding(self.mesh, _spec(shape, axes, self.mesh.shape))

    def shardings(self, tree: Any, kind: str | None = None) -> Any:
        """Where `state` places each array of a tree; `kind` of memory, by default the devices' own."""

        def of(path: Any, x: Any) -> NamedSharding:
            spec = self.sharding(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape).spec
            return NamedSharding(self.mesh, spec, memory_kind=kind)

        return jax.tree_util.tree_map_with_path(of, tree)

    def state(self, tree: T) -> T:
        return self._put(tree, self.shardings(tree))

    def frozen(self, tree: T) -> T:
        return self._put(tree, self.shardings(tree, HOST if self.offload else None))

    def _put(self, tree: T, shardings: Any) -> T:
        def put(x: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(x, jax.Array):
                if x.sharding.is_equivalent_to(sharding, x.ndim):
                    return x
                if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                    return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
                if hosts.spans(x):
                    return jax.device_put(x, sharding)
            return hosts.put(np.array(x), sharding)  # by way of the host: what it came from may then be donated

        tree = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree)
        return jax.tree.map(put, tree, shardings)

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        count = math.prod(self.mesh.shape[name] for name in ROWS)
        sharding = NamedSharding(self.mesh, PartitionSpec(*(None,) * rows_axis, ROWS))
        own = sharding if jax.process_count() == 1 else hosts.by_process(rows_axis)

        def split(x: Any) -> jax.Array:
            rows = x.shape[rows_axis] * jax.process_count()
            if rows % count:
                raise InputError(
                    f"a batch of {rows} rows does not divide over {count} parts of the mesh: use a multiple of {count}"
                )
            return jax.device_put(jax.make_array_from_process_local_data(own, np.asarray(x)), sharding)

        return jax.tree.map(split, tree)

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        def lay_out(x: Any) -> Any:
            if isinstance(x, TrainState):  # where it lay before
                return jax.lax.with_sharding_constraint(x, self.shardings(x))
            return constrain(x, ROWS) if x.ndim else constrain(x)

        def placed(*args: Any) -> Any:
            args = jax.tree.map(_on_device, args)
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                results = step(*args, axis=None)
                return jax.tree.map(lay_out, results, is_leaf=lambda x: isinstance(x, TrainState))

        return jax.jit(placed, donate_argnums=donate)

    def get(self, tree: T) -> T:
        return tree

    def fetch(self, tree: T) -> T:
        return hosts.share(self.gather(tree))

    def gather(self, tree: T) -> T:
        return jax.tree.map(hosts.whole, tree)


def _on_device(x: jax.Array) -> jax.Array:
    """Within a step: copied from where frozen models wait."""
    return jax.device_put(x, jax.memory.Space.Device) if jax.typeof(x).memory_space == jax.memory.Space.Host else x


def pmap(step: Callable, *, donate: tuple[int, ...] = (), devices: list | None = None) -> Callable:
    """`step(*args)` on every device: each argument and result has a leading axis of devices (`replicate`, `shard`)."""
    devices = hosts.devices() if devices is None else devices
    return jax.pmap(functools.partial(step, axis=AXIS), axis_name=AXIS, donate_argnums=donate, devices=devices)


def _sharding(devices: list | None) -> NamedSharding:
    local = jax.local_devices() if devices is None else devices
    return NamedSharding(jax.sharding.Mesh(np.array(local), (AXIS,)), PartitionSpec(AXIS))


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
    """Split this process's rows of a host batch evenly over the local devices, on a new leading axis.

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


def fetch(tree: T) -> T:
    """The inverse of `shard`, for results: device axis and rows become one axis again, on the host."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def gather(tree: T) -> T:
    """`fetch` for the rows of all processes, on every one of them. All must call it."""
    return hosts.join(fetch(tree))
