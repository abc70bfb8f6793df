"""Recipes: what rows of each kind become, before they are stored in shards and put into batches.

A recipe is given some rows of a source at a time, never all of it, which may be more than memory holds. It says how
many of these are kept, truncated and refused, and why.

A dialogue, messages and what follows them, that exceeds `length` loses its oldest turns. It then begins with a user's
turn, after a leading system message if it has one, and counts as truncated. Text is never cut on the left.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rlhf_jax.data import steps as steps_lib
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.shards import Counts, Item, Made, Recipe
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import BEST_RATING, InputError, Virtue

T = TypeVar("T")
Row = dict[str, Any]  # as `sources.rows` returns them


def text(tokenizer: Tokenizer, length: int) -> Recipe:
    """Documents, each ended by EOS, in pieces of at most `length` tokens."""

    def make(rows: list[Row], _: int) -> Made:
        texts = [row["text"] for row in rows]
        least = len(tokenizer_lib.front(tokenizer))  # of an empty document
        end = np.array([tokenizer.eos_token_id], np.int32)
        kept = [np.concatenate([ids, end]) for ids in tokenizer_lib.documents(tokenizer, texts) if len(ids) > least]
        pieces = [Item([ids[at : at + length]]) for ids in kept for at in range(0, len(ids), length)]
        spelling = sum(tokenizer_lib.spells_control_tokens(tokenizer, texts))
        return Made(pieces, Counts(len(kept), empty=len(texts) - len(kept), control_tokens=spelling))

    return Recipe("text", make, pack=True)


def demonstrations(
    source: Iterable[Row], tokenizer: Tokenizer, length: int, completion_only: bool, pack: bool
) -> Recipe:
    """Prompts with what should follow; see `pipeline.demonstrations`."""

    def make(rows: list[Row], first: int) -> Made:
        usable = [n for n, row in enumerate(rows) if not _lacks_text(row)]
        rendered, shortened = _shortened(
            [rows[n] for n in usable],
            lambda some: list(_demonstrations(some, tokenizer, completion_only)),
            lambda one: len(one.ids),
            length,
            lambda n: _where(source, first + usable[n]),
        )
        kept = [n for n, one in enumerate(rendered) if one.learn[:length].any()]
        too_long = [usable[n] for n, one in enumerate(rendered) if not one.learn[:length].any()]
        counts = Counts(
            len(kept),
            truncated=sum(n in shortened or len(rendered[n].ids) > length for n in kept),
            empty=len(rows) - len(usable),
            too_long=len(too_long),
            control_tokens=_spelling([rows[usable[n]] for n in kept], tokenizer),
            limit=_limit(source, first, too_long, f"--length {length}"),
        )
        return Made([Item([rendered[n].ids[:length]], [rendered[n].target[:length]]) for n in kept], counts)

    settings = f"{'completions' if completion_only else 'all'}-{'packed' if pack else 'alone'}"
    return Recipe(f"demonstrations-{settings}-{_template(tokenizer)}", make, pack)


def rankings(source: Iterable[Row], tokenizer: Tokenizer, length: int, virtue: Virtue | None) -> Recipe:
    """A prompt and its K responses, with the K ranks and, of a virtue, whether each is rated below the middle.

    `most` has the largest K of the source, and the tokens of the longest prompt and of the longest response.
    """

    def make(rows: list[Row], first: int) -> Made:
        if virtue is not None:
            rows = [_by_rating(row, virtue, source, first + n) for n, row in enumerate(rows)]
        fitting, counts = _answered(source, rows, first, tokenizer, length)
        tells = [_tells(one.ends, rows[one.row]["ranks"]) for one in fitting]
        kept = [one for one, (distinct, _) in zip(fitting, tells, strict=True) if distinct]
        tied = sum(not (distinct or identical) for distinct, identical in tells)
        counts = dataclasses.replace(
            counts,
            kept=len(kept),
            truncated=sum(one.shortened for one in kept),
            identical=len(tells) - len(kept) - tied,
            tied=tied,
            repeated=sum(distinct and identical for distinct, identical in tells),
            unended=sum(not ended for one in kept for ended in rows[one.row].get("ended", ())),
            control_tokens=_spelling([rows[one.row] for one in kept], tokenizer),
        )
        most = (
            max(len(row["responses"]) for row in rows),
            max((len(one.start) for one in kept), default=0),
            max((len(end) for one in kept for end in one.ends), default=0),
        )
        items = [
            Item([one.start, *one.ends], numbers=(*rows[one.row]["ranks"], *rows[one.row].get("below", ())))
            for one in kept
        ]
        return Made(items, counts, most)

    return Recipe(f"rankings-{virtue or 'ranks'}-{_template(tokenizer)}", make, pack=False)


def thumbs(source: Iterable[Row], tokenizer: Tokenizer, length: int) -> Recipe:
    """A prompt and its response, with its label."""

    def make(rows: list[Row], first: int) -> Made:
        asked = [{"prompt": row["prompt"], "responses": [row["completion"]]} for row in rows]
        kept, counts = _answered(source, asked, first, tokenizer, length)
        return Made([Item([one.start, *one.ends], numbers=(rows[one.row]["label"],)) for one in kept], counts)

    return Recipe(f"thumbs-{_template(tokenizer)}", make, pack=False)


def steps(source: Iterable[Row], tokenizer: Tokenizer, length: int) -> Recipe:
    """A prompt and its solution, with the number in it of the last token of each step, and then the steps' labels."""
    marks = steps_lib.marks(tokenizer, [tokenizer.eos_token_id])

    def make(rows: list[Row], first: int) -> Made:
        asked = [
            {"prompt": row["prompt"], "responses": [steps_lib.text(row["steps"])], "ended": [False]} for row in rows
        ]
        fitting, counts = _answered(source, asked, first, tokenizer, length)
        items = []
        for one in fitting:
            (end,) = one.ends
            over, read = steps_lib.find(end[None], np.ones((1, len(end)), bool), marks)
            where, labels = np.asarray(read)[np.asarray(over)].tolist(), rows[one.row]["labels"]
            if len(where) == len(labels):
                items.append(Item([one.start, end], numbers=(*where, *labels)))
        return Made(items, dataclasses.replace(counts, kept=len(items), unlike=len(fitting) - len(items)))

    return Recipe(f"steps-{_template(tokenizer)}", make, pack=False)


def prompts(source: Iterable[Row], tokenizer: Tokenizer, length: int) -> Recipe:
    """A prompt, with the number of its row in the source."""

    def make(rows: list[Row], first: int) -> Made:
        asked = [{"prompt": row["prompt"]} for row in rows]
        kept, counts = _answered(source, asked, first, tokenizer, length, f"{length} tokens")
        spelling = _spelling([asked[one.row] for one in kept], tokenizer)
        items = [Item([one.start], numbers=(first + one.row,)) for one in kept]
        return Made(items, dataclasses.replace(counts, control_tokens=spelling))

    return Recipe(f"prompts-{_template(tokenizer)}", make, pack=False)


def _template(tokenizer: Tokenizer) -> str:
    """A hash of everything that the rendering of messages depends on."""
    made_of = tokenizer.chat_template, tokenizer.init_kwargs.get("template_date"), tokenizer.special_tokens_map
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]


def _by_rating(row: Row, virtue: Virtue, source: Iterable[Row], number: int) -> Row:
    """The row ranked by the ratings of a virtue, with the field "below": which responses are below the middle."""
    ratings = [one.get(virtue) for one in row.get("ratings", [{}])]
    if None in ratings:
        where = _where(source, number)
        raise InputError(f"{where}, field ratings: expected a rating of {virtue} for each response, to learn from them")
    below = [2 * rating < 1 + BEST_RATING for rating in ratings]
    return row | {"ranks": [BEST_RATING - rating for rating in ratings], "below": below}


def _where(source: Iterable[Row], n: int) -> str:
    """The place of a source's row, as an error names it."""
    where = getattr(source, "where", None)
    return where(n) if where else f"row {n + 1}"


def _limit(source: Iterable[Row], first: int, too_long: Sequence[int], limit: str) -> str:
    """The limit with the place of the first row beyond it, by its number behind row `first`; "" if there is none."""
    return f"{limit} (first: {_where(source, first + too_long[0])})" if too_long else ""


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

    row: int  # of those that were given
    start: np.ndarray
    ends: list[np.ndarray]
    shortened: bool


def _answered(
    source: Iterable[Row], rows: Sequence[Row], first: int, tokenizer: Tokenizer, length: int, limit: str = ""
) -> tuple[list[_Answered], Counts]:
    """Those of some rows, from number `first` of the source on, that are not empty and fit into `length`.

    `limit` says what `length` is called, where that is not the flag `--length`.
    """

    def render(some: Sequence[Row]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        prompts, responses = [row["prompt"] for row in some], [row.get("responses", []) for row in some]
        ended = [row.get("ended", [True] * len(texts)) for row, texts in zip(some, responses, strict=True)]
        return list(zip(*tokenizer_lib.render(tokenizer, prompts, responses, ended), strict=True))

    def size(rendered: tuple[np.ndarray, list[np.ndarray]]) -> int:
        start, ends = rendered
        return len(start) + max(map(len, ends), default=0)

    usable = [n for n, row in enumerate(rows) if not _lacks_text(row)]
    rendered, shortened = _shortened(
        [rows[n] for n in usable], render, size, length, lambda n: _where(source, first + usable[n])
    )
    kept = [
        _Answered(usable[n], *one, shortened=n in shortened) for n, one in enumerate(rendered) if size(one) <= length
    ]
    too_long = [usable[n] for n, one in enumerate(rendered) if size(one) > length]
    counts = Counts(
        len(kept),
        truncated=sum(one.shortened for one in kept),
        empty=len(rows) - len(usable),
        too_long=len(too_long),
        limit=_limit(source, first, too_long, limit or f"--length {length}"),
    )
    return kept, counts


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
