"""Runs of several processes, one or more on each host: how they connect, synchronise and share rows.

Every process runs the same program on its own devices and its own rows of each batch; the first process also writes the
records. In a run of one process these functions change nothing and cost nothing.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.devices import preemption
from rlhf_jax.types import InputError

T = TypeVar("T")

LOST = 45  # seconds without a heartbeat after which a process counts as dead, and the others end
PATIENCE = 86400  # seconds to wait at a barrier for a live process, which may be preparing data
_EXPLICIT = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_calls = itertools.count(1)
# Parts of the messages of jax's errors that mean that another process is lost.
_LOSS = "Gloo", "UNAVAILABLE", "heartbeat", "ABORTED", "Connection reset", "Connection closed"


def start() -> None:
    """Connect to the other processes of the run, if the environment names any. Call it before any other JAX code.

    On Cloud TPU, under SLURM's srun and in an indexed Kubernetes job, jax finds the processes. Elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises InputError when these
    are incomplete, or when the other processes do not connect in time.
    """
    if jax.distributed.is_initialized() or not _others():
        return
    address = count = index = detection = None  # jax finds them
    variables = {name: os.environ[name] for name in _EXPLICIT if name in os.environ}
    if variables:
        try:
            address, *numbers = (variables[name] for name in _EXPLICIT)
            count, index = map(int, numbers)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"several processes: expected {', '.join(_EXPLICIT)} to be host:port and two numbers, got {variables}"
            ) from error
        detection = "deactivate"
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            cluster_detection_method=detection,
            heartbeat_timeout_seconds=LOST,
            shutdown_timeout_seconds=LOST,
        )
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"several processes: they do not come together ({reason}); start all of them, and check {_EXPLICIT[0]}"
        ) from error


def _others() -> bool:
    """Whether this process is one of several, according to the environment variables of its launcher."""
    if any(name in os.environ for name in _EXPLICIT):
        return True
    if "SLURM_STEP_NODELIST" in os.environ:  # within srun
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if "JOB_COMPLETION_INDEX" in os.environ:  # an indexed job of Kubernetes
        return True
    return "TPU_ML_PLATFORM" in os.environ  # set by jax on a machine with TPU chips


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Call `start`, then leave the block only when all processes do, or exit at once if another process is lost.

    The exit status is then `preemption.EXIT`. Without this block jax would still end the other processes within a
    minute, but by a signal.
    """
    start()
    try:
        yield
        meet("end")  # the first process may still be writing, and at exit jax waits at most `LOST` seconds
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(sign in str(error) for sign in _LOSS):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: another process of this run has ended: run all of them again to go on ({reason})", file=sys.stderr
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(preemption.EXIT)  # a normal exit would wait for the other processes


def preemption_requested() -> bool:
    """Whether any of several processes got SIGTERM. All must call this equally often, and all get the same answer.

    jax's own handler passes the signal between hosts without the devices; `preemption.requested` does not see it then.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_calls))


def first() -> bool:
    """Whether this is the first process, the only one that writes records, models and figures."""
    return jax.process_index() == 0


def first_does(action: Callable[[], T]) -> T | None:
    """The result of `action()`, which the first process runs; None on the others. All must call this.

    An error of the first process is an InputError on the others, so that none of them waits for it.
    """
    result, error = None, None
    if first():
        try:
            result = action()
        except Exception as failure:
            error = failure
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(error is not None)):
        raise error or InputError("the first process of this run has refused it: see its message")
    if error is not None:
        raise error
    return result


def first_decides(question: Callable[[], bool]) -> bool:
    """The answer of the first process, on all of them. All must call this."""
    answer = bool(first_does(question))
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def meet(where: str) -> None:
    """Wait until every process has reached this barrier, which `where` names. Raises an error of jax if one dies."""
    ocp.multihost.sync_global_processes(where, timeout=PATIENCE)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Run the block on the first process, and then on the others, even if it fails on the first."""
    if not first():
        meet("others")
    try:
        yield
    finally:
        if first():
            meet("others")


def share(rows: T) -> T:
    """This process's equal share of the rows of a host batch [B, ...], of which every process has a whole copy.

    Raises InputError when the rows do not divide over the processes.
    """
    count = jax.process_count()

    def part(x: Any) -> Any:
        if x.shape[0] % count:
            raise InputError(f"a batch of {x.shape[0]} rows does not divide over {count} processes: use a multiple")
        return x.reshape(count, -1, *x.shape[1:])[jax.process_index()]

    return rows if count == 1 else jax.tree.map(part, rows)


def join(rows: T) -> T:
    """The rows of all processes, on the host of each: the inverse of `share`. All processes must call it."""
    return rows if jax.process_count() == 1 else multihost_utils.process_allgather(rows, tiled=True)


def process_sharding(rows_axis: int = 0) -> NamedSharding:
    """A sharding in which each process's rows are replicated over its own devices."""
    mesh = Mesh(np.array(devices()).reshape(jax.process_count(), -1), ("rows", "copies"))
    return NamedSharding(mesh, PartitionSpec(*(None,) * rows_axis, "rows"))


def put(x: np.ndarray, sharding: Any) -> jax.Array:
    """A host array placed by a sharding (None: on the default device); every process must have a whole copy of it."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def to_host(x: Any) -> np.ndarray:
    """An array on the host, even if it is sharded over processes. All processes must call it."""
    if spans(x):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def spans(x: Any) -> bool:
    """Whether an array is also on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def devices() -> list[jax.Device]:
    """All devices ordered by process, which is the order of the rows that they hold."""
    return [device for n in range(jax.process_count()) for device in jax.local_devices(process_index=n)]


def to_global(tree: T) -> T:
    """Arrays, or their shapes, of which every process has a whole copy, as arrays replicated over all processes.

    Orbax can save only such arrays from several processes. Arrays that span processes stay as they are.
    """
    if jax.process_count() == 1:
        return tree
    first_devices = [jax.local_devices(process_index=n)[0] for n in range(jax.process_count())]
    replicated = NamedSharding(Mesh(np.array(first_devices), ("process",)), PartitionSpec())

    def convert(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            if x.sharding is not None and not x.sharding.is_fully_addressable:
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)
        if spans(x):
            return x
        local = jax.device_put(x, jax.local_devices()[0])
        return jax.make_array_from_single_device_arrays(local.shape, replicated, [local])

    return jax.tree.map(convert, tree)


def to_local(tree: T) -> T:
    """This process's copy of arrays that are replicated over all processes: the inverse of `to_global`."""

    def convert(x: Any) -> Any:
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)
        return x.addressable_data(0) if getattr(mesh, "axis_names", ()) == ("process",) else x

    return tree if jax.process_count() == 1 else jax.tree.map(convert, tree)
