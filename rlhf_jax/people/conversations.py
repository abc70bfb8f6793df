"""Conversations, each of which is what the turns of a chat task say.

What a model answers to a person is an item of overlap 0, with an assignment of the kind "turn" which that person may
judge. The `slot` of a turn is the item of the chat task that it belongs to. The functions are steps of a transaction
that is under way.
"""

import dataclasses
import json
import sqlite3
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.people import forms, labels, rules
from rlhf_jax.people.leases import Refused


@dataclasses.dataclass(frozen=True)
class Turn:
    """The messages of a person and the answers, in the order in which the page shows them."""

    id: int  # of its assignment
    message: str
    responses: list[str]
    strength: int | None = None  # that of the comparison, as shown; None: not compared yet

    def chosen(self) -> str:
        """The answer with which the conversation goes on."""
        return self.responses[(self.strength or 0) > 0]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """How a chat task stands."""

    opening: str | list[dict[str, str]]  # a topic for the person, or messages
    turns: list[Turn]
    least: int  # number of turns

    def messages(self) -> list[dict[str, str]]:
        """The dialogue so far; a turn that is not compared yet is no part of it."""
        found = [] if isinstance(self.opening, str) else list(self.opening)
        for turn in self.turns:
            if turn.strength is not None:
                found.append({"role": "user", "content": turn.message})
                found.append({"role": "assistant", "content": turn.chosen()})
        return found


def read(db: sqlite3.Connection, person: int, item: int) -> Conversation:
    """The conversation that a person has in a chat task; Refused for the item of another task."""
    row = db.execute("SELECT task, prompt FROM items WHERE id = ?", (item,)).fetchone()
    if row["task"] != "chat":
        raise Refused("foreign", "this task is no conversation")
    found = db.execute(
        "SELECT turn.id, turn.shown, turn.state, prompt, responses, (SELECT answer FROM counting WHERE assignment ="
        " turn.id) AS answer FROM assignments AS turn"
        " JOIN items ON items.id = turn.item WHERE turn.person = ? AND turn.kind = 'turn' AND turn.slot = ?"
        " AND turn.state IN ('asked', 'done') AND turn.id >"
        " (SELECT MIN(id) FROM assignments WHERE item = ? AND person = ?) ORDER BY turn.id",
        (person, item, item, person),
    )
    turns = []
    for turn in found:
        shown, responses = json.loads(turn["shown"]), json.loads(turn["responses"])
        answer = forms.displayed(json.loads(turn["answer"]), shown) if turn["answer"] else {}
        turns.append(
            Turn(
                id=turn["id"],
                message=json.loads(turn["prompt"])[-1]["content"],
                responses=[responses[k] for k in shown],
                strength=answer.get("strength"),
            )
        )
    return Conversation(json.loads(row["prompt"]), turns, rules.newest(db).turns)


def end(db: sqlite3.Connection, person: int, item: int) -> dict[str, Any]:
    """The fields of the label of a conversation, which the person ends; InputError for one that is too short."""
    conversation = read(db, person, item)
    done = sum(turn.strength is not None for turn in conversation.turns)
    if done < conversation.least:
        raise InputError(f"turns: expected at least {conversation.least} in a conversation, got {done}")
    drop(db, person, item)
    return {"turns": done, "messages": conversation.messages()}


def drop(db: sqlite3.Connection, person: int, item: int, after: int = 0) -> None:
    """End the turns of a conversation, beyond the assignment `after`, that are not judged."""
    db.execute(
        "UPDATE assignments SET state = 'skipped' WHERE person = ? AND kind = 'turn' AND slot = ? AND id > ?"
        " AND state = 'asked'",
        (person, item, after),
    )


def withdraw(db: sqlite3.Connection, held: sqlite3.Row, label: int, now: float) -> None:
    """Withdraw the label of a turn; what came after it in its conversation is no part of that any more."""
    if held["slot"] is not None:
        drop(db, held["person"], held["slot"], held["id"])
    labels.withdraw(db, label, held["person"], now)
    db.execute("UPDATE assignments SET state = 'asked' WHERE id = ?", (held["id"],))
