"""Rows to batches: Grain pipelines that end in numpy-leaved `Tokens`, `Rankings`, `Thumbs`, `Steps` and `Prompts`.

Rows are tokenised once, up front, so that what is kept, truncated and refused is counted before the first step. They
may be more than memory holds: `recipes` says what becomes of some of them, `shards` keeps it on disk. From then on a
batch is a pure function of its number. The rows of an epoch are shuffled globally, otherwise in each epoch, and the
epochs follow one another as one stream that is cut into batches: each row comes exactly once an epoch, and a batch may
hold the end of one epoch and the start of the next. If the number of epochs is given, the last batch is filled up with
empty rows (in `prompts`: with repeated ones, index -1), so that shapes never change.

`batch` counts the rows of the global batch, over all processes. Process p of n holds the p-th of n equal parts of it,
so that the batches of one process are those of many, laid side by side.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np

from rlhf_jax.data import recipes, shards
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.recipes import Row
from rlhf_jax.data.shards import Counts, Item, Shards
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.devices import ragged
from rlhf_jax.types import InputError, Prompts, Rankings, Steps, Thumbs, Tokens, Virtue

T = TypeVar("T")
Shares = Callable[[int, int, int], bool]  # as `Compute.shares`


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows are cut into batches."""

    batch: int  # rows, over all processes
    seed: int | None  # of the order; None: not shuffled
    epochs: int | None  # None: without end


@dataclasses.dataclass(frozen=True)
class Ready(Generic[T]):
    """Rows that are tokenised, and how to fill a batch with some of them."""

    rows: int
    # (numbers of rows [B] int, and a width if there are `widths`) -> their batch; the number -1 is an empty row.
    fill: Callable[..., T]
    counts: Counts
    # (numbers of rows [B]) -> their sizes [B] int: rows of like size share a batch, which is as wide as need be.
    sizes: Callable[[np.ndarray], np.ndarray] | None = None
    widths: Sequence[int] = ()  # ascending, for `fill` to be told the least that is enough


@dataclasses.dataclass(frozen=True)
class Batches(Generic[T]):
    """A stream of batches. `iter` starts it anew; Grain's iterators have get_state and set_state for checkpoints."""

    kind: str
    ready: Ready[T]
    cut: Cut
    process: tuple[int, int] | None = None  # whose part of each batch: index and count; None: this process's

    def __iter__(self) -> grain.DatasetIterator:
        index, count = self._process()
        ready, batch = self.ready, self.cut.batch

        def part(numbers: np.ndarray) -> T:
            whole = np.pad(numbers, (0, batch - len(numbers)), constant_values=-1)
            here = whole.reshape(count, -1)[index]
            if ready.sizes is None:
                return ready.fill(here)
            return ready.fill(here, ready.widths[np.searchsorted(ready.widths, ready.sizes(numbers).max())])

        # One thread prepares the next batches while the step runs.
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(self._numbers().map(part).to_iter_dataset(reading))

    def part(self, index: int, count: int) -> "Batches[T]":
        """The same stream with the part of each batch that is process `index`'s of `count`; (0, 1) has it whole."""
        other = dataclasses.replace(self, process=(index, count))
        other._process()
        return other

    @property
    def counts(self) -> Counts:
        """How many rows of the source were kept and refused."""
        return self.ready.counts

    @property
    def rows(self) -> int:
        """The rows of the batches' first axis, an epoch."""
        return self.ready.rows

    @property
    def steps(self) -> int:
        """The number of batches; ValueError if they never end."""
        if self.cut.epochs is None:
            raise ValueError("batches without a number of epochs never end")
        return len(self._numbers())

    def _process(self) -> tuple[int, int]:
        """The index and count of the processes; InputError if a batch does not divide over them."""
        index, count = self.process or (jax.process_index(), jax.process_count())
        if self.cut.batch % count:
            raise InputError(f"{self.kind}: a batch of {self.cut.batch} does not divide over {count} processes")
        return index, count

    def _numbers(self) -> grain.MapDataset:
        """The numbers of each batch's rows."""
        numbers = grain.MapDataset.range(self.rows)
        if self.cut.seed is not None:
            numbers = numbers.seed(self.cut.seed).shuffle()
        numbers = numbers.repeat(self.cut.epochs)
        if self.ready.sizes is not None and self.cut.seed is not None:
            numbers = _alike(numbers, self.ready, self.cut.batch, self.cut.seed)
        return numbers.batch(self.cut.batch)


def text(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int | None,
    epochs: int | None = None,
) -> Batches[Tokens]:
    """Documents, each ended by EOS, packed into rows of `length` without leaking into one another.

    A longer document goes on in further segments. All tokens are targets but the first of each segment. Without a seed
    the rows are not shuffled, and may be fewer than a batch: for evaluation.
    """
    kept = shards.prepare(source, recipes.text(tokenizer, length), tokenizer, length)
    return _stream("text", _packed(kept, length, tokenizer), Cut(batch, seed, epochs))


def demonstrations(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int | None,
    epochs: int | None = None,
    completion_only: bool = True,
    pack: bool = True,
) -> Batches[Tokens]:
    """Prompts with what should follow, packed into rows of `length` without leaking, or one a row.

    The targets are the tokens of the completion or, of `messages`, of each of the assistant's turns, EOS included;
    without `completion_only`, all tokens but the first. A message of weight 0 has no targets. What is too long, of a
    dialogue its last turns, is cut on the right, and refused if nothing to learn is left. A row without a prompt or a
    completion is refused as empty. `seed` is as in `text`.
    """
    recipe = recipes.demonstrations(source, tokenizer, length, completion_only, pack)
    kept = shards.prepare(source, recipe, tokenizer, length)
    return _stream("demonstrations", _packed(kept, length, tokenizer), Cut(batch, seed, epochs))


def listing(batch: Tokens, tokenizer: Tokenizer) -> str:
    """The tokens of a batch, one a line: a star if it counts in the loss, its id, its spelling in the vocabulary."""
    real = batch.segment > 0
    ids = batch.tokens[real].tolist()
    rows = zip(batch.target[real], ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return "\n".join(f"{'*' if counts else ' '} {i:>6}  {token}" for counts, i, token in rows)


def rankings(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int | None,
    epochs: int | None = None,
    virtue: Virtue | None = None,
    shares: Shares | None = None,
) -> Batches[Rankings]:
    """Prompts with their ranked responses, each a sequence padded on the right to `length`.

    Where `shares` says so of the most tokens of a prompt and of a response, and of K, all responses start in one column
    instead: prompts are padded on the left, to the longest, so that networks read them once (`Rankings.prefix`).

    With `virtue` the ranks are by the ratings of this virtue, and `Rankings.harmful` says which responses are rated
    below the middle. Raises InputError, which names the row, for one without them.

    K is the most responses of any row of the source. Absent responses have rank -1 and an empty mask. A row is refused
    if its prompt is empty; if one of its sequences is longer than `length`, even after the dialogue's oldest turns are
    left out; and if it does not order any two responses that differ.

    Where it orders some that differ and some that do not, it is kept as it is, and counted: two identical responses
    have one score, so that their pair's two gradients cancel, whereas to leave one out, or to tie them, would change
    what the row says of them and the others. A response that is not `ended` is read at its last token.
    """
    kept = shards.prepare(source, recipes.rankings(source, tokenizer, length, virtue), tokenizer, length)
    k_max, prompt, answer = kept.most or (2, 0, 0)
    if not kept.counts.kept and kept.counts.identical + kept.counts.tied:
        raise InputError(
            "rankings: no row has two responses of different rank that differ, so there is nothing to learn;"
            f" {kept.counts}"
        )
    pad = tokenizer_lib.pad_id(tokenizer)
    prefix = prompt if shares is not None and shares(prompt, answer, k_max) else 0

    def fill(index: np.ndarray) -> Rankings:
        shape = (len(index), k_max, prompt + answer if prefix else length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        rank, start = np.full(shape[:2], -1, np.int32), np.full(len(index), prefix, np.int32)
        harmful = None if virtue is None else np.zeros(shape[:2], bool)
        for b, item in _items(kept, index):
            asked, *answers = item.ids
            start[b] = prefix or len(asked)
            rank[b, : len(answers)] = item.numbers[: len(answers)]
            if harmful is not None:
                harmful[b, : len(answers)] = item.numbers[len(answers) :]
            first = start[b] - len(asked)
            for k, end in enumerate(answers):
                ids = np.append(asked, end)
                tokens[b, k, first : first + len(ids)] = ids
                mask[b, k, first : first + len(ids)] = True
        return Rankings(tokens=tokens, mask=mask, start=start, rank=rank, harmful=harmful, prefix=prefix)

    return _stream("rankings", Ready(kept.rows, fill, kept.counts), Cut(batch, seed, epochs))


def thumbs(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
) -> Batches[Thumbs]:
    """Responses with their labels, each a sequence padded on the right to `length`; longer ones are refused.

    Beside it stands its prompt with the response of the next row of the source, cut where it is too long.
    """
    kept = shards.prepare(source, recipes.thumbs(source, tokenizer, length), tokenizer, length)
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Thumbs:
        shape = (len(index), 2, length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        start, good = np.zeros(len(index), np.int32), np.zeros(len(index), bool)
        others = kept.read((index[index >= 0] + 1) % kept.rows)
        for (b, item), other in zip(_items(kept, index), others, strict=True):
            asked, end = item.ids
            start[b], (good[b],) = len(asked), item.numbers
            for which, answer in enumerate((end, other.ids[1])):
                ids = np.append(asked, answer)[:length]
                tokens[b, which, : len(ids)] = ids
                mask[b, which, : len(ids)] = True
        return Thumbs(tokens=tokens, mask=mask, start=start, good=good)

    return _stream("thumbs", Ready(kept.rows, fill, kept.counts), Cut(batch, seed, epochs))


def steps(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
) -> Batches[Steps]:
    """Solutions with a label for each step, padded on the right to `length`; longer ones are refused.

    Each step is on a line of its own: new lines within it become spaces. See `steps` for where it is read.
    """
    kept = shards.prepare(source, recipes.steps(source, tokenizer, length), tokenizer, length)
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Steps:
        shape = (len(index), length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        step, label = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for b, item in _items(kept, index):
            ids, (where, labels) = np.concatenate(item.ids), np.reshape(item.numbers, (2, -1))
            tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
            where = len(item.ids[0]) + where
            step[b, where], label[b, where] = True, labels
        return Steps(tokens=tokens, mask=mask, step=step, label=label)

    return _stream("steps", Ready(kept.rows, fill, kept.counts), Cut(batch, seed, epochs))


def prompts(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    widths: int = 1,
) -> Batches[Prompts]:
    """Prompts padded on the left to `length`; empty and longer ones are refused. `index` is the row of the source.

    Of a dialogue that is too long the last turns are the prompt; it is refused if the user's last does not fit.
    With more than one of `widths`, prompts of like length share a batch, which is padded to the least that is enough
    of so many equal steps up to `length`.
    """
    kept = shards.prepare(source, recipes.prompts(source, tokenizer, length), tokenizer, length)
    fill = functools.partial(_prompts, kept.read, tokenizer_lib.pad_id(tokenizer))
    if widths > 1:
        sizes = lambda index: np.array([len(item.ids[0]) for item in kept.read(index)])
        ready = Ready(kept.rows, fill, kept.counts, sizes, ragged.widths(length, widths))
    else:
        ready = Ready(kept.rows, functools.partial(fill, width=length), kept.counts)
    return _stream("prompts", ready, Cut(batch, seed, epochs))


def every_prompt(source: Iterable[Row], tokenizer: Tokenizer, *, length: int) -> tuple[Prompts, Counts]:
    """All usable prompts at once, in the order of the source. Raises InputError when there are none."""
    made = recipes.prompts(source, tokenizer, length).make(list(source), 0)
    if not made.items:
        raise InputError(f"prompts: none can be used, with up to {length} tokens; {made.counts}")
    read = lambda index: [made.items[n] for n in index]
    return _prompts(read, tokenizer_lib.pad_id(tokenizer), np.arange(len(made.items)), length), made.counts


def _prompts(read: Callable[[np.ndarray], list[Item]], pad: int, index: np.ndarray, width: int) -> Prompts:
    """The prompts of these numbers. A row to fill up with is a real prompt: a policy has nothing to say after none."""
    shape = (len(index), width)
    tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
    row = np.full(len(index), -1, np.int32)
    for b, item in enumerate(read(np.maximum(index, 0))):
        (ids,) = item.ids
        tokens[b, width - len(ids) :] = ids
        mask[b, width - len(ids) :] = True
        if index[b] >= 0:
            (row[b],) = item.numbers
    return Prompts(tokens=tokens, mask=mask, index=row)


def _items(kept: Shards, index: np.ndarray) -> Iterator[tuple[int, Item]]:
    """Yield each place of a batch that has a row, with the row; -1 is the number of none."""
    places = np.flatnonzero(index >= 0)
    yield from zip(places.tolist(), kept.read(index[places]), strict=True)


def _packed(kept: Shards, length: int, tokenizer: Tokenizer) -> Ready[Tokens]:
    """The rows of shards, ready for batches."""
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Tokens:
        rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in index]
        for b, item in _items(kept, index):
            rows[b] = item.segments
        return lay_out(rows, length, pad)

    return Ready(kept.rows, fill, kept.counts)


def lay_out(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], length: int, pad: int) -> Tokens:
    """Rows of sequences and of their targets, one behind another, as segments that do not see each other."""
    shape = (len(rows), length)
    tokens, segment = np.full(shape, pad, np.int32), np.zeros(shape, np.int32)
    target = np.zeros(shape, bool)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, counts) in enumerate(row, start=1):
            end = start + len(ids)
            tokens[b, start:end] = ids
            segment[b, start:end] = number
            target[b, start + 1 : end] = counts[1:]  # nothing of its own precedes the first token
            start = end
    return Tokens(tokens=tokens, segment=segment, target=target)


WINDOW = 8  # batches among which rows are exchanged


def _alike(numbers: grain.MapDataset, ready: Ready, batch: int, seed: int) -> grain.MapDataset:
    """The same stream, in which WINDOW batches of an epoch at a time deal out their rows to each other by size.

    Their order is of chance, so that sizes do not rise. No row comes before its epoch begins, or after it ends.
    """
    rows, span, sizes = ready.rows, WINDOW * batch, ready.sizes
    assert sizes is not None

    @functools.lru_cache(maxsize=2)
    def window(first: int) -> np.ndarray:
        here = np.array([numbers[n] for n in range(first, first + min(span, rows - first % rows))])
        here = here[np.argsort(sizes(here), kind="stable")]
        whole = len(here) - len(here) % batch
        parts = np.random.default_rng((seed, first)).permutation(here[:whole].reshape(-1, batch))
        return np.append(parts, here[whole:])

    def dealt(index: int, _: Any) -> Any:
        place = index % rows % span
        return window(index - place)[place]

    return numbers.map_with_index(dealt)


def _stream(kind: str, ready: Ready[T], cut: Cut) -> Batches[T]:
    """The batches of rows; InputError if there are fewer than one has, or for evaluation none at all."""
    if cut.seed is None and not ready.rows:
        raise InputError(f"held-out {kind}: none can be used; {ready.counts}")
    if cut.seed is not None and ready.rows < cut.batch:
        raise InputError(f"{kind}: {ready.rows} usable rows are fewer than a batch of {cut.batch}; {ready.counts}")
    return Batches(kind, ready, cut)


def take(stream: Iterator[T], count: int) -> T:
    """The next `count` batches of a stream, stacked on a leading axis."""
    return stack(next(stream) for _ in range(count))


def stack(batches: Iterable[T]) -> T:
    """All batches of a stream that ends, stacked on a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
