"""How a run asks people and waits: it puts items into a store, and goes on when enough answers are in.

Items are found again by what they ask, so a run that was killed while it waited may ask the same once more: nobody is
asked twice, and no answer is lost or counted twice. Other items may lie in the same store.
"""

import contextlib
import dataclasses
import math
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rlhf_jax.people import exchange
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store

T = TypeVar("T")

POLL = 2.0  # seconds between looks at the store
LINE = 60.0  # seconds between lines, where the output is no terminal
_PACE = 3600.0  # seconds that the pace is measured over
_RECENT = 600.0  # seconds after an answer in which somebody counts as at work


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far the answers to some items have come."""

    done: dict[str, int]  # answers that count, by group
    wanted: dict[str, int]  # answers asked for, by group
    people: int  # people who have a link and get tasks
    working: int  # people who have a task now, or answered one in the last ten minutes
    hourly: float  # answers an hour, over the last hour
    stuck: int  # answers asked for that none of the people can give: they have answered or skipped the item

    def is_enough(self, share: float) -> bool:
        """Whether each group has this share of its answers."""
        return all(self.done[name] >= math.ceil(share * wanted - 1e-6) for name, wanted in self.wanted.items())

    def __str__(self) -> str:
        groups = ", ".join(f"{name} {self.done[name]}/{wanted}" for name, wanted in self.wanted.items())
        left = sum(self.wanted.values()) - sum(self.done.values())
        said = f"people: {groups}; {self.working} at work"
        if self.hourly and left:
            said += f", {self.hourly:.0f} an hour, {_duration(3600 * left / self.hourly)} to go"
        return said

    def hint(self) -> str:
        """The obstacle to further answers, and what to do; empty if there is none."""
        if not self.people:
            return "nobody labels yet: open the link that scripts/people.sh printed, and press Label or invite people"
        if self.stuck:
            return f"nobody is left to give {self.stuck} of the answers: invite more people, or lower --enough"
        return ""


class Asked:
    """Items that were put into an open store, in groups: each needs its share of answers."""

    def __init__(self, store: Store, groups: Mapping[str, Sequence[Item]], tell: Callable[[str], None] = print):
        """Add the items, mixed, so that the groups fill evenly; those that are there already are taken up again."""
        self._store, self._tell = store, tell
        unique: dict[bytes, tuple[Item, str]] = {}
        for name, items in groups.items():
            for item in items:
                unique.setdefault(item.key(), (item, name))
        mixed = [item for item, _ in unique.values()]
        random.Random(0).shuffle(mixed)
        added, present = self._patiently(lambda: store.add(mixed))
        with store.reader() as db:
            query = "SELECT id FROM items WHERE key = ?"
            numbers = {key: db.execute(query, (key,)).fetchone()["id"] for key in unique}
        self._groups: dict[str, list[int]] = {name: [] for name in groups}  # numbers of the items
        for key, (_, name) in unique.items():
            self._groups[name].append(numbers[key])
        self._overlap = {numbers[key]: item.overlap for key, (item, _) in unique.items()}
        self._patiently(lambda: store.set_overlap(self._overlap))
        repeated = sum(map(len, groups.values())) - len(unique)
        others = self._others()
        tell(
            f"{store.path}: {added} tasks added, {present} were there already"
            + (f"; {repeated} that ask the same as another were left out" if repeated else "")
            + (f"; {others} answers to other tasks are wanted there too" if others else "")
        )
        self._line = _Line()

    def _others(self) -> int:
        """The number of answers that are wanted to items of others."""
        with self._store.reader() as db:
            query = "SELECT id, overlap - taken AS missing FROM items WHERE taken < overlap AND gold IS NULL"
            return sum(row["missing"] for row in db.execute(query) if row["id"] not in self._overlap)

    def standing(self) -> Standing:
        """How far the answers have come."""
        now = time.time()
        done, met = dict.fromkeys(self._overlap, 0), {item: set[int]() for item in self._overlap}
        times, working = list[float](), set[int]()
        with self._store.reader() as db:
            bounds = min(self._overlap), max(self._overlap)
            for item, person, state, expires, created in db.execute(_ANSWERS, bounds):
                if item not in done:
                    continue
                if state == "done":
                    done[item] += 1
                    times.append(created)
                if state in ("done", "skipped", "aside"):
                    met[item].add(person)
                if (state == "open" and expires > now) or (state == "done" and created > now - _RECENT):
                    working.add(person)
            active = db.execute(_ACTIVE).fetchall()
        seen = working.union(*met.values())
        people = {row["id"] for row in active if row["labels"] or row["id"] in seen}
        since = max(now - _PACE, min(times, default=now) - 60.0)
        missing = {item: max(0, overlap - done[item]) for item, overlap in self._overlap.items()}
        return Standing(
            done={name: sum(min(done[item], self._overlap[item]) for item in items)
                  for name, items in self._groups.items()},
            wanted={name: sum(self._overlap[item] for item in items) for name, items in self._groups.items()},
            people=len(people),
            working=len(working),
            hourly=3600 * sum(created > since for created in times) / (now - since),
            stuck=sum(max(0, left - len(people - met[item])) for item, left in missing.items() if left),
        )  # fmt: skip

    def ready(self, share: float) -> bool:
        """Whether this share of the answers is in; else a line says how far they are, and a while has passed."""
        standing = self._patiently(self.standing)
        enough = standing.is_enough(share)
        with self._line.told(str(standing), "" if enough else standing.hint(), last=enough):
            if not enough:
                time.sleep(POLL)
        return enough

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The rankings of each group, in the order of its items; those of one item as they were given."""
        place = {item: (name, n) for name, items in self._groups.items() for n, item in enumerate(items)}
        found: dict[str, list[tuple[int, int, dict[str, Any]]]] = {name: [] for name in self._groups}
        for kind, row in self._patiently(self._labels):
            if kind == "rankings" and row["item"] in place:
                name, n = place[row["item"]]
                kept = {field: row[field] for field in ("prompt", "responses", "ranks", "ratings", "ended")
                        if field in row}  # fmt: skip
                found[name].append((n, row["label"], kept | {"labeler": row["person"]}))
        return {name: [row for *_, row in sorted(rows, key=lambda one: one[:2])] for name, rows in found.items()}

    def _labels(self) -> list[tuple[str, dict[str, Any]]]:
        with self._store.reader() as db:
            return list(exchange.labels(db, exchange.Filter()))

    def retire(self) -> None:
        """Ask nobody else about the items; who has one now may finish it."""
        with self._store.reader() as db:
            taken = {row["id"]: row["taken"] for row in db.execute("SELECT id, taken FROM items")}
        kept = {item: min(overlap, taken[item]) for item, overlap in self._overlap.items()}
        self._patiently(lambda: self._store.set_overlap(kept))

    def _patiently(self, action: Callable[[], T]) -> T:
        """The result of an action, which is tried again while the store is busy or its disk is full."""
        told = False
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if not told:
                    self._tell(f"{self._store.path}: {error}; it is tried again every {POLL:.0f} s")
                told = True
                time.sleep(POLL)


# Each slot of an item, with the time of its answer if it has one.
_ANSWERS = (
    "SELECT assignments.item, assignments.person, state, expires, labels.created FROM assignments"
    " LEFT JOIN counting AS labels ON labels.assignment = assignments.id"
    " WHERE assignments.item BETWEEN ? AND ? AND assignments.kind = 'slot'"
)


# People who get tasks, and whether they label: an administrator does who has done so before.
_ACTIVE = (
    "SELECT id, role = 'labeler' OR id IN (SELECT person FROM tallies) AS labels FROM people"
    " WHERE revoked IS NULL AND aside IS NULL"
)


class _Line:
    """A line that changes: in place on a terminal, elsewhere printed anew when it has changed, once in a while."""

    def __init__(self) -> None:
        self._said, self._hint, self._when = "", "", -math.inf

    @contextlib.contextmanager
    def told(self, line: str, hint: str, last: bool) -> Iterator[None]:
        """Within, the line stands there, below a new hint; after the `last`, or an interruption, output goes on below.

        A hint is printed once, and cut nowhere.
        """
        in_place = sys.stdout.isatty()
        clear = "\r\x1b[K" if in_place else ""
        if hint and hint != self._hint:
            print(f"{clear}{hint}", flush=True)
        self._hint = hint
        if in_place:
            print(f"{clear}{line[: shutil.get_terminal_size().columns - 1]}", end="\n" if last else "", flush=True)
        elif line != self._said and (last or time.monotonic() - self._when >= LINE):
            print(line, flush=True)
            self._said, self._when = line, time.monotonic()
        try:
            yield
        except BaseException:
            if in_place:
                print(flush=True)
            raise


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"about {max(1, round(seconds / 60))} min"
    return f"about {round(seconds / 3600)} h"
