"""Several processes of one run, one or more a host: how they find each other, take turns, and share rows.

Every process runs the same program on its own devices and its own rows of each batch; the first one also writes the
records. Of a run of one process nothing here costs or changes anything.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.devices import preemption
from rlhf_jax.types import InputError

T = TypeVar("T")

LOST = 45  # seconds without a sign of life after which the others give a process up, and end
PATIENCE = 86400  # seconds to wait for a process that lives: it may be preparing data
_EXPLICIT = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_asks = itertools.count(1)
_LOSS = "Gloo", "UNAVAILABLE", "heartbeat", "ABORTED", "Connection reset", "Connection closed"  # in messages of jax


def start() -> None:
    """Joins the other processes of the run, where the environment says that there are some. Call it before all else.

    Who they are is found by jax on Cloud TPU, under SLURM's srun and in an indexed job of Kubernetes. Elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Raises InputError
    when these are incomplete, or when the others do not come.
    """
    if jax.distributed.is_initialized() or not _others():
        return
    settings: dict[str, Any] = {}
    given = {name: os.environ[name] for name in _EXPLICIT if name in os.environ}
    if given:
        try:
            address, count, index = (given[name] for name in _EXPLICIT)
            settings = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        except (KeyError, ValueError) as error:
            raise InputError(
                f"several processes: expected {', '.join(_EXPLICIT)} to be host:port and two numbers, got {given}"
            ) from error
        settings["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=LOST, shutdown_timeout_seconds=LOST)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"several processes: they do not come together ({reason})") from error


def _others() -> bool:
    """Whether this process is one of several, going by what their launcher leaves in the environment."""
    if any(name in os.environ for name in _EXPLICIT):
        return True
    if "SLURM_STEP_NODELIST" in os.environ:  # within srun
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if "JOB_COMPLETION_INDEX" in os.environ:  # an indexed job of Kubernetes
        return True
    return "TPU_ML_PLATFORM" in os.environ  # set by jax where there are TPU chips


@contextlib.contextmanager
def together() -> Iterator[None]:
    """`start`; all leave the block together, and with `preemption.EXIT` at once where it loses another process.

    Also without this the others end within a minute of the end of one, by a signal: so jax does it.
    """
    start()
    try:
        yield
        meet("end")  # the first has more to write, and jax waits no longer than `LOST` on the way out
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(sign in str(error) for sign in _LOSS):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: another process of this run has ended: run all of them again to go on ({reason})", file=sys.stderr
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(preemption.EXIT)  # the ordinary way out waits for the others


def asked_to_end() -> bool:
    """Whether SIGTERM has come to any of several processes: True on all of them at the same call, if all ask as often.

    jax passes it on from process to process, beside what the devices do; `preemption.asked` does not hear of it then.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_asks))


def first() -> bool:
    """Whether this process is the one that writes what there is once: records, models, figures."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Returns when every process is here; `where` names the place. An error if one of them dies."""
    ocp.multihost.sync_global_processes(where, timeout=PATIENCE)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The block of the first process ends before that of the others begins, also if it ends with an error."""
    if not first():
        meet("others")
    try:
        yield
    finally:
        if first():
            meet("others")


def share(rows: T) -> T:
    """This process's rows of a host batch that every process has whole. InputError when they do not divide."""
    count = jax.process_count()

    def part(x: Any) -> Any:
        if x.shape[0] % count:
            raise InputError(f"a batch of {x.shape[0]} rows does not divide over {count} processes: use a multiple")
        return x.reshape(count, -1, *x.shape[1:])[jax.process_index()]

    return rows if count == 1 else jax.tree.map(part, rows)


def join(rows: T) -> T:
    """The inverse of `share`, for host arrays: the rows of all processes, on every one. All of them must call it."""
    return rows if jax.process_count() == 1 else multihost_utils.process_allgather(rows, tiled=True)


def by_process(rows_axis: int = 0) -> NamedSharding:
    """Of arrays whose rows lie with their processes, each of whose devices has all of its process's."""
    mesh = Mesh(np.array(devices()).reshape(jax.process_count(), -1), ("rows", "copies"))
    return NamedSharding(mesh, PartitionSpec(*(None,) * rows_axis, "rows"))


def put(x: np.ndarray, sharding: Any) -> jax.Array:
    """A host array that every process has whole, placed: each brings its part. None is the default device."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def whole(x: Any) -> np.ndarray:
    """An array on the host, also one that spans processes. All of them must call it."""
    if spans(x):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def spans(x: Any) -> bool:
    """Whether an array lies on devices of other processes too."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def devices() -> list[jax.Device]:
    """All devices, those of the first process first: the order of the rows that they hold."""
    return [device for n in range(jax.process_count()) for device in jax.local_devices(process_index=n)]


def to_global(tree: T) -> T:
    """Arrays that every process has whole as arrays of all processes, and the shapes of such arrays likewise.

    This is what Orbax can save, each process a part. Arrays that span processes stay as they are.
    """
    if jax.process_count() == 1:
        return tree
    first_devices = [jax.local_devices(process_index=n)[0] for n in range(jax.process_count())]
    everywhere = NamedSharding(Mesh(np.array(first_devices), ("process",)), PartitionSpec())

    def convert(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            if x.sharding is not None and not x.sharding.is_fully_addressable:
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        if spans(x):
            return x
        own = jax.device_put(x, jax.local_devices()[0])
        return jax.make_array_from_single_device_arrays(own.shape, everywhere, [own])

    return jax.tree.map(convert, tree)


def to_local(tree: T) -> T:
    """The inverse of `to_global`."""

    def convert(x: Any) -> Any:
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)
        return x.addressable_data(0) if getattr(mesh, "axis_names", ()) == ("process",) else x

    return tree if jax.process_count() == 1 else jax.tree.map(convert, tree)
