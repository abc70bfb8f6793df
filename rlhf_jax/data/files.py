"""Files of rows, by the endings of their names, and several of them by a pattern.

    .jsonl                  an object a line
    .json                   the same, or one list
    .csv, .tsv              a table of texts, whose first line has the names of the columns
    .txt                    documents that lines `<|endoftext|>` (or, where there is none, empty lines) separate
    .parquet                a table, read by row groups
    .arrow, .feather        a table in Arrow's file or stream format, read by record batches

All but the tables of the last two lines may be compressed: .gz or .zst. In a table of Parquet or Arrow, a cell without
a value is a field that the row does not have; bytes are read as UTF-8; what JSON has no type for is read as text.

A pattern, such as "data/*.parquet" or "data/**/*.jsonl", names all the files that fit it, in the order of their names.
Tables of one pattern have the same columns, in whatever order.
"""

import csv
import dataclasses
import datetime
import decimal
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data import builders, json_lines
from rlhf_jax.data.rows import short
from rlhf_jax.data.tokenizer import EOS
from rlhf_jax.types import InputError

Values = Iterator[tuple[str, Any]]  # with where each stands

_PATTERN = re.compile(r"[*?\[]")
_AT_ONCE = 1024  # rows of a table that are in memory as Python objects
_LONGEST = 2**24  # characters of a cell in .csv; a quotation mark that nothing closes is found by then


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where rows come from, before it is known what they are."""

    title: str  # as errors and counts name it
    digest: str  # of its content
    values: Callable[[], Values]
    paths: tuple[Path, ...] = ()  # if it is files
    store: Path = Path()  # below the data directory, what is prepared of it


def is_named(spec: str) -> bool:
    """Whether a name ends as that of a file of rows does."""
    return spec.endswith(ENDINGS)


def find(spec: str) -> Origin:
    """The file or files that a path or pattern names; InputError where there is none."""
    path = builders.file_path(spec)
    if not _PATTERN.search(spec) or os.path.exists(path):
        return Origin(str(path), builders.file_digest(path), lambda: values(path), (path,))
    paths = tuple(builders.file_path(name) for name in sorted(glob.glob(spec, recursive=True)) if Path(name).is_file())
    if not paths:
        raise InputError(f"data {spec!r}: no file has such a name")
    digest = hashlib.sha256(" ".join(map(builders.file_digest, paths)).encode()).hexdigest()[:24]
    return Origin(f"data {spec!r}", digest, lambda: _all_values(paths), paths)


def values(path: Path) -> Values:
    """Yield the row of each line, or of each row of the table."""
    return _container(path).values(path)


def _all_values(paths: Iterable[Path]) -> Values:
    first: tuple[Path, list[str]] | None = None
    for path in paths:
        columns = _container(path).columns(path)
        if columns is not None:
            first = first or (path, columns)
            if differing := sorted({*columns} ^ {*first[1]}):
                raise InputError(
                    f"{path}: expected the columns of {first[0]}, {short(first[1])}, as in all files of one pattern;"
                    f" got {short(columns)}, which differ in {short(differing)}"
                )
        yield from values(path)


# -- texts -------------------------------------------------------------------------------------------------------------


def documents(path: Path) -> Values:
    """Yield the documents of a file of text."""
    marked = any(EOS in line for _, line in json_lines.numbered_lines(path))
    documents = filter(None, map(str.strip, _between(path, marked)))
    for n, document in enumerate(documents, start=1):
        yield f"{path}, document {n}", {"text": document}


def _between(path: Path, marked: bool) -> Iterator[str]:
    """Yield what is between marks, or between lines without text, one piece of the file in memory at a time."""
    piece: list[str] = []
    for _, line in json_lines.numbered_lines(path):
        if marked:
            first, *others = line.split(EOS)
        else:
            first, others = line, [] if line.strip() else [""]
        piece.append(first)
        for other in others:
            yield "".join(piece)
            piece = [other]
    yield "".join(piece)


def lines(path: Path) -> Values:
    """Yield the fields of each line that is not empty, between tabs, of a table that does not name them."""
    for number, line in json_lines.numbered_lines(path):
        if line.strip():
            yield f"{path}, line {number}", line.rstrip("\r\n").split("\t")


def _commas(path: Path) -> Values:
    return cells((line for _, line in json_lines.numbered_lines(path)), ",", str(path))


def _tabs(path: Path) -> Values:
    return cells((line for _, line in json_lines.numbered_lines(path)), "\t", str(path))


def cells(text: Iterable[str], separator: str, title: str) -> Values:
    """Yield the rows of a table in CSV, quoted as in RFC 4180; errors and places begin with `title`."""
    csv.field_size_limit(_LONGEST)
    table = csv.reader(text, delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        where = f"{title}, line {table.line_num + 1}"
        try:
            row = next(table, None)
        except csv.Error as error:
            raise InputError(f"{where}: expected a row of a table, quoted as in RFC 4180 ({error})") from error
        if row is None:
            return
        if names is None:
            names = row
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"{where}: expected columns of different names, got {short(twice)} more than once")
        elif row:
            if len(row) != len(names):
                raise InputError(f"{where}: expected {len(names)} fields, as in the first line, got {len(row)}")
            yield where, dict(zip(names, row, strict=True))


def _header(path: Path) -> list[str]:
    separator = "\t" if json_lines.uncompressed(path).endswith(".tsv") else ","
    text = (line for _, line in json_lines.numbered_lines(path))
    try:
        return next(csv.reader(text, delimiter=separator), [])
    except csv.Error as error:
        raise InputError(f"{path}, line 1: expected the names of the columns ({error})") from error


# -- tables of Parquet and Arrow ---------------------------------------------------------------------------------------


def _parquet(path: Path) -> Values:
    return batches_values(lambda: _parquet_batches(path), str(path))


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(_AT_ONCE, row_groups=[group], use_threads=False)


def _parquet_columns(path: Path) -> list[str]:
    from pyarrow import parquet

    return _reading(lambda: parquet.read_schema(path).names, str(path))


def _arrow(path: Path) -> Values:
    return batches_values(lambda: _arrow_batches(path), str(path))


def _arrow_batches(path: Path) -> Iterator[Any]:
    with _ArrowFile(path) as file:
        for batch in file:
            for start in range(0, len(batch), _AT_ONCE):
                yield batch.slice(start, _AT_ONCE)


def _arrow_columns(path: Path) -> list[str]:
    def names() -> list[str]:
        with _ArrowFile(path) as file:
            return file.schema.names

    return _reading(names, str(path))


class _ArrowFile:
    """An Arrow file in either of its formats: its schema, and its record batches one after another."""

    def __init__(self, path: Path):
        import pyarrow

        self._map = pyarrow.memory_map(str(path))
        self._is_file = self._map.read(6) == b"ARROW1"
        self._map.seek(0)
        ipc = pyarrow.ipc
        self._file = ipc.open_file(self._map) if self._is_file else ipc.open_stream(self._map)
        self.schema = self._file.schema

    def __enter__(self) -> "_ArrowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def __iter__(self) -> Iterator[Any]:
        if self._is_file:
            return map(self._file.get_batch, range(self._file.num_record_batches))
        return iter(self._file)


def batches_values(open_batches: Callable[[], Iterator[Any]], title: str) -> Values:
    """Yield the rows of Arrow's record batches; errors and places begin with `title`."""
    number = 0
    batches = _reading(open_batches, title)
    while True:
        where = f"{title}, from row {number + 1} on"
        batch = _reading(lambda: next(batches, None), where)
        if batch is None:
            return
        for row in _reading(batch.to_pylist, where):
            number += 1
            yield f"{title}, row {number}", json_lines.checked(_plain(row), f"{title}, row {number}")


def _reading(read: Callable[[], Any], where: str) -> Any:
    """The result of `read`; InputError where the file is broken, for which Arrow has errors of many types."""
    try:
        return read()
    except (OSError, ValueError, TypeError, NotImplementedError, ArithmeticError, KeyError, MemoryError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise InputError(f"{where}: cannot be read ({type(error).__name__}: {cause[:200]})") from error


def _plain(value: Any) -> Any:
    """A cell of a table as JSON would have it; an object lacks what has no value."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


# -- endings -----------------------------------------------------------------------------------------------------------


def _none(path: Path) -> None:
    """No columns: the rows of such a file say themselves what fields they have."""


class _Container(NamedTuple):
    """How a file is read, and the names of its columns, if it has them."""

    values: Callable[[Path], Values]
    columns: Callable[[Path], list[str] | None]


_TEXTS = {
    ".jsonl": _Container(json_lines.json_values, _none),
    ".json": _Container(json_lines.json_values, _none),
    ".csv": _Container(_commas, _header),
    ".tsv": _Container(_tabs, _header),
    ".txt": _Container(documents, _none),
}
_TABLES = {
    ".parquet": _Container(_parquet, _parquet_columns),
    ".arrow": _Container(_arrow, _arrow_columns),
    ".feather": _Container(_arrow, _arrow_columns),
}
_CONTAINERS = _TEXTS | _TABLES
ENDINGS = (*_CONTAINERS, *(f"{ending}{more}" for ending in _TEXTS for more in json_lines.COMPRESSED))
ENDINGS_TEXT = f"{', '.join(_TEXTS)} (perhaps with {' or '.join(json_lines.COMPRESSED)}), {', '.join(_TABLES)}"


def _container(path: Path) -> _Container:
    container = _CONTAINERS.get(Path(json_lines.uncompressed(path)).suffix)
    if container is None:
        raise InputError(f"{path}: expected a name that ends in {ENDINGS_TEXT}")
    return container
