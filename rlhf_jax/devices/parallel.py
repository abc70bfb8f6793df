"""The layouts of a run on its devices: the only module that depends on how many devices there are.

A step is written once, for "the rows that I can see". It takes `axis`, the name of the mapped axis or None, and marks
sums that must cross devices by `psum(x, axis)`. A layout places the step. `Pmap` binds the axis and maps the step over
all devices, local and remote, each of which has all parameters. `Mesh` leaves the axis None, so that the step sees all
rows, and compiles it for sharded arrays; the compiler adds the communication.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
ROWS = "data", "fsdp"  # axes of a mesh over which rows are sharded
HOST = "pinned_host"  # jax's name for the memory of a device's host
T = TypeVar("T")
G = TypeVar("G")  # gradients
M = TypeVar("M")  # metrics


def psum(tree: T, axis: str | None) -> T:
    """The sum over the mapped axis; the identity if `axis` is None, or one device, for which XLA would copy it."""
    return tree if axis is None or jax.lax.axis_size(axis) == 1 else jax.lax.psum(tree, axis)


def pmax(tree: T, axis: str | None) -> T:
    """The maximum over the mapped axis; the identity if `axis` is None."""
    return tree if axis is None else jax.lax.pmax(tree, axis)


def all_gather(tree: T, axis: str | None) -> T:
    """The rows of all devices [B, ...], in the order of devices, on every device; the identity if `axis` is None."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def local_rows(rows: jax.Array, axis: str | None) -> jax.Array:
    """This device's equal share of an array of row numbers [B] that is the same on every device.

    Raises InputError when the rows do not divide over the devices.
    """
    count = row_devices() if axis is None else jax.lax.axis_size(axis)
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
    """The number of each of this device's rows within the global batch. [rows] int32."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * rows
    return first + jnp.arange(rows, dtype=jnp.int32)


def row_keys(key: jax.Array, rows: int, axis: str | None, first: int | jax.Array = 0) -> jax.Array:
    """A key for each row, which depends on its place in the global batch and not on its device. [rows].

    `first` is the number of the first row, if the batch is part of something larger.
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + row_index(rows, axis))


def take_rows(x: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """These rows of `x`, which lie along this axis.

    On a mesh each device takes its share of them from its own share of `x`, where they must be.
    """
    devices, shape = row_devices(), x.shape
    if devices == 1:
        return jnp.take(x, rows, axis=axis, mode="clip")
    share = shape[axis] // devices
    blocks = x.reshape(*shape[:axis], devices, share, *shape[axis + 1 :])
    local = rows.reshape(devices, -1) % share
    taken = jax.vmap(lambda block, own: jnp.take(block, own, axis=axis), (axis, 0), axis)(blocks, local)
    return taken.reshape(*shape[:axis], len(rows), *shape[axis + 1 :])


def put_rows(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """The array `x` [B, ...] with these values in these rows, where each device has its own as in `take_rows`.

    A number that is no row of `x` is left out.
    """
    devices, count = row_devices(), x.shape[0]
    share = count // devices
    own = lambda x: x.reshape(devices, -1, *x.shape[1:])
    local = own(jnp.where(rows < count, rows % share, share))
    put = jax.vmap(lambda block, rows, values: block.at[rows].set(values, mode="drop"))
    return put(own(x), local, own(values)).reshape(x.shape)


def part_size(rows: int, parts: int) -> int:
    """The number of rows in each of `parts` equal parts of a batch.

    Raises InputError when the rows do not divide into the parts, or the rows of a part over the mesh.
    """
    size, rest = divmod(rows, parts)
    if rest or size % row_devices():
        raise InputError(
            f"{rows // row_devices()} rows a device do not divide into {parts} parts (microbatches, buckets): use"
            " fewer, or a larger batch"
        )
    return size


def split(x: jax.Array, parts: int) -> jax.Array:
    """Rows [B, ...] in equal parts [parts, B / parts, ...].

    Row b goes to part b % parts, so that every part has rows of every device of a mesh.
    """
    interleaved = x.reshape(part_size(x.shape[0], parts), parts, *x.shape[1:])
    return constrain(jnp.swapaxes(interleaved, 0, 1), None, ROWS)


def join(x: jax.Array) -> jax.Array:
    """The rows [B, ...] of equal parts [parts, B / parts, ...]: the inverse of `split`."""
    return constrain(jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), ROWS)


def accumulate(share: Callable[..., tuple[G, M]], parts: int) -> Callable[..., tuple[G, M]]:
    """A function as `share`, which computes its rows in `parts` micro-batches, one after another.

    `share(*rows)` returns the gradients and metrics of some rows. Gradients are summed, so `share` must divide by the
    count of the whole batch; metrics are stacked, [parts], unless there is one part. Only one micro-batch's activations
    exist at a time. The function raises InputError when the rows do not divide.
    """
    if parts == 1:
        return share

    def accumulated(*rows: Any) -> tuple[G, M]:
        rows = jax.tree.map(lambda x: split(x, parts), rows)
        total, _ = jax.eval_shape(share, *jax.tree.map(lambda x: x[0], rows))

        def add(total: G, part: tuple) -> tuple[G, M]:
            grads, metrics = share(*part)
            return jax.tree.map(jnp.add, total, grads), metrics

        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total), rows)

    return accumulated


# How arrays are sharded over a mesh -----------------------------------------------------------------------------------

# Mesh axes over which the last dimensions of a parameter are sharded, by the last names of its path. All other
# parameters and dimensions, and the dimension of layers, are replicated.
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
    """The mesh axis of each dimension of a parameter by RULES; `path` is such as "params/blocks/mlp/up/kernel"."""
    names = path.split("/")
    axes = RULES.get("/".join(names[-2:])) or RULES.get(names[-1], ())
    if len(axes) > len(shape) or not {"v_row", "v_col"}.isdisjoint(names):  # vectors that Adafactor keeps of a matrix
        return (None,) * len(shape)
    if names[-2:] == ["up", "kernel"] and shape[-2] == 2:  # a gated MLP has the kernel [D, 2, F]
        axes = ("fsdp", None, "tensor")
    if names[-3:-2] == ["experts"]:  # one of these for each expert, [E, ...]: whole experts over tensor
        axes = ("tensor", *(None if axis == "tensor" else axis for axis in axes))
    return (None,) * (len(shape) - len(axes)) + axes


def _spec(shape: tuple[int, ...], axes: tuple, sizes: Any) -> PartitionSpec:
    """The partition of an array over mesh axes of these sizes; a dimension that does not divide is replicated."""
    count = lambda names: math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))
    spec = [
        names if count(names) > 1 and size % count(names) == 0 else None
        for size, names in zip(shape, axes, strict=True)
    ]
    while spec and spec[-1] is None:  # so that equal partitions compare equal
        spec.pop()
    return PartitionSpec(*spec)


def has_mesh() -> bool:
    """Whether the current trace is compiled for arrays that are sharded over a `Mesh`."""
    return "fsdp" in jax.sharding.get_abstract_mesh().shape


def platform() -> str:
    """The platform that the current trace is compiled for, such as "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Shard the dimensions of `x` over these axes of the mesh, in order; the identity without a mesh.

    Dimensions beyond `axes`, with None, or that do not divide are replicated.
    """
    return jax.lax.with_sharding_constraint(x, partition(x, *axes)) if has_mesh() else x


def partition(x: jax.Array, *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """The partition of an array of this shape over these axes of the mesh that is traced for, see `constrain`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return _spec(x.shape, axes + (None,) * (x.ndim - len(axes)), sizes)


def shard_rows(tree: T) -> T:
    """Shard the rows of arrays [B, ...] over the mesh, as those of a batch; the identity without a mesh."""
    return jax.tree.map(lambda x: constrain(x, ROWS) if x.ndim else x, tree)


def row_devices() -> int:
    """The number of shards into which the mesh splits rows; 1 without a mesh."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(name, 1) for name in ROWS)


# Layouts --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of how a run uses its devices. By default each has a copy of every model, and a share of the rows.

    Setting `data`, `fsdp` or `tensor` makes a mesh of data x fsdp x tensor devices, for models too large for one.
    """

    data: Count | None = None  # data-parallel groups of devices, each with one copy of the models; None: as many as fit
    fsdp: Count = 1  # devices in a group over which parameters and rows are sharded
    tensor: Count = 1  # devices over which attention heads, MLP width and vocabulary are sharded
    whole: tuple[str, ...] = ()  # networks to replicate on every device of a mesh, such as critic
    offload: bool = False  # keep reference and reward models of a mesh in host memory between uses
    microbatches: Count = 1  # parts into which an update's rows are split to save memory; gradients are summed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole and not self.meshed:
            raise InputError("whole has no effect without a mesh, where every device holds whole models: leave it out")
        if self.offload and not self.meshed:
            raise InputError("offload needs a mesh: set its axes, such as data=8 for eight devices with whole models")

    @property
    def meshed(self) -> bool:
        return self.data is not None or self.fsdp * self.tensor > 1


@runtime_checkable
class Layout(Protocol):
    """The interface through which an experiment uses devices; `Pmap` and `Mesh` implement it."""

    def __hash__(self) -> int:
        """Equal layouts have the same: what was compiled for one of them serves the other."""

    def state(self, tree: T) -> T:
        """A tree without rows (a `TrainState`, parameters, keys) placed on the devices; it may share placed arrays."""

    def frozen(self, tree: T) -> T:
        """The parameters of frozen models, placed; they may stay in host memory until a step uses them."""

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        """A host batch placed on the devices, its rows sharded evenly; InputError when they do not divide."""

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        """The compiled `step(*args, axis=)`. Its arguments must come from `state`, `frozen`, `rows` or another step.

        Buffers of the arguments numbered in `donate` are reused for results.
        """

    def get(self, tree: T) -> T:
        """The results of a step that are not rows, such as metrics or a `TrainState`: the inverse of `state`."""

    def fetch(self, tree: T) -> T:
        """This process's rows of a step's results, on the host: the inverse of `rows`. All processes must call it."""

    def gather(self, tree: T) -> T:
        """The rows of all processes, on the host of each. All processes must call it."""

    def sharding(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        """The sharding with which `models.load` should place a parameter, so that `state` need not move it."""


def layout(cfg: Config = Config(), devices: Sequence | None = None) -> Layout:
    """The layout that `cfg` describes, over `devices` (default: all).

    Raises InputError when the size of the mesh is not the number of devices.
    """
    if not cfg.meshed:
        return Pmap(None if devices is None else tuple(devices))
    devices = jax.devices() if devices is None else devices
    group = cfg.fsdp * cfg.tensor
    sizes = cfg.data or max(len(devices) // group, 1), cfg.fsdp, cfg.tensor
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"a mesh of data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} devices, but there are {len(devices)}:"
            " use sizes whose product is that"
        )
    automatic = (jax.sharding.AxisType.Auto,) * 3
    # Neighbours in the mesh are neighbours in a TPU slice.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(jax.sharding.Mesh(grid, (*ROWS, "tensor"), axis_types=automatic), cfg.whole, cfg.offload)


@dataclasses.dataclass(frozen=True)
class Pmap:
    """The layout in which every device has a copy of the state and a share of the rows, on a leading device axis."""

    devices: tuple | None = None

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
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])  # only the copies are put on the devices


PMAP = Pmap()  # uses all devices


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The layout in which arrays keep their shapes and are sharded over a mesh: parameters by RULES, rows over ROWS."""

    mesh: jax.sharding.Mesh
    whole: tuple[str, ...] = ()  # names in the paths of parameters to replicate on every device
    offload: bool = False  # keep frozen models in host memory

    def sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        whole = any(name in self.whole for name in path.split("/"))
        axes = (None,) * len(shape) if whole else parameter_axes(path, shape)
        return NamedSharding(self.mesh, _spec(shape, axes, self.mesh.shape))

    def shardings(self, tree: Any, kind: str | None = None) -> Any:
        """The sharding of each array of a tree, in memory of this `kind` (default: the devices' own)."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            spec = self.sharding(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape).spec
            return NamedSharding(self.mesh, spec, memory_kind=kind)

        return jax.tree_util.tree_map_with_path(sharding, tree)

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
            return hosts.put(np.array(x), sharding)  # copied through the host, since the source may be donated later

        tree = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), tree)
        return jax.tree.map(put, tree, shardings)

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        count = math.prod(self.mesh.shape[name] for name in ROWS)
        sharding = NamedSharding(self.mesh, PartitionSpec(*(None,) * rows_axis, ROWS))
        local = sharding if jax.process_count() == 1 else hosts.process_sharding(rows_axis)

        def split(x: Any) -> jax.Array:
            rows = x.shape[rows_axis] * jax.process_count()
            if rows % count:
                raise InputError(
                    f"a batch of {rows} rows does not divide over {count} parts of the mesh: use a multiple of {count}"
                )
            return jax.device_put(jax.make_array_from_process_local_data(local, np.asarray(x)), sharding)

        return jax.tree.map(split, tree)

    def traced(self) -> contextlib.AbstractContextManager:
        """The context in which a function is traced for arrays that are sharded over this mesh."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        def shard_result(x: Any) -> Any:
            if isinstance(x, TrainState):  # sharded as before the step
                return jax.lax.with_sharding_constraint(x, self.shardings(x))
            return constrain(x, ROWS) if x.ndim else constrain(x)

        def placed(*args: Any) -> Any:
            args = jax.tree.map(_on_device, args)
            with self.traced():
                results = step(*args, axis=None)
                return jax.tree.map(shard_result, results, is_leaf=lambda x: isinstance(x, TrainState))

        return jax.jit(placed, donate_argnums=donate)

    def get(self, tree: T) -> T:
        return tree

    def fetch(self, tree: T) -> T:
        return hosts.share(self.gather(tree))

    def gather(self, tree: T) -> T:
        return jax.tree.map(hosts.to_host, tree)


def _on_device(x: jax.Array) -> jax.Array:
    """Inside a step: `x` on the device, copied from host memory if it is an offloaded parameter."""
    return jax.device_put(x, jax.memory.Space.Device) if jax.typeof(x).memory_space == jax.memory.Space.Host else x


def pmap(step: Callable, *, donate: tuple[int, ...] = (), devices: Sequence | None = None) -> Callable:
    """The step mapped over all devices: arguments and results have a leading device axis (see `replicate`, `shard`)."""
    devices = hosts.devices() if devices is None else devices
    return jax.pmap(functools.partial(step, axis=AXIS), axis_name=AXIS, donate_argnums=donate, devices=devices)


def _sharding(devices: Sequence | None) -> NamedSharding:
    local = jax.local_devices() if devices is None else devices
    return NamedSharding(jax.sharding.Mesh(np.array(local), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: T, devices: Sequence | None = None) -> T:
    """A copy of each array on every local device, stacked on a leading device axis."""
    sharding = _sharding(devices)
    count = len(sharding.device_set)

    def copy(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(x)  # through the host, where a copy needs no compilation
        return jax.device_put(np.broadcast_to(x[None], (count, *x.shape)), sharding)

    return jax.tree.map(copy, tree)


def unreplicate(tree: T) -> T:
    """The copy of a replicated tree on the first local device."""
    return _first_row(jax.tree.map(lambda x: x.addressable_data(0), tree))


@jax.jit
def _first_row(tree: T) -> T:
    return jax.tree.map(lambda x: x[0], tree)


def shard(tree: T, devices: Sequence | None = None, rows_axis: int = 0) -> T:
    """Split this process's rows of a host batch evenly over the local devices, on a new leading device axis.

    `rows_axis` is the axis of rows, 0 for [B, ...]. Raises InputError when the rows do not divide.
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
    """This process's rows of sharded results, on the host, without the device axis: the inverse of `shard`."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


def gather(tree: T) -> T:
    """The rows of all processes, on the host of each. All processes must call it."""
    return hosts.join(fetch(tree))
