"""How far the people of a store agree now, and the items on which they agree least.

Labels are appended, so a look reads those that are new, and keeps the orders and ratings in small integers: to read all
of them again would take as long as all the rest of a look. They are kept in a temporary file, in order of item. Every
measure is computed from sums over items, so a look takes some items at a time, and what grows in memory with the store
is a few bytes an item: its place in the queue of those on which people agree least.

Only answers that count are measured: none that was withdrawn, and none of people who were set aside. `Watch` looks in a
thread of its own, so that the page of the administrator holds up nobody, whatever the size of the store.
"""

import dataclasses
import itertools
import json
import sqlite3
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.people import agreement, forms
from rlhf_jax.people.agreement import GROUPS, Agreement, Estimate, Level, Share, Undefined
from rlhf_jax.people.store import Store

DRAWS = {"all": 1000, "person": 400}  # of each interval
_HIGHEST = 7  # rating
_FRESH = 1.0  # seconds in which no new look is taken
_REST = 10.0  # times as long as a look took, before the next
_AT_ONCE = 1000  # labels that are read before others have a turn
_CHUNK = 1000  # answers that are counted at once, and those of one item beside them
_CACHE = 64  # pages of the book that are in memory
_ORDERS = "('rank', 'compare', 'best')"  # tasks whose answers order the responses
Found = TypeVar("Found")
Sums = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # of terms by group, see `agreement.alpha_sums`


@dataclasses.dataclass(frozen=True)
class Said:
    """The judgements of the units of some items: judge[n] says value[n] of unit[n]. Each item has as many units."""

    items: np.ndarray  # [I]
    judge: np.ndarray  # [N], from 1
    unit: np.ndarray  # [N], from 0, in order of item
    value: np.ndarray  # [N], from 0
    counts: np.ndarray  # [U, V] the number of people by unit and value

    @property
    def item(self) -> np.ndarray:
        """The item of each unit, numbered from 0. [U]."""
        return np.repeat(np.arange(len(self.items)), len(self.counts) // len(self.items))


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
    items: np.ndarray  # [I] int32, items that two people ordered, lowest agreement first
    shares: np.ndarray  # [I] float32, the share of cases in which two of them agree, a tie as half


class Book:
    """All orders and ratings of a store, as far as they were read, in a temporary file."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", check_same_thread=False)  # "": a temporary file, which SQLite removes
        weakref.finalize(self, self._db.close).atexit = False  # then a look may still be under way
        self._db.executescript(
            f"PRAGMA cache_size = {_CACHE};"
            "CREATE TABLE orders (count INTEGER, item INTEGER, label INTEGER, person INTEGER, record BLOB,"
            " PRIMARY KEY (count, item, label)) WITHOUT ROWID;"
            "CREATE TABLE chunks (id INTEGER PRIMARY KEY, count INTEGER, records BLOB);"
            "CREATE TABLE people (id INTEGER PRIMARY KEY);"
            "CREATE TABLE withdrawn (label INTEGER PRIMARY KEY);"
            "CREATE VIEW counting AS SELECT * FROM orders WHERE person IN people AND label NOT IN withdrawn"
        )
        self._counts: list[int] = []  # numbers of responses, in the order in which they were first met
        self._last = 0  # label that was read last
        self.answered = set[int]()  # people who gave an answer that counts
        self.shared = 0  # items that two people ordered

    def read(self, db: sqlite3.Connection, people: Iterable[int]) -> None:
        """Read the labels that are new, and let those count from now on that are of `people` and not withdrawn."""
        newest = db.execute("SELECT COALESCE(MAX(id), 0) FROM labels").fetchone()[0]
        rows = db.execute(
            "SELECT labels.id, labels.person, labels.item, answer, task, shown FROM labels"
            " JOIN items ON items.id = labels.item JOIN assignments ON assignments.id = labels.assignment"
            f" WHERE labels.id > ? AND labels.id <= ? AND labels.kind = 'slot' AND task IN {_ORDERS}"
            " ORDER BY labels.id",
            (self._last, newest),
        )
        while some := rows.fetchmany(_AT_ONCE):
            read = list(_records(some))
            with self._db:  # what was read before an error is read again, and replaced
                self._db.executemany("REPLACE INTO orders VALUES (?, ?, ?, ?, ?)", read)
            self._counts = list(dict.fromkeys([*self._counts, *(count for count, *_ in read)]))
            self._last = some[-1]["id"]
        self._last = newest
        with self._db:
            self._db.execute("DELETE FROM people")
            self._db.executemany("INSERT INTO people VALUES (?)", ((person,) for person in people))
            withdrawn = db.execute("SELECT label FROM withdrawals")
            self._db.executemany("INSERT OR IGNORE INTO withdrawn VALUES (?)", withdrawn)
        self._write_chunks()

    def _write_chunks(self) -> None:
        """Write the answers to items that two people ordered, in order of item, some items at a time."""
        self.answered, self.shared = set(), 0
        with self._db:
            self._db.execute("DELETE FROM chunks")
            for count in self._counts:
                for rows in self._some(count):
                    self.answered.update(rows["person"].tolist())
                    _, place, times = np.unique(rows["item"], return_inverse=True, return_counts=True)
                    several = times > 1
                    self.shared += int(several.sum())
                    if several.any():
                        values = (count, rows[several[place]].tobytes())
                        self._db.execute("INSERT INTO chunks (count, records) VALUES (?, ?)", values)

    def _some(self, count: int) -> Iterator[np.ndarray]:
        """Yield the answers that order `count` responses and count, those of some items at a time. [N] records."""
        rows = self._db.execute("SELECT record FROM counting WHERE count = ? ORDER BY item, label", (count,))
        rest = np.empty(0, _record(count))
        while some := rows.fetchmany(_CHUNK):
            records = b"".join(itertools.chain.from_iterable(some))
            read = np.concatenate([rest, np.frombuffer(records, rest.dtype)])
            whole = np.searchsorted(read["item"], read["item"][-1])  # the last item may go on
            yield read[:whole]
            rest = read[whole:]
        yield rest

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the answers to items that two people ordered, in order of item, some items at a time. [N] records."""
        for count, records in self._db.execute("SELECT count, records FROM chunks ORDER BY id"):
            yield np.frombuffer(records, _record(count))


def _record(count: int) -> np.dtype:
    """The record that is kept of an answer that orders `count` responses."""
    ratings = ("ratings", np.int8, (count, len(forms.SCALES)))  # 0 where none was given
    return np.dtype([("person", np.int32), ("item", np.int32), ("ranks", np.int8, (count,)), ratings])


def _records(rows: list[sqlite3.Row]) -> Iterator[tuple[int, int, int, int, bytes]]:
    """The rows of the book, of the answers that order responses."""
    for label, person, item, text, task, shown in rows:
        answer, count = json.loads(text), len(json.loads(shown))
        ranks = forms.ranks_of(task, answer, count)
        if ranks is not None:  # no skip
            given = answer.get("ratings") or [{}] * count
            ratings = [rating.get(scale, 0) for rating in given for scale in forms.SCALES]
            record = struct.pack(f"=ii{count + len(ratings)}b", person, item, *ranks, *ratings)
            yield count, item, label, person, record


def look(db: sqlite3.Connection, book: Book, now: float) -> Snapshot:
    """Measure how far people agree at `now`, from the book, which is brought up to date."""
    start = time.perf_counter()
    names = {row["id"]: row["name"] for row in db.execute("SELECT id, name FROM people WHERE aside IS NULL")}
    book.read(db, names)
    checks, deal = _checks(db, names), agreement.deal(book.shared)
    judges = np.array(sorted(person for person in names if person in book.answered or any(checks[person])), np.int32)
    number = len(judges) + 1
    pairs = Tally(number, deal, 3, agreement.alpha_sums, agreement.kappa_sums)
    cases, items, shares = np.zeros((number, 4), int), [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for said in _said(book, judges, _compared, 3):
        pairs.add(said)
        cases[0] += agreement.cases(said.counts).sum(axis=0)
        own = agreement.cases(said.counts[said.unit], said.value)
        cases += np.stack([np.bincount(said.judge, each, number) for each in own.T], axis=1).astype(int)
        items.append(said.items)
        shares.append(agreement.agreement_by(said.counts, said.item, len(said.items)).astype(np.float32))
    agreed = [_or_why(agreement.agreement_from, each) for each in cases]
    alpha, kappa = {"pairs": pairs.alphas("pairs", "nominal")}, pairs.kappas()
    del pairs  # which is large
    for scale in forms.SCALES:
        alpha[scale] = _ratings(book, judges, deal, scale)

    def measures(judge: int, checked: list[float]) -> Measures:
        same, repeated, right, known = checked
        return Measures(
            agreement=agreed[judge],
            alpha={name: each[judge] for name, each in alpha.items()},
            kappa=kappa[judge],
            own=agreement.wilson(same, int(repeated))
            if repeated
            else Undefined("self-agreement is undefined: no item was shown twice", "no_repeat"),
            gold=agreement.wilson(right, int(known))
            if known
            else Undefined("gold accuracy is undefined: no gold item was answered", "no_gold"),
        )

    everybody = measures(0, [sum(each, 0.0) for each in zip(*checks.values(), strict=True)] or [0.0] * 4)
    people = {names[person]: measures(n, checks[person]) for n, person in enumerate(judges.tolist(), 1)}
    found, lowest = np.concatenate(items), np.concatenate(shares)
    order = np.lexsort((found, lowest))
    took = time.perf_counter() - start
    return Snapshot(now, took, everybody, dict(sorted(people.items())), found[order], lowest[order])


def _ratings(book: Book, judges: np.ndarray, deal: np.ndarray, scale: str) -> list[Estimate | Undefined]:
    """Krippendorff's alpha of the ratings on a scale, by judge."""
    tally, place = Tally(len(judges) + 1, deal, _HIGHEST, agreement.alpha_sums), forms.SCALES.index(scale)
    for said in _said(book, judges, lambda rows: rows["ratings"][:, :, place].astype(int) - 1, _HIGHEST):
        tally.add(said)
    return tally.alphas(scale, "ordinal")


def _compared(rows: np.ndarray) -> np.ndarray:
    """The labels of the pairs of responses. [N, K (K - 1) / 2]."""
    return agreement.compare(rows["ranks"]).astype(int)


def _said(book: Book, judges: np.ndarray, labels: Callable[[np.ndarray], np.ndarray], values: int) -> Iterator[Said]:
    """The judgements by `judges`, people in order of number, of the M units of each item, some items at a time.

    `labels` are those of N answers, [N, M], from 0; below 0 there is none.
    """
    for rows in book.chunks():
        label = labels(rows)
        items, number = np.unique(rows["item"], return_inverse=True)
        answer, unit = np.nonzero(label >= 0)
        value, unit = label[answer, unit], number[answer] * label.shape[1] + unit
        counts = np.bincount(unit * values + value, minlength=len(items) * label.shape[1] * values)
        judge = 1 + np.searchsorted(judges, rows["person"])
        yield Said(items, judge[answer], unit, value, counts.reshape(-1, values))


class Tally:
    """Running sums over units, of everybody (judge 0) and of each person, by the groups to which items are dealt.

    A person's sums are over the units that this person judged, by all who judged them.
    """

    def __init__(self, judges: int, deal: np.ndarray, values: int, *sums: Sums):
        none = np.zeros((0, values)), np.zeros(0, int), 0
        self._sums = [(each, np.zeros((judges, GROUPS, each(*none).shape[1]))) for each in sums]
        self._met = np.zeros(judges, int)  # items with a unit that two people judged, one of them the judge
        self._deal, self._values, self._is_empty = deal, values, True

    def add(self, said: Said) -> None:
        """Add all units of some items."""
        self._is_empty &= not len(said.value)
        several = said.counts.sum(axis=1) > 1
        everybody, own = np.flatnonzero(several), several[said.unit]
        judge = np.concatenate([np.zeros(len(everybody), int), said.judge[own]])
        unit = np.concatenate([everybody, said.unit[own]])
        place, number = np.unique(self._places(judge, said.item[unit], len(said.items)), return_inverse=True)
        for function, sums in self._sums:
            sums.reshape(-1, sums.shape[-1])[place] += function(said.counts[unit], number, len(place))

    def _places(self, judge: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
        """The place of each unit in the sums, by its judge and group."""
        cluster = judge * items + item
        met = np.bincount(cluster, minlength=len(self._met) * items).reshape(-1, items) > 0
        before = self._met[:, None] + np.cumsum(met, axis=1) - met
        self._met += met.sum(axis=1)
        return judge * GROUPS + self._deal[before.ravel()[cluster]]

    def _by_judge(self, n: int) -> list[tuple[np.ndarray, int]]:
        """Each judge's sums by group, of the nth function, and the number of draws from them."""
        return [
            (sums[: min(met, GROUPS)], DRAWS["person" if judge else "all"])
            for judge, (met, sums) in enumerate(zip(self._met, self._sums[n][1], strict=True))
        ]

    def alphas(self, name: str, level: Level) -> list[Estimate | Undefined]:
        """Krippendorff's alpha by judge, if the first function is `alpha_sums`."""
        if self._is_empty:
            why: agreement.Why = "no_overlap" if name == "pairs" else "not_rated"
            undefined = Undefined(f"Krippendorff's alpha of {name} is undefined: nobody said anything", why)
            return [undefined] * len(self._met)
        values = np.arange(self._values)
        return [_or_why(agreement.alpha_from, sums, values, level, draws) for sums, draws in self._by_judge(0)]

    def kappas(self) -> list[Estimate | Undefined]:
        """Fleiss' kappa by judge, if the second function is `kappa_sums`."""
        return [_or_why(agreement.kappa_from, sums, draws) for sums, draws in self._by_judge(1)]


def _checks(db: sqlite3.Connection, names: Mapping[int, str]) -> dict[int, list[float]]:
    """Pairs agreed and pairs in all of each person's repeated answers, and the same of gold ones."""
    found: dict[int, list[float]] = {person: [0.0] * 4 for person in names}
    for row in db.execute("SELECT person, kind, agreed, pairs FROM tallies WHERE kind IN ('gold', 'repeat')"):
        if row["person"] in found:
            at = 0 if row["kind"] == "repeat" else 2
            found[row["person"]][at : at + 2] = [float(row["agreed"]), float(row["pairs"])]
    return found


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
