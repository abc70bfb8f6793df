"""An administrator's decisions on items that people order differently.

A decision is a label of the kind "adjudicate" in an assignment of its own; it changes nobody's answer. It stands until
it is withdrawn or its administrator is set aside. While one stands, the item is in no queue and no second is stored.
"""

import dataclasses
import json
import random
import sqlite3
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, agreement, forms, labels, leases, progress
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.progress import Pace
from rlhf_jax.people.schema import encoded
from rlhf_jax.people.store import Store

# The decisions that stand, by item: the newest, where somebody who was set aside has come back.
STANDING = (
    "SELECT labels.item, MAX(labels.id) AS label FROM people CROSS JOIN counting AS labels ON labels.person = people.id"
    " JOIN assignments ON assignments.id = labels.assignment"
    " WHERE people.role = 'administrator' AND people.aside IS NULL AND labels.kind = 'adjudicate'"
    " AND assignments.state = 'done' GROUP BY labels.item"
)


@dataclasses.dataclass(frozen=True)
class Order:
    """How one person ordered the responses to an item."""

    label: int
    person: str
    ranks: list[int]
    answer: Any  # as it is stored, see `forms`


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision that stands."""

    label: int
    item: int
    person: str
    at: float  # seconds since 1970
    prompt: Any


def orders(db: sqlite3.Connection, item: int) -> list[Order]:
    """The orders of an item that count: neither withdrawn nor of people who were set aside; by name."""
    rows = db.execute(
        "SELECT labels.id, name, answer, task, shown FROM counting AS labels JOIN people ON people.id = labels.person"
        " JOIN items ON items.id = labels.item JOIN assignments ON assignments.id = labels.assignment"
        " WHERE labels.item = ? AND labels.kind = 'slot' AND state = 'done' AND aside IS NULL"
        " ORDER BY name",
        (item,),
    )
    found = []
    for row in rows:
        answer = json.loads(row["answer"])
        ranks = forms.ranks_of(row["task"], answer, len(json.loads(row["shown"])))
        if ranks is not None:
            found.append(Order(row["id"], row["name"], ranks, answer))
    return found


def settled(db: sqlite3.Connection, person: int) -> np.ndarray:
    """The items that are in no queue of this administrator: decided, or skipped by this one. [I] int32."""
    skipped = "SELECT item FROM counting WHERE person = ? AND kind = 'adjudicate'"
    found = db.execute(f"{skipped} UNION SELECT item FROM ({STANDING})", (person,))
    return np.fromiter((row["item"] for row in found), np.int32)


def decisions(db: sqlite3.Connection, most: int) -> list[Decision]:
    """The newest decisions that stand."""
    rows = db.execute(
        f"SELECT labels.id, labels.item, name, labels.created, prompt FROM ({STANDING}) AS standing"
        " JOIN labels ON labels.id = standing.label JOIN people ON people.id = labels.person"
        " JOIN items ON items.id = labels.item ORDER BY labels.id DESC LIMIT ?",
        (most,),
    )
    return [Decision(row["id"], row["item"], row["name"], row["created"], json.loads(row["prompt"])) for row in rows]


def refusal(db: sqlite3.Connection, item: int) -> Refused | None:
    """Why an item cannot be decided now; None if it can."""
    row = db.execute(
        "SELECT name FROM counting AS labels JOIN people ON people.id = labels.person"
        " JOIN assignments ON assignments.id = labels.assignment WHERE labels.item = ? AND labels.kind = 'adjudicate'"
        " AND state = 'done' AND aside IS NULL LIMIT 1",
        (item,),
    ).fetchone()
    if row:
        return Refused("decided", f"{row['name']} has decided this item already; withdraw that decision to change it")
    if len(orders(db, item)) < 2:
        return Refused("undisputed", "fewer than two people's orders of this item count by now: one was taken back")
    return None


def order_shown(person: int, item: int, count: int) -> list[int]:
    """The order in which the responses to an item stand on this administrator's page."""
    return random.Random(f"adjudicate/{person}/{item}").sample(range(count), count)


def task(db: sqlite3.Connection, person: int, item: int) -> dict[str, Any]:
    """The item with all people's orders of it, as the page shows it."""
    row = db.execute("SELECT task, prompt, responses FROM items WHERE id = ?", (item,)).fetchone()
    draft = db.execute("SELECT body FROM drafts WHERE person = ? AND item = ?", (person, -item)).fetchone()
    responses = json.loads(row["responses"])
    shown, found = order_shown(person, item, len(responses)), orders(db, item)
    ((_, share),) = agreement.least_agreed({order.person: {str(item): order.ranks} for order in found})
    return {
        "id": item,
        "item": item,
        "task": row["task"],
        "prompt": json.loads(row["prompt"]),
        "responses": [responses[k] for k in shown],
        "draft": json.loads(draft["body"]) if draft else None,
        "orders": [
            forms.displayed(order.answer, shown)
            | {"label": order.label, "person": order.person, "ranks": [order.ranks[k] for k in shown]}
            for order in found
        ],
        "share": share,
    }


def save_draft(store: Store, person: int, item: int, body: Any) -> None:
    """Keep what an administrator has entered so far; under -item, as a task on the same item has a draft too."""
    with store.writer() as db:
        if refused := refusal(db, item):
            raise refused
        labels.draft(db, person, -item, body, store.now())


def decide(store: Store, person: int, item: int, submission: str, answer: Any, seconds: float) -> int:
    """Store a decision on an item, given in the order of `order_shown`; returns the label's number.

    An answer with "taken", the number of a label, is that person's, with their ratings. A skip leaves the item to the
    other administrators. Otherwise as `Store.submit`: what is sent twice under one name is stored once; raises
    InputError for an answer that is not whole, and Refused for an item that was decided, or that no two people's
    orders of are left.
    """
    labels.check_name(submission, "submission")
    with store.writer() as db:
        if label := labels.replayed(db, person, submission, "item", item):
            return label
        if db.execute("SELECT 1 FROM people WHERE id = ? AND aside IS NOT NULL", (person,)).fetchone():
            raise Refused("set_aside", "you were set aside, so what you decide does not count")
        if refused := refusal(db, item):
            raise refused
        row = db.execute("SELECT task, responses FROM items WHERE id = ?", (item,)).fetchone()
        shown = order_shown(person, item, len(json.loads(row["responses"])))
        said = forms.restored(forms.checked(row["task"], len(shown), answer, "none"), shown)
        if answer.get("taken") is not None and "skip" not in said:
            said = _taken(orders(db, item), answer["taken"], said)
        now, state = store.now(), "skipped" if "skip" in said else "done"
        lease = (item, person, "adjudicate", None, json.dumps(shown), now - seconds, now, state)
        assignment, text = leases.append(db, lease), encoded(said)
        values = (assignment, item, person, "adjudicate", submission, text, now - seconds, now, seconds, 0, None, None)
        label = labels.append(db, values)
        db.execute("DELETE FROM drafts WHERE person = ? AND item = ?", (person, -item))
        return label


def _taken(found: list[Order], label: Any, said: dict[str, Any]) -> dict[str, Any]:
    """The answer of a label, with what the administrator says about the prompt in place of what the person does."""
    order = next((order for order in found if order.label == label), None)
    if order is None:
        raise Refused("taken_back", "the answer that you take was withdrawn or set aside meanwhile")
    theirs = {name: order.answer[name] for name in ("ranks", "ratings", "strength", "best") if name in order.answer}
    if any(said[name] != theirs[name] for name in ("ranks", "strength", "best") if name in theirs):
        raise InputError(f"taken: expected the order of label {label}, got another")
    about = {name: said[name] for name in ("prompt_flags", "confidence", "note") if name in said}
    return theirs | about | {"taken": label}


def withdraw(store: Store, person: int, label: int | None = None) -> int:
    """Withdraw a decision, or else this administrator's last; returns its item, which is in the queue again."""
    with store.writer() as db:
        row = db.execute(
            f"SELECT * FROM counting WHERE {'person' if label is None else 'id'} = ? AND kind = 'adjudicate'"
            " ORDER BY created DESC, id DESC LIMIT 1",
            (person if label is None else label,),
        ).fetchone()
        if row is None:
            raise Refused("nothing", "there is no such decision to withdraw; it may have been withdrawn already")
        labels.withdraw(db, row["id"], person, store.now())
        if row["person"] != person:
            acts.add(db, "withdrawn", person, store.now(), row["person"], f"item {row['item']}")
        db.execute("UPDATE assignments SET state = 'expired' WHERE id = ?", (row["assignment"],))
        answer = json.loads(row["answer"])
        if "skip" not in answer and row["person"] == person:
            shown = db.execute("SELECT shown FROM assignments WHERE id = ?", (row["assignment"],)).fetchone()["shown"]
            labels.draft(db, person, -row["item"], forms.displayed(answer, json.loads(shown)), store.now())
        return row["item"]


def pace(db: sqlite3.Connection, person: int, now: float, left: int) -> Pace:
    """How far an administrator has come with deciding, where `left` items are in the queue."""
    query = "FROM counting WHERE person = ? AND kind = 'adjudicate'"
    done = db.execute(f"SELECT COUNT(*) {query}", (person,)).fetchone()[0]
    midnight = progress.midnight(now)
    today = db.execute(f"SELECT COUNT(*) {query} AND created >= ?", (person, midnight)).fetchone()[0]
    recent = db.execute(f"SELECT seconds {query} ORDER BY created DESC LIMIT 20", (person,))
    return Pace(done, today, progress.middle(row["seconds"] for row in recent), left)
