"""How labelling goes: what is done, how fast, and how each person fares against gold and against themselves."""

import dataclasses
import datetime
import sqlite3
from collections.abc import Iterable

from rlhf_jax.people import acts

_HOURS = 24


@dataclasses.dataclass(frozen=True)
class Share:
    """A count out of a total; a tie is half."""

    count: int | float
    total: int

    def __str__(self) -> str:
        return f"{100 * self.count / self.total:.0f} %" if self.total else "-"


@dataclasses.dataclass(frozen=True)
class Standing:
    """One person's work."""

    id: int
    name: str
    role: str
    labels: int
    skipped: int
    fast: int  # answers that were too fast
    hour: int  # labels in the last hour
    seconds: float  # mean, of an answer
    gold: Share  # pairs ordered as gold orders them
    own: Share  # pairs ordered as the person ordered them before
    aside: str | None  # why the person was set aside
    aside_by: str | None  # the administrator who did that; None: a rule
    revoked: bool


@dataclasses.dataclass(frozen=True)
class Pace:
    """How far a person has come."""

    done: int  # answers
    today: int  # answers since midnight
    seconds: float  # the median of the last 20 answers
    left: int  # answers that are wanted, from anybody


@dataclasses.dataclass(frozen=True)
class Overview:
    """The whole store."""

    items: int
    slots: int  # answers wanted
    done: int  # answers that count
    open: int  # tasks that people hold now
    hourly: list[int]  # labels in each of the last hours, the newest last
    people: list[Standing]


def overview(db: sqlite3.Connection, now: float) -> Overview:
    """How labelling stands at `now`, in seconds since 1970.

    Triggers keep the counts, so that this looks at the labels of the last day alone, however many there are.
    """
    query = "SELECT COALESCE(SUM(items), 0), COALESCE(SUM(slots), 0), COALESCE(SUM(taken), 0) FROM totals"
    items, slots, taken = db.execute(query).fetchone()
    query = "SELECT COUNT(*), COALESCE(SUM(kind = 'slot'), 0) FROM assignments WHERE state = 'open'"
    held, holding = db.execute(f"{query} AND expires > ?", (now,)).fetchone()[0], db.execute(query).fetchone()[1]
    hourly = [0] * _HOURS
    query = "SELECT CAST((? - created) / 3600 AS INTEGER) AS ago, COUNT(*) FROM labels WHERE created > ? GROUP BY ago"
    for ago, count in db.execute(query, (now, now - 3600 * _HOURS)):
        if 0 <= ago < _HOURS:
            hourly[_HOURS - 1 - ago] = count
    # With + the rows are found by their time, or else all are read in the order of people.
    query = "SELECT person, COUNT(*) FROM counting WHERE created > ? GROUP BY +person"
    hour = dict(db.execute(query, (now - 3600,)).fetchall())
    aside = acts.last(db, "aside")
    rows = db.execute(
        "SELECT people.id, name, role, why, aside, revoked, TOTAL(labels) AS labels, TOTAL(skipped) AS skipped,"
        " TOTAL(fast) AS fast, TOTAL(seconds) / MAX(1, TOTAL(labels)) AS seconds,"
        " TOTAL(agreed) FILTER (WHERE kind = 'gold') AS gold_agreed, TOTAL(pairs) FILTER (WHERE kind = 'gold') AS"
        " gold_pairs, TOTAL(agreed) FILTER (WHERE kind = 'repeat') AS self_agreed, TOTAL(pairs) FILTER (WHERE kind ="
        " 'repeat') AS self_pairs FROM people LEFT JOIN tallies ON person = people.id GROUP BY people.id"
        " ORDER BY role, name"
    )
    people = [
        Standing(
            id=row["id"],
            name=row["name"],
            role=row["role"],
            labels=int(row["labels"]),
            skipped=int(row["skipped"]),
            fast=int(row["fast"]),
            hour=hour.get(row["id"], 0),
            seconds=row["seconds"],
            gold=Share(row["gold_agreed"], int(row["gold_pairs"])),
            own=Share(row["self_agreed"], int(row["self_pairs"])),
            aside=(row["why"] or "") if row["aside"] is not None else None,
            aside_by=aside[row["id"]].by if row["id"] in aside else None,
            revoked=row["revoked"] is not None,
        )
        for row in rows
    ]
    return Overview(items, slots, taken - holding, held, hourly, people)


def wanted(db: sqlite3.Connection, task: str | None = None) -> int:
    """The number of answers that are wanted to all tasks, or to those of one kind."""
    query = "SELECT COALESCE(SUM(wanted), 0) FROM totals WHERE ? IS NULL OR task = ?"
    return db.execute(query, (task, task)).fetchone()[0]


def midnight(now: float) -> float:
    """The time at which the day of `now` began, here."""
    return datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def middle(seconds: Iterable[float]) -> float:
    """The median, the upper one of two; 0 of nothing."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] if ordered else 0.0
