"""Exact save and resume of a run, on Orbax.

A checkpoint is `<directory>/<step>/`: every leaf of the `TrainState`, bit for bit, and the position of every data
stream. It is written under a temporary name in the background and renamed when it is complete, so that a directory
whose name is a number is whole. In a bucket (`gcs`) nothing is renamed: there a checkpoint is whole when it has the
file that Orbax writes last. Sums over the bits of each leaf tell what the disk spoilt afterwards. Saving takes a
state that is not replicated: host arrays, arrays on one device, or arrays sharded over a mesh. All processes of
a run write their part of it, to a directory that all of them see.

A loop goes on from the newest checkpoint that can be read, saves when it is time, and ends when it is asked to:

    state = checkpoint.resume(directory, state, streams, cfg.saves)
    start = int(state.step)
    with checkpoint.Writer(directory, cfg.saves, start, total) as saves:
        for step in range(start + 1, total + 1):
            state, metrics = step_fn(state, next(streams["data"]))
            if saves.due(step):
                saves.save(state, streams, metrics)
"""

import contextlib
import dataclasses
import errno
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from rlhf_jax.devices import hosts, preemption
from rlhf_jax.runs import gcs
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError, TrainState

_MARK = "_CHECKPOINT_METADATA"  # the file by which Orbax knows its checkpoints
_LAST = "commit_success.txt"  # the one that makes a checkpoint in a bucket whole
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_SAY_FULL = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)  # in errors without a number
_open: dict[Path, "Writer"] = {}  # of this process, by directory


@runtime_checkable
class Stream(Protocol):
    """An iterator that knows its place, as Grain's do."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class FullDiskError(OSError):
    """A checkpoint cannot be written. The message names the directory, and the checkpoint from which to go on."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How often a run is saved, which checkpoints are kept, and whether it goes on from them."""

    every: Count = 50  # steps between checkpoints
    keep: Count = 2  # newest checkpoints to keep
    best: str | None = None  # metric by which the best is kept too: min:loss/next_token, max:reward/score
    # same: go on from what is there, and refuse to if other settings made it; changed: go on with these; never: start
    # over, whatever is there
    resume: Literal["same", "changed", "never"] = "same"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best is not None and not self.best.startswith(("min:", "max:")):
            raise InputError(f"saves.best={self.best}: expected min: or max:, then the name of a metric")


class Writer:
    """Saves states below one directory and keeps the newest few.

    Use it as a context manager: leaving it waits until what was saved is on disk. Within, SIGTERM is left to `save`.
    """

    def __init__(self, directory: Path, cfg: Config = Config(), start: int = 0, total: int | None = None):
        """Open `directory`, made if needed, for a run that begins after step `start` and ends with step `total`.

        Checkpoints of later steps are deleted: they belong to a run that this one replaces.
        """
        directory = self._directory = directory.absolute()
        where = self._where = gcs.place(directory)
        self._cfg, self._total, self._ending, self._scope = cfg, total, False, contextlib.ExitStack()
        newest: Any = checkpoint_managers.LatestN(cfg.keep)
        best = checkpoint_managers.BestN(get_metric_fn=self._worth, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]) if cfg.best else newest,
            best_fn=self._worth if cfg.best else None,
            cleanup_tmp_directories=True,  # what a killed run left
        )
        try:
            where.mkdir(parents=True, exist_ok=True)
            with hosts.first_before_others():
                whole = steps(directory)
                old = where.iterdir() if hosts.first() and where.exists() else ()  # an empty folder of a bucket is none
                for path in old:  # and copies that had only begun
                    if path.name.isdigit() and (int(path.name) > start or int(path.name) not in whole):
                        epath.Path(path).rmtree()
            self._orbax = ocp.CheckpointManager(where, options=options)
        except OSError as error:
            raise InputError(f"checkpoints cannot be written to {directory}: {error.strerror}") from error
        _open[directory] = self

    def due(self, step: int) -> bool:
        """Whether to save after this step: its turn has come, it is the last one, or SIGTERM has come to any process.

        To be asked after every step.
        """
        self._ending = hosts.preemption_requested() or preemption.requested()
        return step % self._cfg.every == 0 or step == self._total or self._ending

    def save(
        self,
        state: TrainState,
        streams: Mapping[str, Stream] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save `state` as its step, and where the streams are; a step that is already there stays as it is.

        The values are read before this returns, so the state may be donated to the next step; the files are written
        in the background. An error of an earlier write is raised here. `metrics` are those of the step, to find the
        best by. If SIGTERM has come, raises `preemption.Preempted` when all is on disk.
        """
        with self._writing():
            self._save(state, streams or {}, metrics or {})
        if self._ending or preemption.requested():
            self.wait()
            raise preemption.Preempted

    def _save(self, state: TrainState, streams: Mapping[str, Stream], metrics: Mapping[str, float]) -> None:
        step = int(state.step)
        if step in self._orbax.all_steps():
            return
        gcs.push()  # the records, that they are not behind it
        measured = None
        if self._cfg.best:
            sign, name = (-1 if self._cfg.best.startswith("min:") else 1), self._cfg.best[4:]
            if name not in metrics:
                raise InputError(f"saves.best: the run has no metric {name}: expected one of {', '.join(metrics)}")
            measured = {self._cfg.best: sign * metrics[name]} if math.isfinite(metrics[name]) else None
        leaves = _named(state)
        about = {
            "leaves": {name: _kind(leaf) for name, leaf in leaves.items()},
            "keys": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)},
            "streams": {name: stream.get_state() for name, stream in streams.items()},
        }
        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
        about["sums"] = _sums(arrays)
        arrays = hosts.to_global(arrays)
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        self._orbax.save(step, args=args, metrics=measured, force=True)

    def wait(self) -> None:
        """Wait until everything saved so far is on disk; raises what went wrong in writing it."""
        with self._writing():
            self._orbax.wait_until_finished()

    def close(self) -> None:
        _open.pop(self._directory, None)
        with self._writing():
            self._orbax.close()

    def __enter__(self) -> "Writer":
        self._scope.enter_context(preemption.defer())
        self._scope.callback(self.close)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._scope.__exit__(*error)

    def _worth(self, metrics: Mapping[str, float]) -> float:
        """The number that is largest for the best checkpoint."""
        return metrics.get(self._cfg.best or "", -math.inf)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full disk into one clear error, from wherever in Orbax it came."""
        try:
            yield
        except Exception as error:
            if not disk_is_full(error):
                raise
            saved = steps(self._directory)
            last = f"the last checkpoint is {self._where / str(saved[-1])}" if saved else "there is no checkpoint yet"
            raise FullDiskError(errno.ENOSPC, f"no space is left to write to {self._where}; {last}") from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is that of a full disk, a quota, or a limit of file sizes."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _SAY_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def resume(
    directory: Path,
    like: TrainState,
    streams: Mapping[str, Stream] | None = None,
    cfg: Config = Config(),
    total: int | None = None,
) -> TrainState:
    """The state of the newest checkpoint that can be read, with the streams set to go on from there.

    It is `like` itself where there is no checkpoint, or `cfg` is to start over; see `restore` for what `like` is. The
    streams stay where they are if the run, of `total` steps, is trained: nothing is read from them, and they may be
    shorter than those that it was trained on. A damaged checkpoint is told of on stderr. Raises InputError if all are
    damaged, or a stream has no such place.
    """
    saved = [] if cfg.resume == "never" else steps(directory)
    for step in reversed(saved):
        try:
            state, positions = restore(directory, like, step)
        except DamagedError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if total is None or step < total:
            for name, stream in (streams or {}).items():
                if name in positions:
                    _position(stream, positions[name], f"{directory}: after step {step} the stream {name}")
        return state
    if saved:
        raise InputError(f"{directory}: no checkpoint can be read; --saves.resume never starts over")
    return like


def _position(stream: Stream, position: Any, what: str) -> None:
    try:
        stream.set_state(position)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # of rows or batches that are fewer, or others
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} cannot go on ({reason}); --saves.resume never starts over") from error


def steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in `directory`, ascending; none if it does not exist."""
    where, mark = _where(directory)
    return sorted(int(path.parent.name) for path in where.glob(f"*/{mark}") if path.parent.name.isdigit())


def _where(directory: Path) -> tuple[Any, str]:
    """The place of the checkpoints of `directory`, and the file that each one there has."""
    return gcs.place(directory), _LAST if gcs.holds(directory) else _MARK


def latest(directory: Path, before: int | None = None) -> Path | epath.Path | None:
    """The newest complete checkpoint in `directory`, of a step less than `before` if that is given.

    Waits for those that this process is still writing there.
    """
    if writer := _open.get(directory.absolute()):
        writer.wait()
    earlier = [step for step in steps(directory) if before is None or step < before]
    return gcs.place(directory) / str(earlier[-1]) if earlier else None


class DamagedError(InputError):
    """A checkpoint cannot be read, or is not what was written."""


def restore(directory: Path, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
    """The state and the positions of the streams saved at `step`, by default the newest.

    `like` gives the structure, the shapes and the placement: each leaf comes back as its counterpart is (a NumPy array,
    or a jax array with that sharding); a `jax.ShapeDtypeStruct` without a sharding stands for the default device.
    Raises `InputError` where there is no such checkpoint or it does not fit `like`, `DamagedError` where it is damaged.
    """
    newest = latest(directory)
    where, mark = _where(directory)
    path = newest if step is None else where / str(step)
    if path is None or not (path / mark).exists():
        there = f"there are steps {steps(directory)}" if newest else "there is none"
        raise InputError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        about = _read(orbax, path, ocp.args.Composite(about=ocp.args.JsonRestore()))
        leaves = _named(like)
        _check(path, about["leaves"], {name: _kind(leaf) for name, leaf in leaves.items()})
        template = {name: _template(leaf) for name, leaf in leaves.items()}
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(hosts.to_global(template)))
        arrays = hosts.to_local(_read(orbax, path, wanted))
    for name, total in _sums(arrays).items():
        if total != about["sums"][name]:
            raise DamagedError(f"{path} is damaged ({name} is not what was saved)")
    restored = [
        jax.random.wrap_key_data(arrays[name], impl=about["keys"][name]) if _is_key(leaf) else arrays[name]
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored), about["streams"]


def _read(orbax: ocp.Checkpointer, path: Path | epath.Path, item: ocp.args.Composite) -> Any:
    """One item of the checkpoint at `path`."""
    path = path if isinstance(path, epath.Path) else path.absolute()  # which would take a gs:// path for a relative one
    try:
        return next(iter(orbax.restore(path, args=item).values()))
    except Exception as error:  # a damaged file surfaces as almost anything, from the depths of TensorStore
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{path} is damaged ({reason[:200]})") from error


@jax.jit
def _bit_sums(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    def add(x: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
        bits = x.astype(width) if x.dtype == bool else jax.lax.bitcast_convert_type(x, width)
        return jnp.sum(bits, dtype=jnp.uint32)

    return jax.tree.map(add, arrays)


def _sums(arrays: dict[str, Any]) -> dict[str, int]:
    """The sum of each array's bit patterns as integers, modulo 2^32: any one that changes changes it."""
    places: dict[Any, dict[str, Any]] = {}  # one program takes what lies on the same devices
    for name, leaf in arrays.items():
        place = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
        places.setdefault(place, {})[name] = leaf
    totals = jax.device_get([_bit_sums(leaves) for leaves in places.values()])
    return {name: int(total) for found in totals for name, total in found.items()}


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves by path, in the order of `jax.tree.leaves`: `params/block/kernel`, `opt_state/0/mu/block/kernel`."""
    pairs = jax.tree_util.tree_flatten_with_path(state)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path; keep '/' out of parameter names")
    return leaves


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _check(path: Path | epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises `InputError` naming the first leaf in which the two differ."""
    for name in sorted(saved | wanted):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{path} does not fit this run: {name} is {saved.get(name, 'absent')} there "
                f"and {wanted.get(name, 'absent')} here; resume with the configuration that saved it"
            )


def _template(leaf: Any) -> Any:
    """The array or shape that tells Orbax how to restore `leaf`."""
    if isinstance(leaf, np.ndarray):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = jax.random.key_data(leaf).sharding if _is_key(leaf) and isinstance(leaf, jax.Array) else leaf.sharding
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
