"""Rows of tokens that may be more than memory holds: made once, in a stream, and kept in ArrayRecord shards on disk.

The rows of a source are read one after another. Each part of them, of PART characters, is tokenised by itself, and
packed best fit decreasing (arXiv:2404.10830) if its recipe says so. It is a shard of its own, so that no process ever
holds more than one part. A row of tokens is then read by its number. Tokens are stored in the smallest unsigned type
that holds the vocabulary, without padding.

What is made of a source is kept beside it, under a name that says what it was made by. A shard appears under its name
when it is complete: after a kill, what is complete is found again, and the rest is made.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import ahead, builders, records
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.devices import hosts, progress

PART = 2**25  # characters of the rows of a source that are packed together
ROWS = 2**19  # at most so many of them
BATCH = 2**22  # characters of the rows that a recipe is given at a time
CHUNK = 4096  # tokens that lie together on disk, about


class Item(NamedTuple):
    """The tokens of one or several sequences, which stay together."""

    ids: Sequence[np.ndarray]
    targets: Sequence[np.ndarray] | None = None  # masks of the ids; None: all are
    numbers: Sequence[int] = ()  # whatever else there is to know, from -2^31 up to below 2^31

    @property
    def segments(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The sequences, each with its mask."""
        targets = [np.ones(len(ids), bool) for ids in self.ids] if self.targets is None else self.targets
        return list(zip(self.ids, targets, strict=True))


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many rows of a source were kept and refused, and why. Printed, it is one line."""

    kept: int = 0  # truncated ones included
    truncated: int = 0
    empty: int = 0
    too_long: int = 0
    identical: int = 0  # rankings in which any two responses of different rank are the same tokens
    tied: int = 0  # rankings of one rank alone
    repeated: int = 0  # kept rankings of which some pair of different rank is the same tokens; another pair is not
    unended: int = 0  # responses in kept rankings that were cut before their end
    unlike: int = 0  # solutions whose steps their tokens do not keep apart
    control_tokens: int = 0  # kept rows that spell control tokens, which are read as such
    # The limit of what is too long, and the place of the first such row: it is for people, so counts equal without it.
    limit: str = dataclasses.field(default="", compare=False)

    @property
    def refused(self) -> int:
        """The number of rows left out."""
        return self.empty + self.too_long + self.identical + self.tied + self.unlike

    def __str__(self) -> str:
        why = f"{self.empty} empty, {self.too_long} too long" + f" for {self.limit}" * (self.too_long > 0)
        why += f", {self.identical} of identical responses" * (self.identical > 0)
        why += f", {self.tied} all tied" * (self.tied > 0)
        why += f", {self.unlike} with steps that tokens do not keep apart" * (self.unlike > 0)
        warnings = {
            "rows rank identical responses differently too": self.repeated,
            "responses without an end": self.unended,
            "rows spell control tokens, which are read as such": self.control_tokens,
        }
        return f"{self.kept} rows kept ({self.truncated} of them truncated), {self.refused} refused ({why})" + "".join(
            f"; {count} {what}" for what, count in warnings.items() if count
        )


def _sum(counts: Iterable[Counts]) -> Counts:
    """The counts of several sources, or parts of one, together."""
    *numbers, limits = zip(*map(dataclasses.astuple, [Counts(), *counts]), strict=True)
    values: list[Any] = [*map(sum, numbers), next(filter(None, limits), "")]
    return Counts(*values)


def _largest(sizes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The largest of each size; empty if there is nothing."""
    return tuple(map(max, zip(*sizes, strict=True)))


class Made(NamedTuple):
    """The items that some rows of a source become, and counts of these rows."""

    items: list[Item]
    counts: Counts
    most: tuple[int, ...] = ()  # sizes of which the largest in the whole source is to be known


class Recipe(NamedTuple):
    """How rows of a source become items."""

    name: str  # of this recipe alone, with its settings but for the vocabulary and the length
    make: Callable[[list[Row], int], Made]  # of some rows, and the number of the first
    pack: bool  # whether items share rows of tokens; each then has one sequence, and no numbers


@dataclasses.dataclass(frozen=True)
class Part:
    """How much a shard was made of, and how much it holds."""

    source: int  # rows
    tokens: int
    rows: int
    counts: Counts
    most: tuple[int, ...]


class Shards:
    """The rows of some shards, read by their numbers."""

    def __init__(self, folder: Path, parts: Sequence[Part], dtype: np.dtype):
        self.folder, self._dtype = folder, dtype
        self.rows, self.tokens = sum(part.rows for part in parts), sum(part.tokens for part in parts)
        self.counts, self.most = _sum(part.counts for part in parts), _largest(part.most for part in parts)
        self._records = records.Records([records.Span(_file(folder, n), 0, part.rows) for n, part in enumerate(parts)])

    def read(self, numbers: np.ndarray) -> list[Item]:
        """The rows of these numbers."""
        return [_item(record, self._dtype) for record in self._records.__getitems__(numbers)]


def prepare(source: Iterable[Row], recipe: Recipe, tokenizer: Tokenizer, length: int) -> Shards:
    """The rows of a source as rows of at most `length` tokens.

    Of several processes the first makes them, and the others find them. Where nothing can be kept beside the source,
    the shards are in a temporary folder, which is deleted with them.
    """
    dtype = np.min_scalar_type(max(tokenizer.get_vocab().values())).newbyteorder("<")
    task = _Task(source, recipe, length, dtype)
    folder = getattr(source, "folder", None)
    if folder is None:
        return _temporary(task)
    folder = folder / f"{recipe.name}-{length}-{tokenizer_lib.fingerprint(tokenizer)}-{_code()}"
    with hosts.first_before_others():
        if (found := _complete(folder, dtype)) is not None:
            return found
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            if builders.disk_is_full(error):
                raise
            print(f"{folder}: {error.strerror}: tokens are not kept for the next start", file=sys.stderr, flush=True)
            return _temporary(task)
        with _alone(folder):
            return _made(task, folder)


def _code() -> str:
    """A hash of the code that rows are made by, which changes more often than anybody remembers to count versions."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("recipes.py", "shards.py", "steps.py", "tokenizer.py"))
    return hashlib.sha256(code).hexdigest()[:12]


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Best fit decreasing: which sequences stand in each row of `length` columns (arXiv:2404.10830).

    The longest come first, each into the fullest row that still has room. Who shares a row is the same in all epochs;
    it matters no more than who shares a batch, as segments do not see each other.
    """
    rows: list[list[int]] = []
    having: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the number of their free columns
    some = 0  # bit n: having[n] is not empty
    for n in np.argsort(-np.array(lengths, int), kind="stable").tolist():
        fitting = some >> lengths[n]
        if fitting:
            free = lengths[n] + (fitting & -fitting).bit_length() - 1
            row = having[free].pop()
            some ^= (not having[free]) << free
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(n)
        free -= lengths[n]
        having[free].append(row)
        some |= 1 << free
    return rows


# -- making them -------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """The source of shards, and how they are made of it."""

    source: Iterable[Row]
    recipe: Recipe
    length: int
    dtype: np.dtype


def _temporary(task: _Task) -> Shards:
    """The shards of a source, in a folder that is deleted when nobody reads them any more."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf_jax-"))
    try:
        shards = _made(task, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(shards, shutil.rmtree, folder, ignore_errors=True)
    return shards


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Run the block while no other process runs it for the same folder; the others wait."""
    with (folder / "lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: whoever is last writes the same once more
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _made(task: _Task, folder: Path) -> Shards:
    """The shards of a source in `folder`: those that are there, and then the missing ones."""
    if (found := _complete(folder, task.dtype)) is not None:  # another process was quicker
        return found
    parts = _first_parts(folder)
    done = sum(part.source for part in parts)
    total = len(task.source) if isinstance(task.source, Sized) else None
    start, tokens = time.monotonic(), 0
    with progress.bar(total, done=done, what="tokenising", unit="row", delay=10.0) as shown:

        def tell(rows: int, new: int) -> None:
            nonlocal tokens
            tokens += new
            shown.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
            shown.update(rows)

        rows = _from(task.source, done)
        try:
            for first in rows:
                part = _some(itertools.chain([first], rows))
                parts.append(_write(task, part, done, _file(folder, len(parts)), tell))
                done += parts[-1].source
            _keep(folder / "complete.json", list(map(_numbers, parts)))
        except Exception as error:
            if builders.disk_is_full(error):
                raise builders.full_disk(folder) from error
            raise
    return Shards(folder, parts, task.dtype)


def _from(source: Iterable[Row], first: int) -> Iterator[Row]:
    """Yield the rows of a source from number `first` on."""
    if isinstance(source, Rows):
        for start in range(first, len(source), 64):  # at a time in memory, however long they are
            yield from source.take(range(start, min(start + 64, len(source))))
    else:
        yield from itertools.islice(source, first, None)


def _some(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of a part; the next part begins with the row behind them."""
    size = 0
    for row in itertools.islice(rows, ROWS):
        yield row
        size += _size(row)
        if size >= PART:
            return


def _size(value: Any) -> int:
    """The characters of the texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _write(task: _Task, rows: Iterator[Row], first: int, file: Path, tell: Callable[[int, int], None]) -> Part:
    """Write the shard of some rows, and return how much it holds; `tell` hears of rows and tokens that are done."""
    to_pack, stored = list[Item](), list[bytes]()
    source, tokens, counts, most = 0, 0, Counts(), list[tuple[int, ...]]()
    for count, made in _items(task.recipe, rows, first):
        if task.recipe.pack:
            to_pack += made.items
        else:
            stored += (_record(one, task.dtype) for one in made.items)
        new = sum(len(ids) for one in made.items for ids in one.ids)
        source, tokens, counts = source + count, tokens + new, _sum([counts, made.counts])
        most.append(made.most)
        tell(count, new)
    stored += (_record(one, task.dtype) for one in _packed(to_pack, task.length))
    partial = file.with_suffix(".partial")
    records.write(partial, stored, group=max(1, CHUNK * len(stored) // max(1, tokens)))
    _place(partial, file)
    part = Part(source, tokens, len(stored), counts, _largest(most))
    _keep(file.with_suffix(".json"), _numbers(part))
    return part


def _packed(items: Sequence[Item], length: int) -> list[Item]:
    """Items of one sequence each, of which several share a row of `length` tokens."""
    rows = pack([len(one.ids[0]) for one in items], length)
    masks = lambda row: [mask for n in row for mask in items[n].targets or ()]
    return [Item([items[n].ids[0] for n in row], masks(row) or None) for row in rows]


def _items(recipe: Recipe, rows: Iterator[Row], first: int) -> Iterator[tuple[int, Made]]:
    """Yield how many rows of the source were read, and what they become, some at a time.

    The tokenizer has threads of its own; it works on the next rows while the caller is at the last ones.
    """

    def numbered() -> Iterator[tuple[list[Row], int]]:
        number = first
        for some in ahead.batches(rows, _size, BATCH):
            yield some, number
            number += len(some)

    yield from ahead.results(lambda batch: (len(batch[0]), recipe.make(*batch)), numbered(), threads=1)


# -- on disk -----------------------------------------------------------------------------------------------------------


def _file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.array_record"


def _record(item: Item, dtype: np.dtype) -> bytes:
    """An item on disk: how many sequences and numbers it has, the sequences' lengths, the numbers, the tokens, and a
    bit for each token unless all are targets."""
    head = np.array([len(item.ids), len(item.numbers), *map(len, item.ids), *item.numbers], "<i4")
    bits = b"" if item.targets is None else np.packbits(np.concatenate(item.targets)).tobytes()
    return b"".join([head.tobytes(), np.concatenate(item.ids).astype(dtype).tobytes(), bits])


def _item(record: bytes, dtype: np.dtype) -> Item:
    """The item that a record holds."""
    count, more = np.frombuffer(record, "<i4", 2).tolist()
    sizes, numbers = np.split(np.frombuffer(record, "<i4", count + more, 8), [count])
    start, total = 4 * (2 + count + more), int(sizes.sum())
    ids = np.frombuffer(record, dtype, total, start)
    bits = np.frombuffer(record, np.uint8, offset=start + ids.nbytes)
    cuts = np.cumsum(sizes[:-1])
    targets = np.split(np.unpackbits(bits, count=total).astype(bool), cuts) if len(bits) else None
    return Item(np.split(ids, cuts), targets, numbers.tolist())


def _complete(folder: Path, dtype: np.dtype) -> Shards | None:
    """The shards of a folder, None unless all of them are there."""
    try:
        parts = json.loads((folder / "complete.json").read_text())
    except OSError:
        return None
    return Shards(folder, list(map(_part, parts)), dtype)


def _first_parts(folder: Path) -> list[Part]:
    """The parts that an interrupted run has finished."""
    parts: list[Part] = []
    while (file := _file(folder, len(parts)).with_suffix(".json")).is_file():
        parts.append(_part(json.loads(file.read_text())))
    return parts


def _numbers(part: Part) -> list[Any]:
    """A part as JSON holds it."""
    return [part.source, part.tokens, part.rows, *part.most, *dataclasses.astuple(part.counts)]


def _part(numbers: list[Any]) -> Part:
    """The inverse of `_numbers`."""
    source, tokens, rows, *others = numbers
    cut = len(others) - len(dataclasses.fields(Counts))
    return Part(source, tokens, rows, Counts(*others[cut:]), tuple(others[:cut]))


def _keep(file: Path, value: Any) -> None:
    """Write a JSON file, which appears whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    _place(partial, file)


def _place(partial: Path, file: Path) -> None:
    """Give a file its name, once it is on the disk."""
    with partial.open("rb") as opened:
        os.fsync(opened.fileno())
    os.replace(partial, file)
