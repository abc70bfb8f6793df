"""Leases on the slots of items: who holds which, and what a person is given next.

The functions are steps of a transaction that is under way. A slot that comes back is noted in the table `freed`, so
that the next one who asks finds it without a look at all that was answered.
"""

import json
import random
import sqlite3
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, rules

_RECENT = 5  # answers of a person that are not yet repeated

Kind = Literal["slot", "gold", "repeat", "turn"]  # of a person's assignment and label; a decision is "adjudicate"


class Refused(InputError):
    """A request that the store turns down, although it is well formed. `code` names the reason for the page."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def append(db: sqlite3.Connection, values: Sequence[Any]) -> int:
    """Append an assignment, given by its columns from item to state; returns its number."""
    number = db.execute(
        "INSERT INTO assignments (item, person, kind, slot, shown, created, expires, state)"
        f" VALUES ({', '.join('?' * len(values))})",
        values,
    ).lastrowid
    assert number is not None
    return number


# -- what comes next ---------------------------------------------------------------------------------------------------


def assign(db: sqlite3.Connection, person: int, now: float, talks: bool) -> int | None:
    """A new assignment, of a conversation only if there is a model that `talks`.

    None if nothing is left, or the person is set aside.
    """
    current = rules.newest(db)
    row = db.execute("SELECT * FROM people WHERE id = ?", (person,)).fetchone()
    if row["aside"] is not None:
        return None
    rng = random.Random(f"{person}/{row['asked']}")
    draw = rng.random()
    kind: Kind = "slot"
    item, last = None, row["last"]
    if draw < current.gold_share:
        kind, item = "gold", _gold_item(db, person)
    elif draw < current.gold_share + current.repeat_share:
        kind, item = "repeat", _own_item(db, person, rng)
    if item is None:
        kind, item, last = "slot", *_open_item(db, person, last, talks)
    if item is None:
        kind, item = "gold", _gold_item(db, person)
    if item is None:
        return None
    before = db.execute(
        "SELECT shown FROM assignments WHERE item = ? AND person = ? AND kind = ? ORDER BY id DESC LIMIT 1",
        (item, person, kind),
    ).fetchone()
    if before:  # a lease that ran out: the draft is in that order
        shown = before["shown"]
    else:
        count = len(json.loads(db.execute("SELECT responses FROM items WHERE id = ?", (item,)).fetchone()[0]))
        shown = json.dumps(rng.sample(range(count), count))
    slot = _take_slot(db, item) if kind == "slot" else None
    db.execute("UPDATE people SET asked = asked + 1, last = ? WHERE id = ?", (last, person))
    return append(db, (item, person, kind, slot, shown, now, now + current.lease, "open"))


# The person has, or had and skipped, a slot of the item.
_MET = (
    "EXISTS (SELECT 1 FROM assignments WHERE assignments.item = items.id AND assignments.person = ?"
    " AND state IN ('open', 'done', 'skipped', 'aside'))"
)


def _open_item(db: sqlite3.Connection, person: int, last: int, talks: bool) -> tuple[int | None, int]:
    """The next item with a free slot, and the last one that the person was given in their order.

    That is one that came back or else the first beyond `last`, so that no query looks at all that was answered. Where
    conversations are passed over, for want of a model, the place stays before the first, so that they are found later.
    """
    query = (
        "SELECT items.id FROM freed JOIN items ON items.id = freed.item WHERE taken < overlap"
        f" AND (? OR task != 'chat') AND NOT {_MET} LIMIT 1"
    )
    if row := db.execute(query, (talks, person)).fetchone():
        return row["id"], last
    query = (
        "SELECT id, task FROM items INDEXED BY items_open WHERE taken < overlap AND gold IS NULL AND id > ?"
        f" AND (? OR task != 'chat') AND NOT {_MET} ORDER BY id LIMIT 1"
    )
    row = db.execute(query, (last, talks, person)).fetchone()
    if row is None:
        return None, last
    passed = None if talks else db.execute(_PASSED, (last, row["id"])).fetchone()
    return row["id"], passed["id"] - 1 if passed else row["id"]


# The first open conversation of a stretch of items.
_PASSED = (
    "SELECT id FROM items INDEXED BY items_open WHERE taken < overlap AND gold IS NULL AND id > ? AND id < ?"
    " AND task = 'chat' ORDER BY id LIMIT 1"
)


def _gold_item(db: sqlite3.Connection, person: int) -> int | None:
    """The first item with a known answer that the person has not met."""
    query = f"SELECT id FROM items INDEXED BY items_gold WHERE gold IS NOT NULL AND NOT {_MET} ORDER BY id LIMIT 1"
    row = db.execute(query, (person,)).fetchone()
    return row["id"] if row else None


def _own_item(db: sqlite3.Connection, person: int, rng: random.Random) -> int | None:
    """An item that the person ordered a while ago, once."""
    query = "SELECT id FROM assignments WHERE person = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
    newest = db.execute(query, (person, _RECENT)).fetchone()
    oldest = db.execute("SELECT MIN(id) AS id FROM assignments WHERE person = ?", (person,)).fetchone()
    if newest is None:
        return None
    row = db.execute(
        "SELECT item FROM assignments AS own JOIN items ON items.id = own.item WHERE own.person = ? AND own.id <= ?"
        " AND own.kind = 'slot' AND own.state = 'done' AND task NOT IN ('demonstrate', 'chat') AND NOT EXISTS (SELECT 1"
        " FROM assignments AS again WHERE again.item = own.item AND again.person = own.person"
        " AND again.kind = 'repeat') ORDER BY own.id DESC LIMIT 1",
        (person, rng.randint(oldest["id"], newest["id"])),
    ).fetchone()
    return row["item"] if row else None


# -- slots and leases --------------------------------------------------------------------------------------------------


def held(db: sqlite3.Connection, person: int, number: int) -> sqlite3.Row:
    """The assignment, opened again if its lease ran out and its slot is free; Refused if the person has it not."""
    row = db.execute("SELECT * FROM assignments WHERE id = ?", (number,)).fetchone()
    if row is None or row["person"] != person:
        raise Refused("foreign", "this task was given to somebody else")
    if row["state"] in ("done", "skipped", "aside"):
        raise Refused("answered", "this task has been answered already, perhaps in another tab")
    if row["state"] in ("open", "asked"):
        return row
    if db.execute("SELECT aside FROM people WHERE id = ?", (person,)).fetchone()["aside"] is not None:
        raise Refused("aside", "you get no more tasks for now: ask the administrator")
    other = db.execute("SELECT 1 FROM assignments WHERE person = ? AND state = 'open'", (person,)).fetchone()
    item = db.execute("SELECT taken < overlap FROM items WHERE id = ?", (row["item"],)).fetchone()
    if other or (row["kind"] == "slot" and not item[0]):
        raise Refused("expired", "the time for this task ran out, and somebody else has it now")
    slot = _take_slot(db, row["item"]) if row["kind"] == "slot" else None
    db.execute("UPDATE assignments SET state = 'open', slot = ? WHERE id = ?", (slot, number))
    return row


def renew(db: sqlite3.Connection, number: int, now: float) -> None:
    """Let the lease of an assignment begin anew."""
    db.execute("UPDATE assignments SET expires = ? WHERE id = ?", (now + rules.newest(db).lease, number))


def release(db: sqlite3.Connection, row: sqlite3.Row, state: str) -> None:
    """End an assignment without a label, and give its slot back."""
    db.execute("UPDATE assignments SET state = ? WHERE id = ?", (state, row["id"]))
    if row["kind"] == "slot":
        db.execute("UPDATE items SET taken = taken - 1 WHERE id = ?", (row["item"],))
        db.execute("INSERT OR IGNORE INTO freed VALUES (?)", (row["item"],))


def release_expired(db: sqlite3.Connection, now: float) -> None:
    """Give back all tasks whose lease ran out."""
    query = "SELECT * FROM assignments WHERE state = 'open' AND expires < ?"
    for row in db.execute(query, (now,)).fetchall():
        release(db, row, "expired")


def release_held(db: sqlite3.Connection, person: int) -> None:
    """Give back the task that a person holds, if any."""
    for row in db.execute("SELECT * FROM assignments WHERE person = ? AND state = 'open'", (person,)).fetchall():
        release(db, row, "expired")


def set_aside(db: sqlite3.Connection, person: int, why: str, now: float, by: int | None) -> None:
    """Give a person no more tasks, and others the slots that the person filled.

    `by` is the administrator who decides that, None a rule.
    """
    query = "UPDATE people SET aside = ?, why = ? WHERE id = ? AND aside IS NULL"
    if not db.execute(query, (now, why, person)).rowcount:
        return
    acts.add(db, "aside", by, now, person, why)
    query = "SELECT * FROM assignments WHERE person = ? AND state IN ('open', 'done') AND kind = 'slot'"
    for row in db.execute(query, (person,)).fetchall():
        release(db, row, "aside" if row["state"] == "done" else "expired")


def restore(db: sqlite3.Connection, person: int, now: float, by: int | None) -> None:
    """Let a person who was set aside go on; the slots that the person filled are full again, or more than full."""
    query = "UPDATE people SET aside = NULL, why = NULL WHERE id = ? AND aside IS NOT NULL"
    if not db.execute(query, (person,)).rowcount:
        return
    acts.add(db, "restored", by, now, person)
    query = "SELECT * FROM assignments WHERE person = ? AND state = 'aside'"
    for row in db.execute(query, (person,)).fetchall():
        values = (_free_slot(db, row["item"]), row["id"])
        db.execute("UPDATE assignments SET state = 'done', slot = ? WHERE id = ?", values)
        db.execute("UPDATE items SET taken = taken + 1 WHERE id = ?", (row["item"],))


def _take_slot(db: sqlite3.Connection, item: int) -> int:
    slot = _free_slot(db, item)
    db.execute("UPDATE items SET taken = taken + 1 WHERE id = ?", (item,))
    full = db.execute("SELECT 1 FROM items WHERE id = ? AND taken >= overlap", (item,)).fetchone()
    if full:
        db.execute("DELETE FROM freed WHERE item = ?", (item,))
    return slot


def _free_slot(db: sqlite3.Connection, item: int) -> int:
    query = "SELECT slot FROM assignments WHERE item = ? AND kind = 'slot' AND state IN ('open', 'done')"
    taken = {row["slot"] for row in db.execute(query, (item,))}
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
