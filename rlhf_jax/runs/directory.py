"""Run directories: what each was made with, and whether a command that is run again may go on there.

`config.json` holds the configuration; under `contents` checksums of the files that it names, so that a run does not go
on from a model, or with data, that changed in the meantime; and under `environment` what else it depends on. Settings
that change nothing of what is learnt may differ: `FREE`.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import hub
from rlhf_jax.devices import hosts
from rlhf_jax.runs import checkpoint, contents, gcs, lock
from rlhf_jax.types import InputError

FREE = {
    "out",
    "data_dir",
    "wandb",
    "profile",
    "samples",
    "samples_every",
    "token_samples",
    "saves",
    "docs",
    "held_out_every",
    "devices",
    "enough",
}  # names of settings
MODELS = {"init", "model", "reference", "reward", "cost", "teacher"}  # settings that may be names of the Hub
CHECKPOINTS = gcs.CHECKPOINTS  # below the run directory; they may be deleted when it is done

# Flags of JAX, however they were set, that give other numbers or other draws. What changes the rounding alone may
# differ, as devices may: the platform, the options of XLA, versions. Nothing here depends on the locale or on hashes.
_JAX_FLAGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
)
_COMMIT = "@commit"  # among the names of a path's files, if it is that of a model on the Hub
_FOLDERS = CHECKPOINTS, "model", "tensorboard"  # what a run writes below its directory
_RECORDS = "config.json", "metrics.jsonl", "samples.jsonl", "samples.md"


def settings(config: Any) -> dict[str, Any]:
    """The dataclass `config` as JSON has it, with `contents` and `environment`.

    Under `contents` lie, by the name of a setting and by each path in its value, the checksums of the files there; of a
    model on the Hub its commit. What is in a bucket has its name there.
    """
    plain, data_dir = _as_json(config), getattr(config, "data_dir", None)
    named = {name: value for name, value in _flat(plain) if isinstance(value, str) and not _is_free(name)}
    files = {name: found for name, value in named.items() if (found := _files_in(value, data_dir))}
    commits = {name: _commit(value) for name, value in named.items() if _names_model(name)}
    files |= {name: {named[name]: {_COMMIT: commit}} for name, commit in commits.items() if commit}
    environment = {name: getattr(jax.config, name, None) for name in _JAX_FLAGS}
    whole = plain | ({"contents": files} if files else {}) | {"environment": environment}
    return json.loads(gcs.named(json.dumps(whole, ensure_ascii=False)))


def read_settings(directory: Path) -> dict[str, Any]:
    """The `settings` of the run in `directory`; empty if it has none that can be read."""
    return _read_config(directory) or {}


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """How two `settings` differ, by the names of those that do: `0.1 there, 0.2 here`, or `rows.jsonl differs`.

    Paths are the same if their files are, wherever they lie; where either is gone, if their names are.
    """
    old, new = _compared(there), _compared(here)
    found = {}
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        old_files, new_files = _files_of(there, name), _files_of(here, name)
        if before == now:
            if changed := _changed_files(old_files, new_files):
                found[name] = changed
        elif contents.by_content(before, old_files) != contents.by_content(now, new_files):
            found[name] = f"{before} there, {now} here"
    return found


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an error in writing there into an InputError; a full disk, which no flag is the cause of, stays one."""
    try:
        yield
    except OSError as error:
        if checkpoint.disk_is_full(error):
            raise
        raise InputError(f"records cannot be written to {directory}: {error.strerror}") from error


def write(path: Path, text: str) -> None:
    """Write a file, with the folder that it is in. It appears whole, or its former content stays.

    The first process writes it; the others wait until it is there.
    """
    partial = path.with_name(f".{path.name}.partial")
    with hosts.first_before_others(), writing(path.parent):
        if hosts.first():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    gcs.share(path)


def write_config(directory: Path, config: Any) -> None:
    """Write the `settings` of the dataclass `config` to the run directory's config.json.

    Raises InputError where that cannot be a run directory of it, or another process uses it.
    """
    _prepare(directory, config)
    write(directory / "config.json", json.dumps(settings(config), indent=2) + "\n")


def claim(directory: Path, config: Any) -> None:
    """Lock `directory`, made if needed, for a run of `config`; raises InputError where it may not go on or begin.

    It may not where checkpoints of another configuration are, unless `config.saves.resume` says otherwise, nor where it
    cannot write, nor while another process uses the directory. Call it first, before anything is written there.
    """
    _prepare(directory, config)
    for name in _FOLDERS:
        if os.path.islink(folder := directory / name) and hosts.first():
            print(f"{folder} is a link: what is written there goes to {os.path.realpath(folder)}", flush=True)
    saves = getattr(config, "saves", None)
    if saves is None or saves.resume != "same" or not checkpoint.steps(directory / CHECKPOINTS):
        return
    if (there := _read_config(directory)) is None:
        raise InputError(
            f"{directory} has checkpoints but no config.json to tell of what: --saves.resume changed goes on from them,"
            " --saves.resume never starts over"
        )
    _check_same(directory, there, config, "--saves.resume changed goes on with these, never starts over")


def once(main: Callable[[Any], Any], config: Any, out: Path | None = None) -> Any:
    """The result of `main(config)` if that is a dict, else None; from `out`, by default `config.out`, if it is done.

    It is done if it has a done.json, and all that was in `out` when that was written. Raises InputError where other
    settings made it, or while another process makes it.
    """
    out = out or config.out
    record = _read_done(out, config)
    if record is None:
        is_taken_here = hosts.first_does(lambda: _take(out))
        try:
            record = _make(main, config, out)
        finally:
            if is_taken_here:
                lock.release(out)
    return record["result"]


def _take(out: Path) -> bool:
    """Make and lock a directory; whether this is what locked it."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        return lock.take(out)


def _read_done(out: Path, config: Any) -> dict[str, Any] | None:
    """The done.json of a run that is done, which any number of processes may read at once; else None."""
    done, saves = out / "done.json", getattr(config, "saves", None)
    if not done.is_file() or (saves is not None and saves.resume != "same"):
        return None
    try:
        record = json.loads(done.read_text(encoding="utf-8"))
        former, files, _ = record["settings"], record["files"], record["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{done} cannot be read: delete it, and what it tells of is made again") from error
    _check_same(out, former, config, "name another --out, or delete it")
    if not all((out / name).exists() for name in files):
        return None
    print(gcs.named(f"{out} is done"), flush=True)
    return record


def _make(main: Callable[[Any], Any], config: Any, out: Path) -> dict[str, Any]:
    """Run `main`, and write done.json when it is done."""
    print(gcs.named(f"\n== {out}"), flush=True)
    now = settings(config)
    (out / "done.json").unlink(missing_ok=True)
    result = main(config)
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(path.name for path in out.iterdir() if path.name != CHECKPOINTS and not path.name.startswith("."))
    gcs.push()  # before it says that they are there
    record = {"settings": now, "files": files, "result": result if isinstance(result, dict) else None}
    write(out / "done.json", json.dumps(record) + "\n")
    return record


def _prepare(directory: Path, config: Any) -> None:
    """`_prepare_first` by the first process of the run, for all of them."""
    hosts.first_does(lambda: _prepare_first(directory, config))


def _prepare_first(directory: Path, config: Any) -> None:
    """Make and lock the directory; raises InputError where it, or what is to be in it, cannot be written."""
    if not directory.resolve().name:
        raise InputError(f"--out {directory} is the root of the file system: name a folder in it")
    if os.path.islink(directory) and not os.path.exists(directory):
        raise InputError(f"{directory} is a link to {os.readlink(directory)}, which does not exist: make or delete it")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"records cannot be written to {directory}: it is read-only")
    there = _read_config(directory)
    if there is not None and ("model_type" in there or "architectures" in there):
        raise InputError(f"{directory} is a model directory, whose config.json a run would replace: name another --out")
    _check_written(directory)
    _check_inputs(directory, config)
    with writing(directory):
        lock.take(directory)


def _check_written(directory: Path) -> None:
    """Raises InputError where what a run writes in `directory` would go nowhere, or to where nobody looks for it."""
    for name in (*_FOLDERS, *_RECORDS):
        path, is_folder = directory / name, name in _FOLDERS
        if not os.path.lexists(path):
            continue
        if os.path.islink(path) and (not is_folder or not os.path.exists(path)):
            raise InputError(f"{path} is a link to {os.readlink(path)}: delete it, the run writes a {name} of its own")
        if is_folder != os.path.isdir(path):
            has, needs = ("a file", "a folder") if is_folder else ("a folder", "a file")
            raise InputError(f"{path} is {has}, where the run writes {needs}: move it, or name another --out")
        if not os.access(path, os.W_OK | (os.X_OK if is_folder else 0)):
            raise InputError(f"{path} cannot be written: it is read-only")


def _check_inputs(directory: Path, config: Any) -> None:
    """Raises InputError for a path in `config` that the run itself writes, before or after it has read it."""
    written = [os.path.realpath(directory / name) for name in (*_FOLDERS, *_RECORDS)]
    for name, value in _flat(_as_json(config)):
        for path in contents.paths(value) if isinstance(value, str) and not _is_free(name) else ():
            real = os.path.realpath(os.path.expanduser(path))
            if any(real == own or real.startswith(own + os.sep) for own in written):
                flag = re.sub(r"\.\d+$", "", name).replace("_", "-")
                raise InputError(f"--{flag} {path} is what this run writes: name another --out")


def _read_config(directory: Path) -> dict[str, Any] | None:
    """The object in config.json there; None if there is none, or it cannot be read."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check_same(directory: Path, there: dict[str, Any], config: Any, advice: str) -> None:
    """Raises InputError, with `advice`, unless `config` is what `directory` was made with.

    Warns where that cannot be told of its files.
    """
    here = settings(config)
    if differing := differences(_completed(there, config), here):
        listed = "; ".join(f"{name}: {how}" for name, how in differing.items())
        raise InputError(f"{directory} was made with other settings ({listed}): {advice}")
    if any(isinstance(sums, str) for sums in there.get("contents", {}).values()) and hosts.first():
        warning = f"{directory} is of an earlier version: whether the files that it names changed is not known"
        print(gcs.named(f"warning: {warning}"), file=sys.stderr)


def _changed_files(old: dict[str, contents.Checksums], new: dict[str, contents.Checksums]) -> str:
    """The files of the paths in both that are not the same, `base/config.json differs`; empty if there is none."""
    changed = sorted(
        f"{path} (commit {old[path][file]} there)" if file == _COMMIT else os.path.join(path, file) if file else path
        for path in old.keys() & new.keys()
        for file in contents.changes(old[path], new[path])
    )
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{', '.join(changed[:3])}{more} {'differ' if len(changed) > 1 else 'differs'}" if changed else ""


def _files_in(value: str, data_dir: Path | None) -> dict[str, contents.Checksums]:
    """The checksums of the files that a setting names, by the paths and names of data sets in it."""
    found = {path: contents.checksums(path) for path in contents.paths(value)} | contents.label_checksums(value)
    prepared = contents.prepared(value, data_dir).items()
    found |= {name: contents.record_checksums(folder) for name, folder in prepared if name not in found}
    return {name: sums for name, sums in found.items() if sums}


def _files_of(whole: dict[str, Any], name: str) -> dict[str, contents.Checksums]:
    """The checksums of a setting's files; none where an earlier version recorded others."""
    files = whole.get("contents", {}).get(name, {})
    return files if isinstance(files, dict) else {}


def _compared(whole: dict[str, Any]) -> dict[str, Any]:
    """The settings that may not differ, by their dotted names."""
    return {name: value for name, value in _flat(whole) if not _is_free(name)}


def _completed(there: dict[str, Any], config: Any) -> dict[str, Any]:
    """Settings, perhaps of an earlier version, with the defaults of those that it did not have yet."""

    def fill(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        nested = {name: fill(defaults[name], values[name]) for name in defaults.keys() & values.keys()
                  if isinstance(defaults[name], dict) and isinstance(values[name], dict)}  # fmt: skip
        return defaults | values | nested

    defaults = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = _as_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = _as_json(field.default_factory())
    known = {"environment": {name: getattr(jax.config, name, None) for name in _JAX_FLAGS}}
    return fill(known | defaults, there)


def _as_json(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, tuples as lists, paths as text."""

    def convert(other: Any) -> Any:
        is_instance = dataclasses.is_dataclass(other) and not isinstance(other, type)
        return dataclasses.asdict(other) if is_instance else str(other)

    return json.loads(json.dumps(value, default=convert))


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that is no dict, under its dotted name; of a list, each one of its own."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        yield prefix, values
        return
    for name, value in items:
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _names_model(name: str) -> bool:
    return re.sub(r"\.\d+$", "", name).split(".")[-1] in MODELS


def _commit(value: str) -> str | None:
    """The commit of a model on the Hub; None of any other, or where it cannot be told: who needs it will say so."""
    try:
        return hub.commit(value) if hub.is_name(value) else None
    except InputError:
        return None


def _is_free(name: str) -> bool:
    return bool((FREE | {"contents"}) & set(name.split(".")))
