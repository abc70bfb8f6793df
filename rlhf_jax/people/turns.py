"""Turns of a chat: answers of models to a person, recorded before the person can judge them, and taken back."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from rlhf_jax.people import conversations, items, leases
from rlhf_jax.people.conversations import Conversation
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.schema import encoded
from rlhf_jax.people.store import Store


def record(store: Store, person: int, name: str, item: Item, shown: Sequence[int], chat: int | None = None) -> int:
    """Record what models answered to a person; returns the number of the assignment by which they may judge it.

    `name` is the page's: what comes twice under one name is recorded once. With the assignment of a `chat` task the
    answers are its next turn, in the place of one that is not judged; Refused if it has gone on in the meantime.
    """
    items.check(item)
    key = hashlib.sha256(json.dumps([person, name]).encode()).digest()
    with store.writer() as db:
        query = "SELECT assignments.id, responses FROM items JOIN assignments ON item = items.id WHERE key = ?"
        if row := db.execute(query, (key,)).fetchone():
            if row["responses"] != encoded(item.responses):
                raise Refused("moved", "other answers have been recorded under this name")
            return row["id"]
        now, about = store.now(), None
        if chat is not None:
            about = leases.held(db, person, chat)["item"]
            if item.prompt[:-1] != conversations.read(db, person, about).messages():
                raise Refused("moved", "the conversation has gone on, perhaps in another tab")
            conversations.drop(db, person, about)
            leases.renew(db, chat, now)
        unasked = dataclasses.replace(item, overlap=0)
        number = items.insert(db, unasked, key, item.prompt[-1]["content"], now).lastrowid
        return leases.append(db, (number, person, "turn", about, json.dumps(list(shown)), now, now, "asked"))


def recorded(store: Store, person: int, number: int) -> Item:
    """The answers that were recorded as a turn of a person's."""
    row = store.one(
        "SELECT items.* FROM assignments JOIN items ON items.id = assignments.item"
        " WHERE assignments.id = ? AND person = ? AND kind = 'turn'",
        number,
        person,
    )
    if row is None:
        raise Refused("foreign", "this answer was given to somebody else")
    return items.of_row(row)


def withdraw(store: Store, person: int, number: int) -> None:
    """Take back what a person said of a turn, if anything, which they may then judge anew."""
    with store.writer() as db:
        query = (
            "SELECT labels.id FROM counting AS labels JOIN assignments ON assignments.id = labels.assignment"
            " WHERE assignment = ? AND labels.person = ? AND assignments.kind = 'turn' AND assignments.slot IS NULL"
        )
        for row in db.execute(query, (number, person)).fetchall():
            held = db.execute("SELECT * FROM assignments WHERE id = ?", (number,)).fetchone()
            conversations.withdraw(db, held, row["id"], store.now())


def conversation(store: Store, person: int, number: int) -> Conversation:
    """How the conversation of a chat task stands, which a person holds."""
    with store.writer(lasting=False) as db:
        return conversations.read(db, person, leases.held(db, person, number)["item"])
