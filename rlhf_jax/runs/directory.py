"""Run directories: what each was made with, and whether a command that is run again may go on there.

`config.json` holds the configuration, and under `contents` a fingerprint of each model directory and file that it
names, so that a run does not go on from a model, or with data, that was made anew in the meantime. Settings that change
nothing of what is learnt may differ: `FREE`.
"""

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.devices import hosts
from rlhf_jax.runs import checkpoint, gcs
from rlhf_jax.types import InputError

FREE = {
    "out",
    "data_dir",
    "wandb",
    "profile",
    "samples",
    "samples_every",
    "saves",
    "docs",
    "devices",
}  # names of settings
CHECKPOINTS = gcs.CHECKPOINTS  # below the run directory; they may be deleted when it is done
_EDGE = 2**20  # bytes read at either end of a file, for its fingerprint


def settings(config: Any) -> dict[str, Any]:
    """The dataclass `config` as JSON has it, with `contents`, the fingerprint of each path there that exists.

    What is in a bucket has its name there.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    free = {value for name, value in _flat(plain) if _is_free(name)}
    paths = sorted({value for name, value in _flat(plain) if isinstance(value, str) and value not in free})
    contents = {path: mark for path in paths if (mark := _fingerprint(Path(path)))}
    found = plain | ({"contents": contents} if contents else {})
    return json.loads(gcs.named(json.dumps(found, ensure_ascii=False)))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs in two `settings`, `name: this there, that here` each.

    Paths are the same if their contents are, wherever they lie; where either is gone, if their names are.
    """

    def said(value: Any, mark: str) -> str:
        return f"{value} ({mark})" if mark else str(value)

    (old, old_marks), (new, new_marks) = (
        ({name: x for name, x in _flat(values) if not _is_free(name)}, values.get("contents", {}))
        for values in (there, here)
    )
    found = []
    for name in sorted(old | new):
        a, b = old.get(name, "absent"), new.get(name, "absent")
        marks = old_marks.get(str(a), ""), new_marks.get(str(b), "")
        if (marks[0] != marks[1]) if all(marks) else (a != b):
            found.append(f"{name}: {said(a, marks[0])} there, {said(b, marks[1])} here")
    return found


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Makes an InputError of an error in writing there; a full disk, which the flags are no cause of, stays one."""
    try:
        yield
    except OSError as error:
        if checkpoint.disk_is_full(error):
            raise
        raise InputError(f"records cannot be written to {directory}: {error.strerror}") from error


def write(path: Path, text: str) -> None:
    """Writes a file, with the folder that it is in. It appears whole, or its former content stays.

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
    """Writes the `settings` of the dataclass `config` to the run directory's config.json."""
    write(directory / "config.json", json.dumps(settings(config), indent=2) + "\n")


def claim(directory: Path, config: Any) -> None:
    """Raises InputError unless a run of `config` may go on, or begin, in `directory`.

    It may not where checkpoints of another configuration are, unless `config.saves.resume` says otherwise, nor where it
    cannot write. Call it first, before anything is written there.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise InputError(f"records cannot be written to {directory}: it is read-only")
    if config.saves.resume != "same" or not checkpoint.steps(directory / CHECKPOINTS):
        return
    try:
        there = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory} has checkpoints but no config.json to tell of what: --saves.resume changed goes on from them,"
            " --saves.resume never starts over"
        ) from error
    _refuse(directory, there, settings(config), "--saves.resume changed goes on with these, never starts over")


def once(main: Callable[[Any], Any], config: Any, out: Path | None = None) -> Any:
    """What `main(config)` returns if that is a dict, else None; from `out`, by default `config.out`, if it is done.

    Done is what has a done.json, and all that was in `out` when that was written. Raises InputError where other
    settings made it.
    """
    out = out or config.out
    done, now = out / "done.json", settings(config)
    saves = getattr(config, "saves", None)
    if done.is_file() and (saves is None or saves.resume == "same"):
        found = json.loads(done.read_text())
        _refuse(out, found["settings"], now, "name another --out, or delete it")
        if all((out / name).exists() for name in found["files"]):
            print(gcs.named(f"{out} is done"), flush=True)
            return found["result"]
    print(gcs.named(f"\n== {out}"), flush=True)
    done.unlink(missing_ok=True)
    result = main(config)
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(path.name for path in out.iterdir() if path.name != CHECKPOINTS and not path.name.startswith("."))
    gcs.push()  # before it says that they are there
    record = {"settings": now, "files": files, "result": result if isinstance(result, dict) else None}
    write(done, json.dumps(record) + "\n")
    return record["result"]


def _refuse(directory: Path, there: dict[str, Any], here: dict[str, Any], advice: str) -> None:
    if differing := differences(there, here):
        raise InputError(f"{directory} was made with other settings ({'; '.join(differing)}): {advice}")


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that is no dict, under its dotted name; of a list, each one of its own."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        yield prefix, values
        return
    for name, value in items:
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _is_free(name: str) -> bool:
    return bool((FREE | {"contents"}) & set(name.split(".")))


def _fingerprint(path: Path) -> str:
    """Of a file, or of the weights of a model directory; empty of anything else. It reads the ends of each file."""
    files = sorted(path.glob("*.safetensors")) if os.path.isdir(path) else [path] if os.path.isfile(path) else []
    mark = 0
    for one in files:
        with one.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for at in (0, max(size - _EDGE, 0)):
                file.seek(at)
                mark = zlib.crc32(file.read(_EDGE), mark)
            mark = zlib.crc32(str(size).encode(), mark)
    return f"{mark:08x}" if files else ""
