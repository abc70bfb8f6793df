"""Exact save and resume of a run, on Orbax.

A checkpoint is `<directory>/<step>/`: every leaf of the `TrainState`, bit for bit, and a JSON-able `extra` for what is
not an array (data positions, counters). It is written under a temporary name in the background and renamed when it is
complete, so that a directory whose name is a number is whole. Saving takes a state that is not replicated: host
arrays, arrays on one device, or arrays sharded over a mesh.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rlhf_jax.types import InputError, TrainState

_MARK = "_CHECKPOINT_METADATA"  # the file by which Orbax knows its checkpoints
_open: dict[Path, "Writer"] = {}  # of this process, by directory


class Writer:
    """Saves states below one directory and keeps the newest few.

    Use it as a context manager: leaving it waits until what was saved is on disk.
    """

    def __init__(self, directory: Path, keep: int = 2, start: int = 0):
        """Opens `directory`, made if needed, for a run that begins after step `start`.

        Checkpoints of later steps are deleted: they belong to a run that this one replaces.
        """
        directory = self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,  # what a killed run left
        )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.CheckpointManager(directory, options=options)
        except OSError as error:
            raise InputError(f"checkpoints cannot be written to {directory}: {error.strerror}") from error
        for step in steps(directory):
            if step > start:
                self._orbax.delete(step)
        _open[directory] = self

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Saves `state` as its step; a step that is already there stays as it is.

        The values are read before this returns, so the state may be donated to the next step; the files are written
        in the background. An error of an earlier write is raised here.
        """
        step = int(state.step)
        if step in self._orbax.all_steps():
            return
        leaves = _named(state)
        about = {
            "leaves": {name: _kind(leaf) for name, leaf in leaves.items()},
            "keys": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)},
            "extra": dict(extra or {}),
        }
        arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        self._orbax.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in writing it."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        self._orbax.close()
        _open.pop(self._directory, None)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints in `directory`, ascending; none if it does not exist."""
    return sorted(int(path.parent.name) for path in directory.glob(f"*/{_MARK}") if path.parent.name.isdigit())


def latest(directory: Path, before: int | None = None) -> Path | None:
    """The newest complete checkpoint in `directory`, of a step less than `before` if that is given.

    Waits for those that this process is still writing there.
    """
    if writer := _open.get(directory.absolute()):
        writer.wait()
    found = [step for step in steps(directory) if before is None or step < before]
    return directory / str(found[-1]) if found else None


def restore(directory: Path, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
    """The state and the `extra` saved at `step`, by default the newest.

    `like` gives the structure, the shapes and the placement: each leaf comes back as its counterpart is (a NumPy array,
    or a jax array with that sharding); a `jax.ShapeDtypeStruct` without a sharding stands for the default device.
    Raises `InputError` where there is no such checkpoint, where it cannot be read, or where it does not fit `like`.
    """
    newest = latest(directory)
    path = newest if step is None else directory / str(step)
    if path is None or not (path / _MARK).exists():
        there = f"there are steps {steps(directory)}" if newest else "there is none"
        raise InputError(f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; {there}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        about = _read(orbax, path, about=ocp.args.JsonRestore())
        leaves = _named(like)
        _check(path, about["leaves"], {name: _kind(leaf) for name, leaf in leaves.items()})
        template = {name: _template(leaf) for name, leaf in leaves.items()}
        arrays = _read(orbax, path, state=ocp.args.StandardRestore(template))
    restored = [
        jax.random.wrap_key_data(arrays[name], impl=about["keys"][name]) if _is_key(leaf) else arrays[name]
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored), about["extra"]


def _read(orbax: ocp.Checkpointer, path: Path, **item: Any) -> Any:
    """One item of the checkpoint at `path`."""
    try:
        return next(iter(orbax.restore(path.absolute(), args=ocp.args.Composite(**item)).values()))
    except Exception as error:  # a damaged file surfaces as almost anything, from the depths of TensorStore
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged; delete it to go back to the one before it ({reason})") from error


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


def _check(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises `InputError` naming the first leaf in which the two differ."""
    for name in sorted(saved | wanted):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"{path} does not fit this run: {name} is {saved.get(name, 'absent')} there "
                f"and {wanted.get(name, 'absent')} here; resume with the configuration that saved it"
            )


def _template(leaf: Any) -> Any:
    """What Orbax is to restore in place of `leaf`."""
    if isinstance(leaf, np.ndarray):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = jax.random.key_data(leaf).sharding if _is_key(leaf) and isinstance(leaf, jax.Array) else leaf.sharding
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
