"""How labelling goes: what is done, how fast, and how each person fares against gold and against themselves."""

import dataclasses
import datetime
import sqlite3
from collections.abc import Iterable

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
    last: float | None  # time of the last answer
    gold: Share  # pairs ordered as gold orders them
    own: Share  # pairs ordered as the person ordered them before
    aside: str | None  # why the person was set aside
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
    """How labelling stands at `now`, in seconds since 1970."""
    items, slots = db.execute(
        "SELECT COUNT(*), COALESCE(SUM(overlap), 0) FROM items WHERE gold IS NULL AND overlap > 0"
    ).fetchone()
    states = dict(db.execute("SELECT state, COUNT(*) FROM assignments WHERE kind = 'slot' GROUP BY state").fetchall())
    held = db.execute("SELECT COUNT(*) FROM assignments WHERE state = 'open' AND expires > ?", (now,)).fetchone()[0]
    hourly = [0] * _HOURS
    query = "SELECT CAST((? - created) / 3600 AS INTEGER) AS ago, COUNT(*) FROM labels WHERE created > ? GROUP BY ago"
    for ago, count in db.execute(query, (now, now - 3600 * _HOURS)):
        if 0 <= ago < _HOURS:
            hourly[_HOURS - 1 - ago] = count
    rows = db.execute(
        "SELECT people.id, name, role, why, aside, revoked, COUNT(labels.id) AS labels,"
        " COALESCE(SUM(answer LIKE '{\"skip\"%'), 0) AS skipped, COALESCE(SUM(fast), 0) AS fast,"
        " COALESCE(SUM(labels.created > ?), 0) AS hour, COALESCE(AVG(seconds), 0.0) AS seconds,"
        " MAX(labels.created) AS last,"
        " COALESCE(SUM(agreed) FILTER (WHERE kind = 'gold'), 0) AS gold_agreed,"
        " COALESCE(SUM(pairs) FILTER (WHERE kind = 'gold'), 0) AS gold_pairs,"
        " COALESCE(SUM(agreed) FILTER (WHERE kind = 'repeat'), 0) AS self_agreed,"
        " COALESCE(SUM(pairs) FILTER (WHERE kind = 'repeat'), 0) AS self_pairs"
        " FROM people LEFT JOIN labels ON labels.person = people.id"
        " AND labels.id NOT IN (SELECT label FROM withdrawals) GROUP BY people.id ORDER BY role, name",
        (now - 3600,),
    )
    people = [
        Standing(
            id=row["id"],
            name=row["name"],
            role=row["role"],
            labels=row["labels"],
            skipped=row["skipped"],
            fast=row["fast"],
            hour=row["hour"],
            seconds=row["seconds"],
            last=row["last"],
            gold=Share(row["gold_agreed"], row["gold_pairs"]),
            own=Share(row["self_agreed"], row["self_pairs"]),
            aside=(row["why"] or "") if row["aside"] is not None else None,
            revoked=row["revoked"] is not None,
        )
        for row in rows
    ]
    return Overview(items, slots, states.get("done", 0), held, hourly, people)


def midnight(now: float) -> float:
    """The time at which the day of `now` began, here."""
    return datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def middle(seconds: Iterable[float]) -> float:
    """The median, the upper one of two; 0 of nothing."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] if ordered else 0.0
