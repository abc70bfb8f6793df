"""The rows of labels: drafted, appended, and perhaps withdrawn.

The functions are steps of a transaction that is under way.
"""

import json
import sqlite3
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.people.leases import Refused


def check_name(name: str, field: str) -> None:
    """Raise InputError for a name that no page would give to what it sends."""
    if not 8 <= len(name) <= 64 or not name.isascii():
        raise InputError(f"{field}: expected a name of 8 to 64 ASCII characters")


def replayed(
    db: sqlite3.Connection, person: int, submission: str, field: Literal["assignment", "item"], number: int
) -> int | None:
    """The label that is stored under a submission's name already; Refused where it answers something else.

    `field` says what the submission is about, by its `number`.
    """
    query = "SELECT id, assignment, item FROM labels WHERE person = ? AND submission = ?"
    row = db.execute(query, (person, submission)).fetchone()
    if row and row[field] != number:
        raise Refused("foreign", "this name of a submission stands for the answer to another task")
    return row and row["id"]


def append(db: sqlite3.Connection, values: Sequence[Any]) -> int:
    """Append a label, given by its columns from assignment to pairs; returns its number."""
    label = db.execute(
        "INSERT INTO labels (assignment, item, person, kind, submission, answer, started, created, seconds, fast,"
        f" agreed, pairs) VALUES ({', '.join('?' * len(values))})",
        values,
    ).lastrowid
    assert label is not None
    return label


def withdraw(db: sqlite3.Connection, label: int, person: int, now: float) -> None:
    """Let a label count no more; it stays on record, as does the `person` who withdraws it."""
    db.execute("INSERT INTO withdrawals VALUES (?, ?, ?)", (label, person, now))


def draft(db: sqlite3.Connection, person: int, item: int, body: Any, now: float) -> None:
    """Keep what a person has entered so far, in ASCII: it may be no Unicode yet."""
    db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?, ?)", (person, item, json.dumps(body), now))
