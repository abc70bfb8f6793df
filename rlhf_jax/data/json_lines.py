"""Text files line by line, compressed or not, and the JSON in them; an error names the file, the line and the field."""

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.rows import Row, short
from rlhf_jax.types import InputError


def _plain(path: Path) -> Any:
    return path.open("rb")


def _gzipped(path: Path) -> Any:
    return gzip.open(path, "rb")


def _zstandard(path: Path) -> Any:
    import pyarrow  # takes a tenth of a second

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPEN: dict[str, Callable[[Path], Any]] = {".gz": _gzipped, ".zst": _zstandard}  # each to a binary file
COMPRESSED = tuple(_OPEN)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file that may be compressed, as its name tells: .gz or .zst."""
    with _OPEN.get(path.suffix, _plain)(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}, line {number + 1}: cannot be read ({error})") from error
            if not line:
                return
            number += 1
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: expected UTF-8, got byte {line[error.start]:#x}") from error


class _Flaw(NamedTuple):
    """An invalid field of a JSON object, and why it is invalid. JSON has no tuples, so that no value looks like one."""

    field: str
    what: str


def _object(pairs: list[tuple[str, Any]]) -> Row | _Flaw:
    """The object with these fields, or its first invalid field."""
    row: Row = {}
    for name, value in pairs:
        shown = name if name.isidentifier() else short(name)
        if name in row:
            return _Flaw(shown, "given twice")
        if flaw := _flaw(value):
            return _Flaw(f"{shown}{flaw.field}", flaw.what)
        row[name] = value
    return row


def _flaw(value: Any) -> _Flaw | None:
    """The first invalid field within a value, as it continues the name of the field that holds the value."""
    if isinstance(value, _Flaw):
        return _Flaw(f", field {value.field}", value.what)
    if isinstance(value, float) and not math.isfinite(value):
        return _Flaw("", f"expected a finite number, got {value}")
    if isinstance(value, list):
        flaws = ((n, _flaw(one)) for n, one in enumerate(value))
        return next((_Flaw(f"[{n}]{flaw.field}", flaw.what) for n, flaw in flaws if flaw), None)
    return None


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object
)  # `json.loads` would make one for each line, in as much time again


def checked(value: Any, where: str) -> Any:
    """Return the value; raise InputError if a field in it is invalid."""
    if flaw := _flaw(value):
        raise InputError(f"{where}{flaw.field if flaw.field.startswith(', ') else ''}: {flaw.what}")
    return value


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's value, or each element of the list that a .json file may hold, with where it stands."""
    lines = numbered_lines(path)
    if uncompressed(path).endswith(".json"):
        text = "".join(line for _, line in lines)
        if text.lstrip().startswith("["):
            try:
                values = _DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                line = getattr(error, "lineno", 1)
                raise InputError(f"{path}, line {line}: expected a list in JSON ({short(str(error))})") from error
            for n, value in enumerate(values, start=1):
                yield f"{path}, row {n}", checked(value, f"{path}, row {n}")
            return
        lines = enumerate(text.split("\n"), start=1)
    yield from values_of_lines(path, lines)


def values_of_lines(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    """Yield the value of each numbered line that is not empty, with where it stands."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: expected a JSON object, got {short(line.strip())}") from error
        yield f"{path}, line {number}", checked(value, f"{path}, line {number}")


def uncompressed(path: Path) -> str:
    """The name of a file without the ending that tells of its compression."""
    return path.stem if path.suffix in COMPRESSED else path.name
