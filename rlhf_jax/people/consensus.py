"""How far the people of a store agree now, and the items on which they agree least.

Labels are appended, so a look reads those that are new, and keeps the orders and ratings in small integers. Only
answers that count are measured: none that was withdrawn, and none of people who were set aside. `Watch` looks in a
thread of its own, so that the page of the administrator holds up nobody, whatever the size of the store.
"""

import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.people import agreement, forms
from rlhf_jax.people.agreement import Agreement, Estimate, Level, Share, Undefined
from rlhf_jax.people.store import Store

DRAWS = {"all": 1000, "person": 400}  # of each interval
_HIGHEST = 7  # rating
_FRESH = 1.0  # seconds in which no new look is taken
_REST = 10.0  # times as long as a look took, before the next
_AT_ONCE = 1000  # labels that are read before others have a turn
_ORDERS = "('rank', 'compare', 'best')"  # tasks whose answers order the responses
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Block:
    """The answers that order K responses, a row each."""

    label: np.ndarray  # [N]
    person: np.ndarray  # [N]
    item: np.ndarray  # [N]
    ranks: np.ndarray  # [N, K]
    ratings: np.ndarray  # [N, K, scales], 0 where none was given

    def __getitem__(self, rows: np.ndarray) -> "Block":
        return Block(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Said:
    """A sparse table of what people say of units: person[n] says value[n] of unit[n]."""

    person: np.ndarray  # [N]
    unit: np.ndarray  # [N]
    value: np.ndarray  # [N], from 0
    item: np.ndarray  # [U] that each unit belongs to, numbered from 0
    values: int  # number of values

    def counts(self) -> np.ndarray:
        """The number of people by unit and value. [U, V]."""
        found = np.bincount(self.unit * self.values + self.value, minlength=len(self.item) * self.values)
        return found.reshape(-1, self.values)


@dataclasses.dataclass(frozen=True)
class Measures:
    """How far all people agree, or one with the others; Undefined says why a measure has no value."""

    agreement: Agreement | Undefined  # on pairs of responses
    alpha: dict[str, Estimate | Undefined]  # Krippendorff's, of "pairs" and of each scale of the ratings
    kappa: Estimate | Undefined  # Fleiss', on pairs of responses
    own: Share | Undefined  # with the person's own earlier answers
    gold: Share | Undefined  # with answers that are known


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """How far people agreed at one moment."""

    at: float  # seconds since 1970
    took: float  # seconds
    everybody: Measures
    people: dict[str, Measures]  # who count and have answered
    items: np.ndarray  # [I] items that two people ordered, lowest agreement first
    shares: np.ndarray  # [I] the share of cases in which two of them agree, a tie as half


class Book:
    """All orders and ratings of a store, as far as they were read."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}  # by the number of responses
        self._last = 0  # label that was read last

    def read(self, db: sqlite3.Connection) -> None:
        """Read the labels that are new."""
        newest = db.execute("SELECT COALESCE(MAX(id), 0) FROM labels").fetchone()[0]
        rows = db.execute(
            "SELECT labels.id, labels.person, labels.item, answer, task, shown FROM labels"
            " JOIN items ON items.id = labels.item JOIN assignments ON assignments.id = labels.assignment"
            f" WHERE labels.id > ? AND labels.id <= ? AND labels.kind = 'slot' AND task IN {_ORDERS}",
            (self._last, newest),
        )
        parts: dict[int, list[Block]] = {}
        while some := rows.fetchmany(_AT_ONCE):
            for count, block in _blocks(some).items():
                parts.setdefault(count, []).append(block)
        for count, each in parts.items():
            self._blocks[count] = _joined([self._blocks[count], *each] if count in self._blocks else each)
        self._last = newest

    def counting(self, withdrawn: np.ndarray, people: np.ndarray) -> list[Block]:
        """The answers of `people` that were not withdrawn."""
        return [
            block[np.isin(block.person, people) & ~np.isin(block.label, withdrawn)] for block in self._blocks.values()
        ]


def _shared(block: Block) -> Block:
    """The answers on items that two people ordered."""
    _, number, times = np.unique(block.item, return_inverse=True, return_counts=True)
    return block[times[number] > 1]


def _blocks(rows: list[sqlite3.Row]) -> dict[int, Block]:
    """The answers that order responses, by the number of responses."""
    found: dict[int, list[tuple]] = {}
    for label, person, item, text, task, shown in rows:
        answer, count = json.loads(text), len(json.loads(shown))
        ranks = forms.ranks_of(task, answer, count)
        if ranks is not None:  # no skip
            given = answer.get("ratings") or [{}] * count
            ratings = [[rating.get(scale, 0) for scale in forms.SCALES] for rating in given]
            found.setdefault(count, []).append((label, person, item, ranks, ratings))
    blocks = {}
    for count, listed in found.items():
        label, person, item, *said = zip(*listed, strict=True)
        blocks[count] = Block(*map(np.array, (label, person, item)), *(np.array(each, np.int8) for each in said))
    return blocks


def _joined(blocks: list[Block]) -> Block:
    fields = (field.name for field in dataclasses.fields(Block))
    return Block(*(np.concatenate([getattr(block, name) for block in blocks]) for name in fields))


def look(db: sqlite3.Connection, book: Book, now: float) -> Snapshot:
    """Measure how far people agree at `now`, from the book, which is brought up to date."""
    start = time.perf_counter()
    book.read(db)
    rows = db.execute("SELECT id, name FROM people WHERE aside IS NULL").fetchall()
    names = {row["id"]: row["name"] for row in rows}
    withdrawn = np.array([row["label"] for row in db.execute("SELECT label FROM withdrawals")], int)
    counting = book.counting(withdrawn, np.array(list(names), int))
    answered = {person for block in counting for person in np.unique(block.person).tolist()}
    blocks = [block for block in map(_shared, counting) if len(block.label)]
    items = np.concatenate([np.empty(0, int), *(np.unique(block.item) for block in blocks)])
    said = {"pairs": _pairs(blocks)} | {scale: _rated(blocks, n) for n, scale in enumerate(forms.SCALES)}
    counts = {name: one.counts() for name, one in said.items()}
    checks = _checks(db, names)
    everybody = _measures(said, counts, None, [sum(each, 0.0) for each in zip(*checks.values(), strict=True)])
    people = {
        name: _measures(said, counts, person, checks[person])
        for person, name in sorted(names.items(), key=lambda pair: pair[1])
        if person in answered or any(checks[person])
    }
    shares = agreement.agreement_by(counts["pairs"], said["pairs"].item, len(items))
    order = np.lexsort((items, shares))
    return Snapshot(now, time.perf_counter() - start, everybody, people, items[order], shares[order])


def _pairs(blocks: list[Block]) -> Said:
    """The table of what people say of pairs of responses."""
    return _said(blocks, lambda block: agreement.compare(block.ranks).astype(int), 3)


def _rated(blocks: list[Block], scale: int) -> Said:
    """How people rate responses on a scale."""
    return _said(blocks, lambda block: block.ratings[:, :, scale].astype(int) - 1, _HIGHEST)


def _said(blocks: list[Block], labels: Callable[[Block], np.ndarray], values: int) -> Said:
    """The table of `labels` [N, M] of the M units of each item; those below 0 are none."""
    parts: list[tuple[np.ndarray, ...]] = []
    units = items = 0
    for block in blocks:
        label = labels(block)
        size = label.shape[1]
        found, number = np.unique(block.item, return_inverse=True)
        unit = units + number[:, None] * size + np.arange(size)
        given = label >= 0
        person = np.broadcast_to(block.person[:, None], label.shape)
        parts.append((person[given], unit[given], label[given], items + np.repeat(np.arange(len(found)), size)))
        units, items = units + len(found) * size, items + len(found)
    empty = np.empty(0, int)
    person, unit, value, item = (np.concatenate(each) for each in zip((empty,) * 4, *parts, strict=True))
    return Said(person, unit, value, item, values)


def _checks(db: sqlite3.Connection, names: Mapping[int, str]) -> dict[int, list[float]]:
    """Pairs agreed and pairs in all of each person's repeated answers, and the same of gold ones."""
    found: dict[int, list[float]] = {person: [0.0] * 4 for person in names}
    for row in db.execute("SELECT person, kind, agreed, pairs FROM tallies WHERE kind IN ('gold', 'repeat')"):
        if row["person"] in found:
            at = 0 if row["kind"] == "repeat" else 2
            found[row["person"]][at : at + 2] = [float(row["agreed"]), float(row["pairs"])]
    return found


def _measures(
    said: Mapping[str, Said], counts: Mapping[str, np.ndarray], person: int | None, checks: list[float]
) -> Measures:
    """The measures of all people, or of one: of cases with this person, and of units that this person judged."""
    alpha = {}
    kappa: Estimate | Undefined
    agreed: Agreement | Undefined
    draws = DRAWS["all" if person is None else "person"]
    for name, one in said.items():
        level: Level = "nominal" if name == "pairs" else "ordinal"
        own = np.flatnonzero(one.person == person) if person is not None else None
        unit = np.arange(len(one.item)) if own is None else one.unit[own]
        given, item = counts[name][unit], one.item[unit]
        values = np.arange(one.values)
        if len(one.value):
            alpha[name] = _or_why(agreement.estimate_alpha, given, values, level, item, draws)
        else:
            why: agreement.Why = "no_overlap" if name == "pairs" else "not_rated"
            alpha[name] = Undefined(f"Krippendorff's alpha of {name} is undefined: nobody said anything", why)
        if name == "pairs":
            kappa = _or_why(agreement.estimate_kappa, given, item, draws)
            agreed = _or_why(agreement.agreement_of, given, None if own is None else one.value[own])
    same, repeated, right, known = checks or (0, 0, 0, 0)
    return Measures(
        agreement=agreed,
        alpha=alpha,
        kappa=kappa,
        own=agreement.wilson(same, int(repeated))
        if repeated
        else Undefined("self-agreement is undefined: no item was shown twice", "no_repeat"),
        gold=agreement.wilson(right, int(known))
        if known
        else Undefined("gold accuracy is undefined: no gold item was answered", "no_gold"),
    )


def _or_why(measure: Callable[..., Found], *args: Any) -> Found | Undefined:
    try:
        return measure(*args)
    except Undefined as undefined:
        return undefined


class Watch:
    """Looks at a store in the background while somebody asks, and keeps what it found last."""

    def __init__(self, store: Store):
        self._store, self._book, self._lock = store, Book(), threading.Lock()
        self._found: Snapshot | None = None
        self._next = 0.0  # when what was found is no longer fresh, on the monotonic clock
        self._looking: threading.Thread | None = None

    def latest(self, wait: float = 0.0) -> Snapshot | None:
        """The newest snapshot, perhaps of a look that ends within `wait` seconds; None before the first has ended."""
        with self._lock:
            looking = self._looking
            if (looking is None or not looking.is_alive()) and time.monotonic() >= self._next:
                looking = self._looking = threading.Thread(target=self._look, daemon=True)
                looking.start()
        if looking is not None and wait > 0:
            looking.join(wait)
        return self._found

    def _look(self) -> None:
        start = time.monotonic()
        try:
            with self._store.reader() as db:
                self._found = look(db, self._book, self._store.now())
        except sqlite3.Error as error:  # the store was closed or its disk is full: what was found before stays
            print(f"error: {self._store.path}: agreement was not measured ({error})", flush=True)
        end = time.monotonic()
        self._next = end + max(_FRESH, _REST * (end - start))
