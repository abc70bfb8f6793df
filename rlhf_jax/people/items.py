"""Items, which people are asked about: what one must be like, and its row in a store."""

import dataclasses
import hashlib
import json
import sqlite3
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.people import forms
from rlhf_jax.people.schema import encoded

_FEWEST: dict[forms.Task, int] = {
    "rank": 2,
    "compare": 2,
    "best": 2,
    "arena": 2,
    "demonstrate": 0,
    "chat": 0,
    "thumb": 1,
}  # responses to an item
_MOST = 26  # as many as there are letters
_EXACT = ("compare", "arena", "chat", "thumb")  # tasks on the fewest responses, and no more


@dataclasses.dataclass(frozen=True)
class Item:
    """Something to ask about."""

    prompt: Any  # text or messages
    responses: tuple[str, ...] = ()
    task: forms.Task = "rank"
    models: tuple[str, ...] | None = None  # the name of each response's model, which people are not shown
    ended: tuple[bool, ...] | None = None  # False for a response that was cut
    gold: tuple[int, ...] | None = None  # the known ranks of the responses
    round: int = 0
    overlap: int = 1  # number of people who answer
    number: int = 0  # tells apart items that ask the same

    def key(self) -> bytes:
        """The hash that tells whether the same is being asked twice."""
        asked = [self.round, self.task, self.prompt, self.responses, self.gold, *filter(None, [self.number])]
        if self.task == "arena":  # other models may have said the same
            asked.append(self.models)
        return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).digest()


def check(item: Item) -> None:
    """Raise InputError for an item that cannot be asked about."""
    least = _FEWEST.get(item.task)
    if least is None:
        raise InputError(f"task {item.task}: expected one of {', '.join(forms.TASKS)}")
    count = len(item.responses)
    most = least if item.task in _EXACT else _MOST
    if not least <= count <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise InputError(f"task {item.task}: expected {wanted} responses")
    if item.task == "arena" and (not item.models or len(set(item.models)) != 2):
        raise InputError(f"task arena: expected models, the names of 2 that differ, got {item.models}")
    if item.gold is not None and item.task in ("chat", "thumb"):
        raise InputError(f"gold: a task {item.task} has no known order")
    for name, given in (("models", item.models), ("ended", item.ended), ("gold", item.gold)):
        if given is not None and len(given) != count:
            raise InputError(f"{name}: expected {count}, one per response, got {len(given)}")
    if item.overlap < 1:
        raise InputError(f"overlap={item.overlap}: expected at least 1")


def insert(db: sqlite3.Connection, item: Item, key: bytes, read: str, now: float) -> sqlite3.Cursor:
    """Add the row of an item, unless there is one of this `key`; `read` is the prompt as far as people read it."""
    values = (
        key,
        item.round,
        item.task,
        encoded(item.prompt),
        encoded(item.responses),
        *(None if given is None else encoded(given) for given in (item.models, item.ended, item.gold)),
        sum(len(text.split()) for text in (read, *item.responses)),
        item.overlap,
        now,
    )
    return db.execute(
        "INSERT OR IGNORE INTO items (key, round, task, prompt, responses, models, ended, gold, words, overlap,"
        f" created) VALUES ({', '.join('?' * len(values))})",
        values,
    )


def of_row(row: sqlite3.Row) -> Item:
    """The item of a row, without what says how often it is asked."""
    return Item(
        prompt=json.loads(row["prompt"]),
        responses=tuple(json.loads(row["responses"])),
        task=row["task"],
        models=tuple(json.loads(row["models"])) if row["models"] else None,
        ended=tuple(json.loads(row["ended"])) if row["ended"] else None,
        round=row["round"],
    )
