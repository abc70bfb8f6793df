"""Buckets: gs:// paths (Google Cloud Storage) as run directories, model directories and data files.

All other code works on local files. A configuration that names gs:// paths is turned into one that names their mirrors:
folders of this machine, `~/.cache/rlhf_jax/buckets/BUCKET/...`, that are made equal to the bucket before the run. What
the run writes to its directory goes back: models and tables when they are written, all records before each checkpoint
and at the end. Checkpoints are no part of the mirror: Orbax writes them straight to `place`, from all hosts. They are
never ahead of the records, so that the run goes on where it was on a machine that has never seen it.

A file is the same here and there if its size and its time are: copies get the time of what they are copied from.
"""

import contextlib
import dataclasses
import errno
import glob
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from etils import epath

from rlhf_jax.devices import hosts, preemption
from rlhf_jax.types import InputError

Config = TypeVar("Config")

CHECKPOINTS = "checkpoints"  # folders that are not mirrored
# Pathlib makes gs:/b of gs://b. Formats, other sources of a mixture, weights and slices stand around it.
_NAME = re.compile(r"(?:^|(?<=[:,]))gs:/+((?:[^:,\[\]=]|\[[^\[\]:%]+\](?![,=]|$)|=(?![-+.\w]+(?:,|$)))+)")
_PATTERN = re.compile(r"[*?\[]")
_HERE = "data_dir", "docs", "db"  # settings that name folders, or a store, of this machine
_SIGN = ".mirror"  # in a run directory's mirror: what was deleted with it is not to be deleted in the bucket
_outs: list[Path] = []  # mirrors of the run directories of this process
_marked: set[Path] = set()  # those of them that have been sent
_sent: dict[Path, tuple[int, int]] = {}  # size and time of each file there as it is in the bucket


def at(name: str) -> epath.Path:
    """The path of what `gs://...` names. Raises InputError where the packages for that are missing."""
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{name}: gs:// paths need gcsfs; install the extra tpu, or: pip install 'etils[epath-gcs]'")
    # Others write there too, and a listing is cached for ever.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(name)


def place(directory: Path) -> Any:
    """The place of the checkpoints of `directory`: in its bucket if it is in a mirror, else there."""
    return at(named(str(directory))) if holds(directory) else directory


def holds(path: Path) -> bool:
    """Whether a path is a mirror, or in one."""
    return path.is_relative_to(_root())


def named(text: str) -> str:
    """`text` with the gs:// names of mirrors in place of their paths."""
    return text.replace(f"{_root()}{os.sep}", "gs://")


@contextlib.contextmanager
def mirrored(config: Config) -> Iterator[Config]:
    """Put mirrors in place of the gs:// paths of `config`: fetched before the block, and sent back after it.

    Its field `out` is the run directory; all other paths must be there. Raises InputError where they are not.
    """
    found: list[tuple[str, Path]] = []
    local = _mirrors("", config, found)
    if not found:
        yield config
        return
    for field, path in found:
        if not pull(path) and field != "out":
            raise InputError(f"--{field.replace('_', '-')} {named(str(path))} does not exist")
    hosts.meet("buckets")  # processes of one machine share the mirror
    _outs[:] = [path for field, path in found if field == "out"]
    try:
        yield local
    except BaseException:
        try:
            push()
        except InputError as late:
            print(f"warning: {late}", file=sys.stderr)  # the first error is the one to see
        raise
    else:
        push()
    finally:
        _outs.clear()
        _marked.clear()
        _sent.clear()


def push(path: Path | None = None) -> None:
    """Make the bucket equal to `path`, by default to the run directory. The first process does it.

    The newest file goes last, for it may tell that the others are there. What others put there stays.
    """
    if not hosts.first():
        return
    with preemption.defer():
        for out in _outs:
            top = path or out
            if not top.is_relative_to(out):
                continue
            if out in _marked and not (out / _SIGN).exists():
                raise InputError(f"somebody deleted the copy of {named(str(out))} that this run works on: run it again")
            if out.is_dir():
                (out / _SIGN).touch()
                _marked.add(out)
            there = [one for one in [top, *top.rglob("*")] if one.is_file() and _counts(one.relative_to(out))]
            for one in sorted(there, key=lambda one: one.stat().st_mtime_ns):
                if _sent.get(one) != _mark(one):
                    _send(one)
            for one in [one for one in _sent if one.is_relative_to(top) and not one.exists()]:
                files, where = _opened(one)
                with _reaching(one, "cannot be written to"), contextlib.suppress(FileNotFoundError):
                    files.rm_file(where)
                del _sent[one]


def share(path: Path) -> None:
    """Send what the first process has just written to the bucket, and fetch it from there in every other one."""
    if holds(path):
        with hosts.first_before_others():
            if hosts.first():
                push(path)
            else:
                pull(path, quiet=True)


def pull(path: Path, quiet: bool = False) -> bool:
    """Make the mirror of a file, a directory or a pattern equal to it; False, and an empty one, if there is none."""
    top = _fixed(path)
    files, where = _opened(top)
    with _reaching(path, "cannot be read from"):
        try:
            info = files.info(where)
            if top != path:
                listed = files.glob(f"{where}/{path.relative_to(top)}", detail=True)
            else:
                listed = {where: info} if info["type"] == "file" else files.find(where, detail=True)
        except FileNotFoundError:
            listed = {}
        there = {top / os.path.relpath(name, where): info for name, info in listed.items()}
        there = {one: info for one, info in there.items() if info["type"] == "file" and _counts(one.relative_to(top))}
        here = [path, *path.rglob("*")] if top == path else map(Path, glob.glob(str(path), recursive=True))
        for one in here:
            if one.is_file() and one not in there and _counts(one.relative_to(top)):
                one.unlink(missing_ok=True)
        size = 0
        for one, info in there.items():
            if not one.is_file() or _mark(one) != (info["size"], _time(info)):
                one.parent.mkdir(parents=True, exist_ok=True)
                partial = one.with_name(f".{one.name}.{os.getpid()}.partial")
                files.get_file(info["name"], str(partial))
                os.utime(partial, ns=(_time(info),) * 2)
                os.replace(partial, one)
                size += info["size"]
            _sent[one] = _mark(one)
    if size and not quiet:
        print(f"{named(str(path))}: fetched {size / 2**20:.1f} MiB", flush=True)
    return bool(listed)


def _mirrors(field: str, value: Any, found: list[tuple[str, Path]]) -> Any:
    """`value` with mirrors in place of gs:// names, which are added to `found` with the field that they are in."""

    def mirror(name: re.Match[str]) -> str:
        if field in _HERE:
            raise InputError(f"--{field.replace('_', '-')} gs://{name[1]}: expected a path on this machine")
        found.append((field, _root() / name[1]))
        return str(found[-1][1])

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value) if each.init]
        changed = {name: _mirrors(name, getattr(value, name), found) for name in names}
        changed = {name: new for name, new in changed.items() if new is not getattr(value, name)}
        return dataclasses.replace(value, **changed) if changed else value
    if type(value) in (tuple, list):
        parts = type(value)(_mirrors(field, part, found) for part in value)
        return value if parts == value else parts
    if isinstance(value, str | Path) and _NAME.search(str(value)):
        return type(value)(_NAME.sub(mirror, str(value)))
    return value


def _fixed(path: Path) -> Path:
    """The folder that all files of a pattern are in; of a path that is no pattern, itself."""
    while _PATTERN.search(path.relative_to(_root()).as_posix()):
        path = path.parent
    return path


def _send(path: Path) -> None:
    files, where = _opened(path)
    mark = _mark(path)
    with _reaching(path, "cannot be written to"):
        files.makedirs(os.path.dirname(where), exist_ok=True)
        files.put_file(str(path), where)
        info = files.info(where)
        if _mark(path) == mark == (info["size"], mark[1]):  # nothing was added meanwhile
            os.utime(path, ns=(_time(info),) * 2)
            mark = _mark(path)
    _sent[path] = mark


def _opened(path: Path) -> tuple[Any, str]:
    """The file system that a mirror is of, and the name of `path` there."""
    return fsspec.core.url_to_fs(str(at(named(str(path)))))


@contextlib.contextmanager
def _reaching(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, of permissions, of credentials: each library has its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # here
            raise
        reason = (str(error).splitlines() or [""])[0][:300]
        raise InputError(f"{named(str(path))} {what}: {type(error).__name__} {reason}") from error


def _counts(name: Path) -> bool:
    """Whether a file is part of the mirror, from its name below the top of it."""
    return CHECKPOINTS not in name.parts and not any(part.startswith(".") for part in name.parts)


def _mark(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _time(info: dict[str, Any]) -> int:
    """The time at which a file was written, in nanoseconds but in whole microseconds."""
    when = info["mtime"]
    return round((when if isinstance(when, float) else when.timestamp()) * 10**6) * 1000


def _root() -> Path:
    return Path.home() / ".cache" / "rlhf_jax" / "buckets"
