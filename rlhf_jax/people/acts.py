"""The decisions of administrators about people and rules, and who made them: appended, and never changed.

An act without an administrator was done by a rule, or on the command line.
"""

import dataclasses
import sqlite3
from typing import Literal

What = Literal["invited", "revoked", "aside", "restored", "rules", "guidelines", "chats", "withdrawn"]


@dataclasses.dataclass(frozen=True)
class Act:
    """Something that was decided."""

    what: What
    by: str | None  # the administrator's name
    person: str | None  # whom it is about
    why: str
    at: float  # seconds since 1970
    label: int  # the newest label then


def add(
    db: sqlite3.Connection, what: What, by: int | None, now: float, person: int | None = None, why: str = ""
) -> None:
    """Append an act."""
    db.execute(
        "INSERT INTO acts (what, by, person, why, label, created)"
        " SELECT ?, ?, ?, ?, (SELECT COALESCE(MAX(id), 0) FROM labels), ?",
        (what, by, person, why, now),
    )


def newest(db: sqlite3.Connection, most: int) -> list[Act]:
    """The acts of last, the newest first."""
    query = (
        "SELECT acts.*, one.name AS name, other.name AS administrator FROM acts"
        " LEFT JOIN people AS one ON one.id = acts.person LEFT JOIN people AS other ON other.id = acts.by"
        " ORDER BY acts.id DESC LIMIT ?"
    )
    return [_act(row) for row in db.execute(query, (most,))]


def last(db: sqlite3.Connection, what: What) -> dict[int, Act]:
    """The newest act of this kind about each person, by number."""
    query = (
        "SELECT acts.*, one.name AS name, other.name AS administrator FROM"
        " (SELECT MAX(id) AS id FROM acts WHERE what = ? AND person IS NOT NULL GROUP BY person) AS newest"
        " JOIN acts ON acts.id = newest.id"
        " JOIN people AS one ON one.id = acts.person LEFT JOIN people AS other ON other.id = acts.by"
    )
    return {row["person"]: _act(row) for row in db.execute(query, (what,))}


def restored(db: sqlite3.Connection, person: int) -> int:
    """The newest label when a person was last restored, since when they are judged anew; 0 if they never were."""
    query = "SELECT COALESCE(MAX(label), 0) FROM acts WHERE person = ? AND what = 'restored'"
    return db.execute(query, (person,)).fetchone()[0]


def _act(row: sqlite3.Row) -> Act:
    return Act(row["what"], row["administrator"], row["name"], row["why"], row["created"], row["label"])
