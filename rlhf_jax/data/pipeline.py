"""Rows to batches: Grain pipelines that end in numpy-leaved `Tokens`, `Rankings`, `Thumbs` and `Prompts`.

Rows are tokenised once, up front, so that what is kept, truncated and refused is counted before the first step; text
and demonstrations, which may be larger than memory, in a stream (`shards`). From then on a batch is a pure function of
its number. The rows of an epoch are shuffled globally, otherwise in each epoch, and the epochs follow one another as
one stream that is cut into batches: each row comes exactly once an epoch, and a batch may hold the end of one epoch and
the start of the next. If the number of epochs is given, the last batch is filled up with empty rows (in `prompts`: with
repeated ones, index -1), so that shapes never change.

A dialogue, messages and what follows them, that exceeds `length` loses its oldest turns. It then begins with a user's
turn, after a leading system message if it has one, and counts as truncated. Text is never cut on the left.

`batch` counts the rows of the global batch, over all processes. Process p of n holds the p-th of n equal parts of it,
so that the batches of one process are those of many, laid side by side.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import grain
import jax
import numpy as np

from rlhf_jax.data import shards
from rlhf_jax.data import steps as steps_lib
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.shards import Counts
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.devices import ragged
from rlhf_jax.types import BEST_RATING, InputError, Prompts, Rankings, Steps, Thumbs, Tokens, Virtue

T = TypeVar("T")
Row = dict[str, Any]  # as `sources.rows` returns them
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
    sizes: np.ndarray | None = None  # [rows] int: rows of like size share a batch, which is as wide as need be
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
            return ready.fill(here, ready.widths[np.searchsorted(ready.widths, ready.sizes[numbers].max())])

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
            numbers = _alike(numbers, self.ready.sizes, self.cut.batch, self.cut.seed)
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
    packed = shards.prepare(source, text_recipe(tokenizer, length), tokenizer, length)
    return _stream("text", _packed(packed, length, tokenizer), Cut(batch, seed, epochs))


def text_recipe(tokenizer: Tokenizer, length: int) -> shards.Recipe:
    """How documents become pieces of at most `length` tokens."""

    def make(rows: list[Row], _: int) -> shards.Sequences:
        texts = [row["text"] for row in rows]
        least = len(tokenizer_lib.front(tokenizer))  # of an empty document
        end = np.array([tokenizer.eos_token_id], np.int32)
        kept = [np.append(ids, end) for ids in tokenizer_lib.documents(tokenizer, texts) if len(ids) > least]
        pieces = [ids[at : at + length] for ids in kept for at in range(0, len(ids), length)]
        spelling = sum(tokenizer_lib.spells_control_tokens(tokenizer, texts))
        return shards.Sequences(pieces, None, Counts(len(kept), empty=len(texts) - len(kept), control_tokens=spelling))

    return shards.Recipe("text", make, pack=True)


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

    def make(rows: list[Row], first: int) -> shards.Sequences:
        usable = [n for n, row in enumerate(rows) if not _lacks_text(row)]
        rendered, shortened = _shortened(
            [rows[n] for n in usable],
            lambda some: list(_demonstrations(some, tokenizer, completion_only)),
            lambda one: len(one.ids),
            length,
            lambda n: _where(source, first + usable[n]),
        )
        kept = [n for n, one in enumerate(rendered) if one.learn[:length].any()]
        counts = Counts(
            len(kept),
            truncated=sum(n in shortened or len(rendered[n].ids) > length for n in kept),
            empty=len(rows) - len(usable),
            too_long=len(usable) - len(kept),
            control_tokens=_spelling([rows[usable[n]] for n in kept], tokenizer),
        )
        sequences, targets = [rendered[n].ids[:length] for n in kept], [rendered[n].target[:length] for n in kept]
        return shards.Sequences(sequences, targets, counts)

    template = hashlib.sha256(repr((tokenizer.chat_template, tokenizer.init_kwargs.get("template_date"))).encode())
    settings = f"{'completions' if completion_only else 'all'}-{'packed' if pack else 'alone'}"
    recipe = shards.Recipe(f"demonstrations-{settings}-{template.hexdigest()[:12]}", make, pack)
    packed = shards.prepare(source, recipe, tokenizer, length)
    return _stream("demonstrations", _packed(packed, length, tokenizer), Cut(batch, seed, epochs))


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

    `responses` is K, the most that a row may have; by default the most of any row of the source. Absent responses have
    rank -1 and an empty mask. A row is refused if its prompt is empty; if one of its sequences is longer than `length`,
    even after the dialogue's oldest turns are left out; and if it does not order any two responses that differ.

    Where it orders some that differ and some that do not, it is kept as it is, and counted: two identical responses
    have one score, so that their pair's two gradients cancel, whereas to leave one out, or to tie them, would change
    what the row says of them and the others. A response that is not `ended` is read at its last token.
    """
    rows = list(source)
    if virtue is not None:
        place = getattr(source, "where", "row {}".format)
        rows = [_by_rating(row, virtue, place, n) for n, row in enumerate(rows)]
    most = max((len(row["responses"]) for row in rows), default=2)
    k_max = most if responses is None else responses
    if most > k_max:
        raise InputError(f"rankings: a row has {most} responses, more than the {k_max} asked for")
    fitting, counts = _answered(source, rows, tokenizer, length)
    tells = [_tells(one.ends, rows[one.row]["ranks"]) for one in fitting]
    fitting = [one for one, (distinct, _) in zip(fitting, tells, strict=True) if distinct]
    tied = sum(not (distinct or identical) for distinct, identical in tells)
    counts = dataclasses.replace(
        counts,
        kept=len(fitting),
        truncated=sum(one.shortened for one in fitting),
        identical=len(tells) - len(fitting) - tied,
        tied=tied,
        repeated=sum(distinct and identical for distinct, identical in tells),
        unended=sum(not ended for one in fitting for ended in rows[one.row].get("ended", ())),
        control_tokens=_spelling([rows[one.row] for one in fitting], tokenizer),
    )
    if tells and not fitting:
        raise InputError(
            f"rankings: no row has two responses of different rank that differ, so there is nothing to learn; {counts}"
        )
    kept = [
        (len(one.start), [np.append(one.start, end) for end in one.ends], rows[one.row]["ranks"]) for one in fitting
    ]
    below = [rows[one.row]["below"] for one in fitting] if virtue is not None else None
    pad = tokenizer_lib.pad_id(tokenizer)
    prompt = max((len(one.start) for one in fitting), default=0)
    answer = max((len(end) for one in fitting for end in one.ends), default=0)
    prefix = prompt if shares is not None and shares(prompt, answer, k_max) else 0

    def fill(index: np.ndarray) -> Rankings:
        shape = (len(index), k_max, prompt + answer if prefix else length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        rank, start = np.full(shape[:2], -1, np.int32), np.zeros(len(index), np.int32)
        harmful = None if below is None else np.zeros(shape[:2], bool)
        for b, n in enumerate(index):
            if n >= 0:
                start[b], sequences, ranks = kept[n]
                rank[b, : len(ranks)] = ranks
                if harmful is not None and below is not None:
                    harmful[b, : len(ranks)] = below[n]
                first = prefix - start[b] if prefix else 0
                for k, ids in enumerate(sequences):
                    tokens[b, k, first : first + len(ids)] = ids
                    mask[b, k, first : first + len(ids)] = True
        start = np.full_like(start, prefix) if prefix else start
        return Rankings(tokens=tokens, mask=mask, start=start, rank=rank, harmful=harmful, prefix=prefix)

    return _stream("rankings", Ready(len(kept), fill, counts), Cut(batch, seed, epochs))


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
    rows = [{"prompt": row["prompt"], "responses": [row["completion"]], "label": row["label"]} for row in source]
    kept, counts = _answered(source, rows, tokenizer, length)
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Thumbs:
        shape = (len(index), 2, length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        start, good = np.zeros(len(index), np.int32), np.zeros(len(index), bool)
        for b, n in enumerate(index):
            if n >= 0:
                here, other = kept[n], kept[(n + 1) % len(kept)]
                start[b], good[b] = len(here.start), rows[here.row]["label"]
                for which, end in enumerate((here.ends[0], other.ends[0])):
                    ids = np.append(here.start, end)[:length]
                    tokens[b, which, : len(ids)] = ids
                    mask[b, which, : len(ids)] = True
        return Thumbs(tokens=tokens, mask=mask, start=start, good=good)

    return _stream("thumbs", Ready(len(kept), fill, counts), Cut(batch, seed, epochs))


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
    labelled = list(source)
    rows = [
        {"prompt": row["prompt"], "responses": [steps_lib.text(row["steps"])], "ended": [False]} for row in labelled
    ]
    fitting, counts = _answered(source, rows, tokenizer, length)
    marks = steps_lib.marks(tokenizer, [tokenizer.eos_token_id])
    kept = []
    for one in fitting:
        (end,) = one.ends
        over, read = steps_lib.find(end[None], np.ones((1, len(end)), bool), marks)
        where, labels = np.asarray(read)[np.asarray(over)], labelled[one.row]["labels"]
        if len(where) == len(labels):
            kept.append((np.append(one.start, end), len(one.start) + where, labels))
    counts = dataclasses.replace(counts, kept=len(kept), unlike=len(fitting) - len(kept))
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Steps:
        shape = (len(index), length)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        step, label = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for b, n in enumerate(index):
            if n >= 0:
                ids, where, labels = kept[n]
                tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
                step[b, where], label[b, where] = True, labels
        return Steps(tokens=tokens, mask=mask, step=step, label=label)

    return _stream("steps", Ready(len(kept), fill, counts), Cut(batch, seed, epochs))


def _by_rating(row: Row, virtue: Virtue, place: Callable[[int], str], n: int) -> Row:
    """The row ranked by the ratings of a virtue, with the field "below": which responses are below the middle."""
    ratings = [one.get(virtue) for one in row.get("ratings", [{}])]
    if None in ratings:
        raise InputError(
            f"{place(n)}, field ratings: expected a rating of {virtue} for each response, to learn from them"
        )
    below = [2 * rating < 1 + BEST_RATING for rating in ratings]
    return row | {"ranks": [BEST_RATING - rating for rating in ratings], "below": below}


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
    ready = _prompts(source, tokenizer, length)
    if widths > 1:
        ready = dataclasses.replace(ready, widths=ragged.widths(length, widths))
    else:
        ready = dataclasses.replace(ready, sizes=None)
    return _stream("prompts", ready, Cut(batch, seed, epochs))


def every_prompt(source: Iterable[Row], tokenizer: Tokenizer, *, length: int) -> tuple[Prompts, Counts]:
    """All usable prompts at once, in the order of the source. Raises InputError when there are none."""
    ready = _prompts(source, tokenizer, length)
    if not ready.rows:
        raise InputError(f"prompts: none can be used, with up to {length} tokens; {ready.counts}")
    return ready.fill(np.arange(ready.rows)), ready.counts


def _prompts(source: Iterable[Row], tokenizer: Tokenizer, length: int) -> Ready[Prompts]:
    """The usable prompts, with their sizes in tokens."""
    rows = [{"prompt": row["prompt"]} for row in source]
    kept, counts = _answered(source, rows, tokenizer, length)
    spelling = _spelling([rows[one.row] for one in kept], tokenizer)
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray, width: int = length) -> Prompts:
        shape = (len(index), width)
        tokens, mask = np.full(shape, pad, np.int32), np.zeros(shape, bool)
        row = np.full(len(index), -1, np.int32)
        for b, n in enumerate(index):
            # A row to fill up with is a real prompt: a policy has nothing to say after none at all.
            x = kept[max(n, 0)].start
            tokens[b, width - len(x) :] = x
            mask[b, width - len(x) :] = True
            row[b] = kept[n].row if n >= 0 else -1
        return Prompts(tokens=tokens, mask=mask, index=row)

    sizes = np.array([len(one.start) for one in kept], int)
    return Ready(len(kept), fill, dataclasses.replace(counts, control_tokens=spelling), sizes)


def _where(source: Iterable[Row], n: int) -> str:
    """The place of a source's row, as an error names it."""
    where = getattr(source, "where", None)
    return where(n) if where else f"row {n + 1}"


def _lacks_text(row: Row) -> bool:
    """Whether a row has no prompt, or nothing to learn after it."""
    if "messages" in row:
        answers = (m for m in row["messages"] if m["role"] == "assistant" and m.get("weight", 1))
        return not any(m["content"].strip() for m in answers)
    prompt = row["prompt"] if isinstance(row["prompt"], str) else "".join(m["content"] for m in row["prompt"])
    return not prompt.strip() or not row.get("completion", "some").strip()


def _spelling(rows: Iterable[Row], tokenizer: Tokenizer) -> int:
    """The number of rows that spell control tokens which are read as such, but for an EOS that ends a completion."""

    def texts(row: Row) -> Iterator[str]:
        prompt = row["prompt"] if "prompt" in row else row["messages"]
        answers = [row["completion"]] if "completion" in row else row.get("responses", ())
        if isinstance(prompt, str):
            yield prompt
            yield from (answer.removesuffix(tokenizer.eos_token) for answer in answers)
        else:
            yield from (message["content"] for message in prompt)
            yield from answers

    flat = [(n, text) for n, row in enumerate(rows) for text in texts(row)]
    spells = tokenizer_lib.spells_control_tokens(tokenizer, [text for _, text in flat])
    return len({n for (n, _), spelled in zip(flat, spells, strict=True) if spelled})


def _tells(responses: Sequence[np.ndarray], ranks: Sequence[int]) -> tuple[bool, bool]:
    """Whether any two responses of different rank differ, and whether any two such are identical, token by token."""
    same = [
        np.array_equal(responses[i], responses[j])
        for i, j in itertools.combinations(range(len(ranks)), 2)
        if ranks[i] != ranks[j]
    ]
    return not all(same), any(same)


class _Answered(NamedTuple):
    """The ids of a row's prompt, and of its responses, if it has any."""

    row: int  # of the source
    start: np.ndarray
    ends: list[np.ndarray]
    shortened: bool


def _answered(
    source: Iterable[Row], rows: Sequence[Row], tokenizer: Tokenizer, length: int
) -> tuple[list[_Answered], Counts]:
    """The rows of a source that are not empty and fit into `length`."""

    def render(some: Sequence[Row]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        prompts, responses = [row["prompt"] for row in some], [row.get("responses", []) for row in some]
        ended = [row.get("ended", [True] * len(texts)) for row, texts in zip(some, responses, strict=True)]
        return list(zip(*tokenizer_lib.render(tokenizer, prompts, responses, ended), strict=True))

    def size(rendered: tuple[np.ndarray, list[np.ndarray]]) -> int:
        start, ends = rendered
        return len(start) + max(map(len, ends), default=0)

    usable = [n for n, row in enumerate(rows) if not _lacks_text(row)]
    rendered, shortened = _shortened(
        [rows[n] for n in usable], render, size, length, lambda n: _where(source, usable[n])
    )
    kept = [
        _Answered(usable[n], *one, shortened=n in shortened) for n, one in enumerate(rendered) if size(one) <= length
    ]
    truncated = sum(one.shortened for one in kept)
    return kept, Counts(len(kept), truncated, len(rows) - len(usable), len(usable) - len(kept))


def _shortened(
    rows: Sequence[Row],
    render: Callable[[Sequence[Row]], list[T]],
    size: Callable[[T], int],
    length: int,
    where: Callable[[int], str],
) -> tuple[list[T], set[int]]:
    """The rendered rows, of dialogues beyond `length` as many of the last turns as fit; and which rows those are.

    What the tokenizer says of a row that it refuses is preceded by the place of the row, as `where` names it.
    """

    def rendered_of(some: dict[int, Row]) -> list[T]:
        try:
            return render(list(some.values()))
        except InputError:
            for n, row in some.items():
                try:
                    render([row])
                except InputError as error:
                    raise InputError(f"{where(n)}: {error}") from error
            raise

    numbered = dict(enumerate(rows))
    rendered, shortened = rendered_of(numbered), set[int]()
    longer = list(numbered)
    while longer:
        shorter = {n: row for n in longer if size(rendered[n]) > length and (row := _without_oldest(numbered[n]))}
        for n, one in zip(shorter, rendered_of(shorter), strict=True):
            numbered[n], rendered[n] = shorter[n], one
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


class _Demonstration(NamedTuple):
    """The ids of a row, a mask of what it is there to teach, and a mask of the targets."""

    ids: np.ndarray
    learn: np.ndarray
    target: np.ndarray


def _demonstrations(rows: Sequence[Row], tokenizer: Tokenizer, completion_only: bool) -> Iterator[_Demonstration]:
    """Yield the tokenised rows."""
    pairs = [row for row in rows if "messages" not in row]
    starts, ends = tokenizer_lib.render(
        tokenizer, [row["prompt"] for row in pairs], [[row["completion"]] for row in pairs]
    )
    talks = iter(tokenizer_lib.render_conversations(tokenizer, [row["messages"] for row in rows if "messages" in row]))
    rendered = zip(starts, ends, strict=True)
    for row in rows:
        if "messages" in row:
            ids, learn = next(talks)
        else:
            start, (end,) = next(rendered)
            ids, learn = np.append(start, end), np.arange(len(start) + len(end)) >= len(start)
        target = learn if completion_only else ~_weightless(row.get("messages", []), ids, tokenizer)
        yield _Demonstration(ids, learn, target)


def _weightless(messages: list[tokenizer_lib.Message], ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """A mask of the tokens of messages that have the weight 0, in a conversation all of whose tokens are targets."""
    if all(message.get("weight", 1) for message in messages):
        return np.zeros(len(ids), bool)
    if any(message["role"] != "assistant" and not message.get("weight", 1) for message in messages):
        raise InputError(
            "field weight: expected 1 where all tokens are learnt, but for the assistant's messages; got 0"
        )
    opposite = [message | {"weight": 1 - message.get("weight", 1)} for message in messages]
    ((_, weightless),) = tokenizer_lib.render_conversations(tokenizer, [opposite])
    return weightless


def _packed(packed: shards.Shards, length: int, tokenizer: Tokenizer) -> Ready[Tokens]:
    """The rows of shards, ready for batches."""
    pad = tokenizer_lib.pad_id(tokenizer)

    def fill(index: np.ndarray) -> Tokens:
        found = iter(packed.read(index[index >= 0]))
        return lay_out([next(found) if row >= 0 else [] for row in index], length, pad)

    return Ready(packed.rows, fill, packed.counts)


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
