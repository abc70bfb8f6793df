"""A blind arena: which models meet over which prompt, and how each fares by the votes of people.

A battle is a prompt with the answers of two models, which a person judges without their names: first, second, tie, or
both bad. Both bad says as little about which is better as a tie does, and counts as one in win rates and strengths; it
is shown apart. Each vote counts once, also where several people judged the same battle.
"""

import collections
import dataclasses
import itertools
import json
import random
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.people import agreement, exchange, strengths, words
from rlhf_jax.people.agreement import FIRST, SECOND, TIE, Agreement, Share, Undefined

_AT_ONCE = 1000  # battles that are counted
Pair = tuple[int, int]
# Why a model has no finite strength: it won every battle, lost every one, or had none; or its battles do not join it to
# the models with a strength by points in both directions; or they leave open how far the models are apart.
Why = Literal["won", "lost", "none", "apart", "open"]


# -- who meets whom ----------------------------------------------------------------------------------------------------


def pairs(models: int, a_prompt: int, seed: int) -> Iterator[list[Pair]]:
    """Yield, for one prompt after another without end, the `a_prompt` pairs of `models` that meet over it.

    They are those that have met least often so far, drawn by `seed` among equals. So at any moment two pairs differ by
    one battle at most. Raises InputError where there are not so many pairs.
    """
    every = list(itertools.combinations(range(models), 2))
    if not 1 <= a_prompt <= len(every):
        raise InputError(f"pairs={a_prompt}: expected from 1 to {len(every)}, the pairs that {models} models make")
    return _balanced(every, a_prompt, random.Random(f"{seed}/arena"))


def _balanced(every: Sequence[Pair], a_prompt: int, rng: random.Random) -> Iterator[list[Pair]]:
    met = dict.fromkeys(every, 0)
    while True:
        order = sorted(every, key=lambda pair: (met[pair], rng.random()))
        for pair in order[:a_prompt]:
            met[pair] += 1
        yield sorted(order[:a_prompt])


def check(models: Sequence[object], a_prompt: int) -> None:
    """Raise InputError unless there are two models or more, each named once, with `a_prompt` pairs at least."""
    twice = [str(model) for model in models if models.count(model) > 1]
    if twice:
        raise InputError(f"--model {twice[0]}: is named twice; an arena compares models that differ")
    if len(models) < 2:
        raise InputError("--task arena compares at least two models: name them by --model A B")
    pairs(len(models), a_prompt, seed=0)


def is_same(responses: Sequence[str]) -> bool:
    """Whether two answers are the same text. People judge them all the same: they say whether both will do."""
    return len({response.strip() for response in responses}) == 1


def short_names(models: Iterable[str]) -> dict[str, str]:
    """The shortest end of each model's path that no other has: "ppo/model" where another is "runs/sft/model"."""
    ends = dict[str, list[str]]()
    for model in models:
        parts = model.rstrip("/").split("/")
        ends[model] = ["/".join(parts[n:]) for n in reversed(range(len(parts)))]
    return {model: next((end for end in ends[model] if _is_only(end, model, ends)), model) for model in ends}


def _is_only(end: str, model: str, ends: Mapping[str, list[str]]) -> bool:
    return all(other == model or end not in ends[other] for other in ends)


# -- votes -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vote:
    """A person's verdict on a battle."""

    first: str  # a model
    second: str  # the other
    verdict: str  # one of `forms.VERDICTS`
    person: str = ""
    item: int = 0
    same: bool = False  # both answers are the same text


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes of an arena, which are read once, and the models in it, also those without a vote."""

    models: frozenset[str]
    votes: Iterable[Vote]  # in order of item


def read(db: sqlite3.Connection, wanted: exchange.Filter | None = None) -> Votes:
    """The votes that count, of those that a filter selects; InputError for one that selects another task.

    Withdrawn votes, skipped tasks and votes of people who were set aside do not count, as in every export. They come
    from the connection one by one, as they are counted.
    """
    wanted = wanted or exchange.Filter()
    if wanted.task not in (None, "arena"):
        raise InputError(f"filter task={wanted.task}: an arena counts the votes of its own task alone")
    votes = (
        Vote(
            first=row["models"][0],
            second=row["models"][1],
            verdict=row["verdict"],
            person=row["person"],
            item=row["item"],
            same=is_same(row["responses"]),
        )
        for _, row in exchange.labels(db, dataclasses.replace(wanted, task="arena"), "item")
    )
    query = "SELECT DISTINCT models FROM items WHERE task = 'arena' AND (? IS NULL OR round = ?)"
    listed = db.execute(query, (wanted.round, wanted.round))
    return Votes(frozenset(model for row in listed for model in json.loads(row["models"])), votes)


# -- how the models fare -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """How the votes on a model's answers went."""

    wins: int
    losses: int
    ties: int
    bad: int  # both answers were bad; they are not among `ties`

    @property
    def battles(self) -> int:
        """The number of votes."""
        return self.wins + self.losses + self.ties + self.bad

    @property
    def rate(self) -> Share | None:
        """The win rate, with a tie or both bad as half a win, and Wilson's interval; None without a vote."""
        return strengths.win_rate(self.wins, self.ties + self.bad, self.losses) if self.battles else None


@dataclasses.dataclass(frozen=True)
class Standing:
    """How one model fares."""

    model: str  # as the store has it
    name: str  # as short as tells it from the others
    record: Record
    strength: float | None  # Davidson's log-strength, with mean 0 over those that have one; None where it is not finite
    standard_error: float | None  # of the strength
    why: Why | None  # why it has none


@dataclasses.dataclass(frozen=True)
class Table:
    """How all models fare."""

    standings: tuple[Standing, ...]  # the strongest first
    between: tuple[tuple[Record, ...], ...]  # of the row's model against the column's, in the same order
    votes: int
    people: int  # who voted
    battles: int  # that were voted on
    bad: int  # votes for both bad
    same: int  # votes on two answers of the same text
    nu: float | None  # Davidson's weight of ties; None without ties or strengths
    agreement: Agreement | Undefined  # of two people on a battle, unless both answers are the same text


def table(arena: Votes) -> Table:
    """How the models fare: counts, win rates with Wilson's interval, and strengths (`strengths.fit`).

    Strengths are fitted to the largest group of models in which everybody took something from the others, directly or
    through others. The other models have none, and their battles say nothing about strengths within the group.
    """
    models, names, count = arena.models, short_names(arena.models), _Count()
    for some in _some(arena.votes):
        count.add(some)
    met = collections.Counter[tuple[str, str, str]]()
    for (first, second, verdict), times in count.cast.items():
        for model, other, won in ((first, second, "first"), (second, first, "second")):
            outcome = verdict if verdict in ("tie", "bad") else "win" if verdict == won else "loss"
            met[model, other, outcome] += times

    def record(model: str, others: Collection[str]) -> Record:
        counts = [sum(met[model, other, outcome] for other in others) for outcome in ("win", "loss", "tie", "bad")]
        return Record(*counts)

    fitted, group = _fitted(count.cast)
    standings = []
    for model in models:
        whole = record(model, models)
        place = fitted.players.index(model) if fitted and model in group else None
        standings.append(
            Standing(
                model=model,
                name=names[model],
                record=whole,
                strength=None if fitted is None or place is None else float(fitted.log_strength[place]),
                standard_error=None if fitted is None or place is None else float(fitted.standard_error[place]),
                why=_why(whole, model in group) if place is None else None,
            )
        )
    standings.sort(key=_order)
    return Table(
        standings=tuple(standings),
        between=tuple(tuple(record(one.model, [other.model]) for other in standings) for one in standings),
        votes=count.cast.total(),
        people=len(count.people),
        battles=count.battles,
        bad=sum(times for (*_, verdict), times in count.cast.items() if verdict == "bad"),
        same=count.same,
        nu=fitted.nu if fitted else None,
        agreement=count.agreed(),
    )


_LABELS = {"first": FIRST, "second": SECOND, "tie": TIE, "bad": TIE}


class _Count:
    """The sums of votes that a table is made of, so that the votes need not be held in memory."""

    def __init__(self) -> None:
        self.cast = collections.Counter[tuple[str, str, str]]()  # votes by first model, second model and verdict
        self.people = set[str]()
        self.battles = self.same = 0
        self._cases = np.zeros(4, int)  # of two people on a battle, see `agreement.cases`

    def add(self, battles: Sequence[Sequence[Vote]]) -> None:
        """Add the votes on some battles."""
        for votes in battles:
            self.cast.update((vote.first, vote.second, vote.verdict) for vote in votes)
            self.people.update(vote.person for vote in votes)
            self.same += sum(vote.same for vote in votes)
        self.battles += len(battles)
        said = [[_LABELS[vote.verdict] for vote in votes if not vote.same] for votes in battles]
        counts = [[labels.count(label) for label in (FIRST, SECOND, TIE)] for labels in said]
        self._cases += agreement.cases(np.array(counts)).sum(axis=0)

    def agreed(self) -> Agreement | Undefined:
        """How often two people say the same of a battle, both bad being a tie; Undefined where no two judged one.

        Battles of two answers of the same text are left out: there is nothing to choose between.
        """
        try:
            return agreement.agreement_from(self._cases)
        except Undefined as undefined:
            return undefined


def _some(votes: Iterable[Vote]) -> Iterator[list[list[Vote]]]:
    """The votes by battle, some battles at a time."""
    battles = (list(each) for _, each in itertools.groupby(votes, lambda vote: vote.item))
    while some := list(itertools.islice(battles, _AT_ONCE)):
        yield some


def _fitted(cast: collections.Counter[tuple[str, str, str]]) -> tuple[strengths.Strengths | None, Collection[str]]:
    """The strengths of the largest group in which they may be finite, None where they are not, and that group."""
    games = collections.Counter[tuple[str, str, str]]()
    for (first, second, verdict), times in cast.items():
        games[first, second, "tie" if verdict == "bad" else verdict] += times
    groups = strengths.groups(strengths.tally(games.elements()))
    if not groups or len(groups[0]) < 2:
        return None, ()
    try:
        inside = (game for game in games.elements() if {*game[:2]} <= {*groups[0]})
        return strengths.fit(strengths.tally(inside)), groups[0]
    except Undefined:
        return None, groups[0]


def _why(record: Record, is_joined: bool) -> Why:
    """Why a model has no strength; `is_joined`: although it belongs to the group that was to have them."""
    if not record.battles:
        return "none"
    if record.wins == record.battles:
        return "won"
    if record.losses == record.battles:
        return "lost"
    return "open" if is_joined else "apart"


def _order(one: Standing) -> tuple[int, float, str]:
    """The strongest first: who won everything, those with a strength, those without, who lost everything."""
    rate = one.record.rate
    value = one.strength if one.strength is not None else rate.value if rate else 0.0
    return {"won": 0, None: 1, "lost": 3, "none": 4}.get(one.why, 2), -value, one.name


# -- to look at --------------------------------------------------------------------------------------------------------


_HEAD = ("model", "battles", "wins", "losses", "ties", "both bad", "win rate (95 %)", "strength", "standard error")


def text(found: Table) -> str:
    """The table as text, a line a model."""
    said = words.of("en")
    rows: list[tuple[str, ...]] = [_HEAD]
    for one in found.standings:
        counts = one.record.battles, one.record.wins, one.record.losses, one.record.ties, one.record.bad
        rate = one.record.rate
        share = f"{rate.value:.1%} ({rate.lower:.1%} to {rate.upper:.1%})" if rate else "-"
        strength = "-" if one.strength is None else f"{one.strength:+.3f}"
        error = said[f"arena_{one.why}"] if one.standard_error is None else f"{one.standard_error:.3f}"
        rows.append((one.name, *map(str, counts), share, strength, error))
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEAD) - 1)]
    lines = []
    for name, *cells, last in rows:
        middle = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *middle, last]))
    lines.append(said["arena_votes"].format(**_counts(found)))
    if isinstance(found.agreement, Undefined):
        lines.append(str(found.agreement))
    else:
        for name in ("without_ties", "ties_as_label", "ties_as_half"):
            share = getattr(found.agreement, name)
            lines += [f"{said['arena_agreed']}, {said[name]}: {share}"] if share else []
    return "\n".join(lines)


def as_json(found: Table) -> dict[str, Any]:
    """The table as JSON has it, null for what has no value."""
    return {
        "models": [dataclasses.asdict(one) | _plain(one.record) for one in found.standings],
        "between": {
            one.name: {
                other.name: _plain(record) for other, record in zip(found.standings, row, strict=True) if record.battles
            }
            for one, row in zip(found.standings, found.between, strict=True)
        },
        "nu": found.nu,
        "agreement": None if isinstance(found.agreement, Undefined) else dataclasses.asdict(found.agreement),
        **_counts(found),
    }


def _plain(record: Record) -> dict[str, Any]:
    rate = record.rate and dataclasses.asdict(record.rate)
    return {"record": dataclasses.asdict(record) | {"battles": record.battles}, "win_rate": rate}


def _counts(found: Table) -> dict[str, int]:
    return {name: getattr(found, name) for name in ("votes", "people", "battles", "bad", "same")}
