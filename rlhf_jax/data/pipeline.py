"""Rows to batches: Grain pipelines that end in numpy-leaved `Tokens`, `Rankings` and `Prompts`.

Rows are tokenised once, up front, so that what is kept, truncated and refused is counted before the first step. From
then on a batch is a pure function of its number. The rows of an epoch are shuffled globally, otherwise in each epoch,
and the epochs follow one another as one stream that is cut into batches: each row comes exactly once an epoch, and a
batch may hold the end of one epoch and the start of the next. If the number of epochs is given, the last batch is
filled up with empty rows (in `prompts`: with repeated ones, index -1), so that shapes never change.

A dialogue, messages and what follows them, that exceeds `length` loses its oldest turns. It then begins with a user's
turn, after a leading system message if it has one, and counts as truncated. Text is never cut on the left.

`batch` counts the rows of the global batch, over all processes. Process p of n holds the p-th of n equal parts of it,
so that the batches of one process are those of many, laid side by side.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np

from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.devices import ragged
from rlhf_jax.types import InputError, Prompts, Rankings, Tokens

T = TypeVar("T")
Row = dict[str, Any]  # as `sources.rows` returns them


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the rows of a source. Printed, it is one line."""

    kept: int  # truncated ones included
    truncated: int = 0
    empty: int = 0
    too_long: int = 0

    @property
    def refused(self) -> int:
        """Rows left out."""
        return self.empty + self.too_long

    def __str__(self) -> str:
        return (
            f"{self.kept} rows kept ({self.truncated} of them truncated),"
            f" {self.refused} refused ({self.empty} empty, {self.too_long} too long)"
        )


@dataclasses.dataclass(frozen=True)
class Batches(Generic[T]):
    """A stream of batches. `iter` starts it anew; Grain's iterators have get_state and set_state for checkpoints."""

    dataset: grain.IterDataset
    counts: Counts
    rows: int  # of the batches' first axis, an epoch
    total: int | None  # number of batches; None if they never end

    def __iter__(self) -> grain.DatasetIterator:
        return iter(self.dataset)

    @property
    def steps(self) -> int:
        """Number of batches; ValueError if they never end."""
        if self.total is None:
            raise ValueError("batches without a number of epochs never end")
        return self.total


def text(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches[Tokens]:
    """Documents, each ended by EOS, packed into rows of `length` without leaking into one another.

    A longer document goes on in further segments. All tokens are targets but the first of each segment.
    """
    ids, lengths = _documents(source, tokenizer)
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    ended = [(end - size, end) for end, size in zip(ends, lengths.tolist(), strict=True) if size > 1]
    pieces = [ids[at : min(at + length, end)] for start, end in ended for at in range(start, end, length)]
    targets = [np.ones(len(ids), bool) for ids in pieces]
    fill = _packed(pieces, targets, _pack([len(ids) for ids in pieces], length), length, tokenizer)
    counts = Counts(len(ended), empty=len(lengths) - len(ended))
    return _stream("text", *fill, counts, batch, seed, epochs, process_index, process_count)


def demonstrations(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    completion_only: bool = True,
    pack: bool = True,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches[Tokens]:
    """Prompts with what should follow, packed into rows of `length` without leaking, or one a row.

    The targets are the tokens of the completion or, of `messages`, of each of the assistant's turns, EOS included;
    without `completion_only`, all tokens but the first. What is too long, of a dialogue its last turns, is cut on the
    right, and refused if nothing to learn is left. A row without a prompt or a completion is refused as empty.
    """
    rows = list(source)
    usable = [row for row in rows if not _lacks_text(row)]
    sequences, targets, truncated = [], [], 0
    rendered, shortened = _shortened(
        usable, lambda some: list(_demonstrations(some, tokenizer)), lambda one: len(one[0]), length
    )
    for n, (ids, learn) in enumerate(rendered):
        if learn[:length].any():
            sequences.append(ids[:length])
            targets.append(learn[:length] if completion_only else np.ones(len(ids[:length]), bool))
            truncated += n in shortened or len(ids) > length
    lengths = [len(ids) for ids in sequences]
    plan = _pack(lengths, length) if pack else [[n] for n in range(len(sequences))]
    fill = _packed(sequences, targets, plan, length, tokenizer)
    counts = Counts(len(sequences), truncated, len(rows) - len(usable), len(usable) - len(sequences))
    return _stream("demonstrations", *fill, counts, batch, seed, epochs, process_index, process_count)


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
    responses: int | None = None,
    batch: int,
    seed: int,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches[Rankings]:
    """Prompts with their ranked responses, each a sequence padded on the right to `length`.

    `responses` is K, the most that a row may have; by default what the source has at most. Absent ones have rank -1
    and an empty mask. A row is refused if its prompt is empty or one of its sequences longer than `length`, of a
    dialogue with its last turns alone. Raises InputError when no row that is left orders any two responses.
    """
    rows = list(source)
    most = max((len(row["responses"]) for row in rows), default=2)
    k_max = most if responses is None else responses
    if most > k_max:
        raise InputError(f"rankings: a row has {most} responses, more than the {k_max} asked for")
    fitting, counts = _answered(rows, tokenizer, length)
    kept = [(len(start), [np.append(start, end) for end in ends], rows[n]["ranks"]) for n, start, ends in fitting]
    if kept and all(len(set(ranks)) == 1 for *_, ranks in kept):
        raise InputError(
            f"rankings: no row has two responses of different rank, so there is nothing to learn; {counts}"
        )
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Rankings:
        shape = (len(index), k_max, length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        rank, first = np.full(shape[:2], -1, np.int32), np.zeros(len(index), np.int32)
        for b, n in enumerate(index):
            if n >= 0:
                first[b], sequences, ranks = kept[n]
                rank[b, : len(ranks)] = ranks
                for k, ids in enumerate(sequences):
                    tokens[b, k, : len(ids)] = ids
                    mask[b, k, : len(ids)] = True
        return Rankings(tokens=tokens, mask=mask, start=first, rank=rank)

    return _stream("rankings", fill, len(kept), counts, batch, seed, epochs, process_index, process_count)


def prompts(
    source: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    widths: int = 1,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches[Prompts]:
    """Prompts padded on the left to `length`; empty and longer ones are refused. `index` is the row of the source.

    Of a dialogue that is too long the last turns are the prompt; it is refused if the user's last does not fit.
    With more than one of `widths`, prompts of like length share a batch, which is padded to the least that is enough
    of so many equal steps up to `length`.
    """
    fill, sizes, counts = _prompts(source, tokenizer, length)
    wanted: dict[str, Any] = {"sizes": sizes, "widths": ragged.widths(length, widths)} if widths > 1 else {}
    return _stream("prompts", fill, len(sizes), counts, batch, seed, epochs, process_index, process_count, **wanted)


def every_prompt(source: Iterable[Row], tokenizer: Tokenizer, *, length: int) -> tuple[Prompts, Counts]:
    """All usable prompts at once, in the order of the source. Raises InputError when there are none."""
    fill, sizes, counts = _prompts(source, tokenizer, length)
    if not len(sizes):
        raise InputError(f"prompts: none can be used, with up to {length} tokens; {counts}")
    return fill(np.arange(len(sizes))), counts


def _prompts(
    source: Iterable[Row], tokenizer: Tokenizer, length: int
) -> tuple[Callable[..., Prompts], np.ndarray, Counts]:
    """How to fill a batch of prompts, and how many tokens each has."""
    kept, counts = _answered([{"prompt": row["prompt"]} for row in source], tokenizer, length)
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray, width: int = length) -> Prompts:
        shape = (len(index), width)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        row = np.full(len(index), -1, np.int32)
        for b, n in enumerate(index):
            # A row to fill up with is a real prompt: a policy has nothing to say after none at all.
            source_row, x, _ = kept[max(n, 0)]
            tokens[b, width - len(x) :] = x
            mask[b, width - len(x) :] = True
            row[b] = source_row if n >= 0 else -1
        return Prompts(tokens=tokens, mask=mask, index=row)

    return fill, np.array([len(x) for _, x, _ in kept], int), counts


def _documents(source: Iterable[Row], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all documents, each ended by EOS, one after another; and how many each has.

    Those of `builders.Rows` are kept beside them, and mapped into memory when they are asked for again.
    """
    folder = getattr(source, "folder", None)
    file = folder / f"tokens-{tokenizer_lib.fingerprint(tokenizer)}.npy" if folder else None
    if file and file.is_file():
        kept = np.asarray(np.load(file, mmap_mode="r"))
    else:
        documents = tokenizer_lib.encode(tokenizer, [row["text"] for row in source], special=True)
        end = np.array([tokenizer.eos_token_id], np.int32)
        header = np.array([len(documents), *(len(document) + 1 for document in documents)], np.int32)
        kept = np.concatenate([header, *(part for document in documents for part in (document, end))])
        if file:
            _keep(file, kept)
    _, lengths, ids = np.split(kept, [1, 1 + kept[0]])
    return ids, lengths


def _keep(file: Path, array: np.ndarray) -> None:
    """Writes a file that is not there or whole, if it can be written at all: a data set may be on a read-only disk."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as partial:  # by whoever else does so at this time
            np.save(Path(partial) / file.name, array)
            os.replace(Path(partial) / file.name, file)


def _lacks_text(row: Row) -> bool:
    """Whether there is no prompt, or nothing to learn after it."""
    if "messages" in row:
        return not any(m["content"].strip() for m in row["messages"] if m["role"] == "assistant")
    prompt = row["prompt"] if isinstance(row["prompt"], str) else "".join(m["content"] for m in row["prompt"])
    return not prompt.strip() or not row.get("completion", "some").strip()


def _answered(
    rows: Sequence[Row], tokenizer: Tokenizer, length: int
) -> tuple[list[tuple[int, np.ndarray, list[np.ndarray]]], Counts]:
    """The usable rows by number, each with the ids of its prompt and of its responses, if it has any."""

    def render(some: Sequence[Row]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        prompts, responses = [row["prompt"] for row in some], [row.get("responses", []) for row in some]
        return list(zip(*tokenizer_lib.render(tokenizer, prompts, responses), strict=True))

    def size(rendered: tuple[np.ndarray, list[np.ndarray]]) -> int:
        start, ends = rendered
        return len(start) + max(map(len, ends), default=0)

    usable = [n for n, row in enumerate(rows) if not _lacks_text(row)]
    rendered, shortened = _shortened([rows[n] for n in usable], render, size, length)
    fits = [size(one) <= length for one in rendered]
    kept = [(n, *one) for n, one, fit in zip(usable, rendered, fits, strict=True) if fit]
    truncated = sum(fits[n] for n in shortened)
    return kept, Counts(len(kept), truncated, len(rows) - len(usable), len(usable) - len(kept))


def _shortened(
    rows: Sequence[Row], render: Callable[[Sequence[Row]], list[T]], size: Callable[[T], int], length: int
) -> tuple[list[T], set[int]]:
    """The rendered rows, of dialogues beyond `length` as many of the last turns as fit; and which rows those are."""
    rows, rendered, shortened = list(rows), render(rows), set[int]()
    longer = list(range(len(rows)))
    while longer:
        shorter = {n: row for n in longer if size(rendered[n]) > length and (row := _without_oldest(rows[n]))}
        for n, one in zip(shorter, render(list(shorter.values())), strict=True):
            rows[n], rendered[n] = shorter[n], one
        longer = list(shorter)
        shortened.update(longer)
    return rendered, shortened


def _without_oldest(row: Row) -> Row | None:
    """The dialogue from its next turn of the user, behind a leading system message; None if there is no next."""
    name = "messages" if "messages" in row else "prompt"
    messages = row[name]
    if isinstance(messages, str):
        return None
    lead = int(messages[0]["role"] == "system")
    for n in range(lead + 1, len(messages)):
        if messages[n]["role"] == "user":
            return row | {name: [*messages[:lead], *messages[n:]]}
    return None


def _demonstrations(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids of each row, and a mask of those to learn."""
    pairs = [row for row in rows if "messages" not in row]
    starts, ends = tokenizer_lib.render(
        tokenizer, [row["prompt"] for row in pairs], [[row["completion"]] for row in pairs]
    )
    talks = iter(tokenizer_lib.render_conversations(tokenizer, [row["messages"] for row in rows if "messages" in row]))
    rendered = zip(starts, ends, strict=True)
    for row in rows:
        if "messages" in row:
            yield next(talks)
        else:
            start, (end,) = next(rendered)
            yield np.append(start, end), np.arange(len(start) + len(end)) >= len(start)


def _pack(lengths: Sequence[int], length: int) -> list[list[int]]:
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


def _packed(
    sequences: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    plan: Sequence[Sequence[int]],
    length: int,
    tokenizer: Tokenizer,
) -> tuple[Callable[[np.ndarray], Tokens], int]:
    """How to fill a batch with the rows of `plan`, and how many those are."""
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Tokens:
        shape = (len(index), length)
        tokens, segment = np.full(shape, pad, np.int32), np.zeros(shape, np.int32)
        target = np.zeros(shape, bool)
        for b, row in enumerate(index):
            start = 0
            for number, n in enumerate(plan[row] if row >= 0 else (), start=1):
                end = start + len(sequences[n])
                tokens[b, start:end] = sequences[n]
                segment[b, start:end] = number
                target[b, start + 1 : end] = targets[n][1:]  # nothing of its own precedes the first token
                start = end
        return Tokens(tokens=tokens, segment=segment, target=target)

    return fill, len(plan)


WINDOW = 8  # batches among which rows are exchanged


def _alike(numbers: grain.MapDataset, sizes: np.ndarray, batch: int, seed: int) -> grain.MapDataset:
    """The same stream, in which WINDOW batches of an epoch at a time deal out their rows to each other by size.

    Their order is of chance, so that sizes do not rise. No row comes before its epoch begins, or after it ends.
    """
    rows, span = len(sizes), WINDOW * batch

    @functools.lru_cache(maxsize=2)
    def window(first: int) -> np.ndarray:
        here = np.array([numbers[n] for n in range(first, first + min(span, rows - first % rows))])
        here = here[np.argsort(sizes[here], kind="stable")]
        whole = len(here) - len(here) % batch
        parts = np.random.default_rng((seed, first)).permutation(here[:whole].reshape(-1, batch))
        return np.append(parts, here[whole:])

    def dealt(index: int, _: Any) -> Any:
        place = index % rows % span
        return window(index - place)[place]

    return numbers.map_with_index(dealt)


def _stream(
    kind: str,
    fill: Callable[..., T],
    rows: int,
    counts: Counts,
    batch: int,
    seed: int,
    epochs: int | None,
    process_index: int | None,
    process_count: int | None,
    sizes: np.ndarray | None = None,
    widths: Sequence[int] = (),
) -> Batches[T]:
    """Shuffles, repeats and batches row numbers, and fills this process's part of each batch.

    With the `sizes` of rows, those of like size share a batch, and `fill` is told the least of `widths` for them.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if batch % count:
        raise InputError(f"{kind}: a batch of {batch} does not divide over {count} processes")
    if rows < batch:
        raise InputError(f"{kind}: {rows} usable rows are fewer than a batch of {batch}; {counts}")

    def part(numbers: np.ndarray) -> T:
        whole = np.pad(numbers, (0, batch - len(numbers)), constant_values=-1)
        width = () if sizes is None else (widths[np.searchsorted(widths, sizes[numbers].max())],)
        return fill(whole.reshape(count, -1)[index], *width)

    numbers = grain.MapDataset.range(rows).seed(seed).shuffle().repeat(epochs)
    if sizes is not None:
        numbers = _alike(numbers, sizes, batch, seed)
    numbers = numbers.batch(batch)
    return Batches(
        # One thread prepares the next batches while the step runs.
        numbers.map(part).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)),
        counts,
        rows,
        None if epochs is None else len(numbers),
    )


def take(stream: Iterator[T], count: int) -> T:
    """The next `count` batches of a stream, stacked on a leading axis."""
    batches = [next(stream) for _ in range(count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
