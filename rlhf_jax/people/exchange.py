"""JSON Lines in and out of a store: what to ask, and what people answered in the shapes that training reads.

In, a row is {"prompt"} (somebody writes the response) or {"prompt", "responses": [K]}, perhaps with "task", "models",
"ended", "round", "overlap" and, where the answer is known, "gold": [K] ranks. Out, a row is a ranking, a demonstration,
a thumb or a dialogue (`forms.rows`), with who answered, when, how long it took, what was shown in which order, and the
ratings.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, adjudication, forms, items
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Kind
from rlhf_jax.people.store import Store

Adjudicated = Literal["yes", "no", "only"]

_ROLES = ("system", "user", "assistant")
_FIELDS = ("prompt", "responses", "task", "models", "ended", "round", "overlap", "gold")


# -- in ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How many people answer an item: `people` on a share of items, one on the others."""

    people: int = 1
    share: float = 1.0

    def of(self, item: Item) -> int:
        """The number of people for an item, by its content, so that a file read again gives the same."""
        return self.people if int.from_bytes(item.key()[:4]) < self.share * 2**32 else 1


def read_items(path: Path, task: forms.Task | None = None, overlap: Overlap | None = None) -> Iterator[Item]:
    """Yield the items of a file; InputError, with file, line and field, for a row that is wrong.

    `task` is asked of rows that name none; without it, demonstrate without responses, and rank with some.
    """
    overlap = overlap or Overlap()
    empty = True
    for where, row in _lines(path):
        empty = False
        try:
            yield _item(row, task, overlap)
        except InputError as error:
            raise InputError(f"{where}, {error}") from None
    if empty:
        raise InputError(f"{path}: expected rows with a prompt, got an empty file")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: expected a JSON object in UTF-8, got {line[:60]!r}") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _item(row: Any, task: forms.Task | None, overlap: Overlap) -> Item:
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {str(row)[:60]}")
    if "chosen" in row or "text" in row or "messages" in row:
        raise InputError(f"field prompt: expected rows with a prompt to ask about, got one with {sorted(row)}")
    for name in row.keys() & {"round", "overlap"}:
        if type(row[name]) is not int or not 0 <= row[name] < 2**31:
            raise InputError(f"field {name}: expected a whole number, got {str(row[name])[:60]}")
    responses = tuple(_text(one, f"responses[{k}]") for k, one in enumerate(_listed(row, "responses") or ()))
    asked = row.get("task") or (
        task if task and (responses or task == "chat") else "rank" if responses else "demonstrate"
    )
    if asked not in forms.TASKS:
        raise InputError(f"field task: expected one of {', '.join(forms.TASKS)}, got {str(asked)[:60]}")
    models, ended, gold = (_listed(row, name) for name in ("models", "ended", "gold"))
    if models is not None:
        models = [_text(one, f"models[{k}]") for k, one in enumerate(models)]
    if ended is not None and not all(type(one) is bool for one in ended):
        raise InputError("field ended: expected booleans, one per response")
    if gold is not None and not all(type(one) is int and one >= 0 for one in gold):
        raise InputError("field gold: expected ranks, one per response")
    item = Item(
        prompt=_opening(row) if asked == "chat" else _prompt(row),
        responses=responses,
        task=asked,
        models=None if models is None else tuple(models),
        ended=None if ended is None else tuple(ended),
        gold=None if gold is None else tuple(gold),
        round=row.get("round", 0),
    )
    item = dataclasses.replace(item, overlap=row.get("overlap") or overlap.of(item))
    items.check(item)
    return item


def _listed(row: dict[str, Any], name: str) -> list[Any] | None:
    value = row.get(name)
    if value is not None and not isinstance(value, list):
        raise InputError(f"field {name}: expected a list, got {str(value)[:60]}")
    return value


def _text(value: Any, name: str) -> str:
    return forms.text(value, f"field {name}")


def _opening(row: dict[str, Any]) -> Any:
    """The topic of a conversation, for the person alone, or the messages that it begins with."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and prompt[-1].get("role") != "user":
        return [*_prompt({"prompt": [*prompt, {"role": "user", "content": ""}]})][:-1]
    if isinstance(prompt, list):
        raise InputError(
            "field prompt: expected the last message of a chat's beginning to be no user's: people write it"
        )
    return _prompt(row)


def _prompt(row: dict[str, Any]) -> Any:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return _text(prompt, "prompt")
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"field prompt: expected text or a list of messages, got {str(prompt)[:60]}")
    for n, message in enumerate(prompt):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise InputError(f'field prompt[{n}]: expected {{"role", "content"}}, got {str(message)[:60]}')
        _text(message.get("content"), f"prompt[{n}].content")
    if prompt[-1]["role"] == "assistant":
        raise InputError("field prompt: expected its last message to come from the user, got assistant")
    return prompt


# -- out ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Filter:
    """The labels to read: all that count, unless a field says otherwise."""

    round: int | None = None
    person: str | None = None  # by name
    task: str | None = None
    gold: float = 0.0  # only people with at least this gold accuracy
    aside: bool = False  # also labels of people who were set aside
    kind: Kind = "slot"  # also "turn", what is said of a model in a chat; "gold" and "repeat" check a person
    adjudicated: Adjudicated = "yes"  # a decision in place of people's answers; "no" decision, or decisions "only"

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """The filter that "person=ann&round=2" spells; InputError for one that is wrong.

        A character that has a meaning here or in an address stands by its number: "person=Ann%26Bob", for "Ann&Bob".
        """
        values = dict[str, str]()
        for part in filter(None, text.split("&")):
            name, equals, value = part.partition("=")
            value = urllib.parse.unquote(value)
            if not equals or name in values or name not in {field.name for field in dataclasses.fields(cls)}:
                names = ", ".join(field.name for field in dataclasses.fields(cls))
                raise InputError(f"filter {part!r}: expected, for instance, person=ann&round=2, of {names}")
            values[name] = value
        kind, task, adjudicated = values.get("kind", "slot"), values.get("task"), values.get("adjudicated", "yes")
        try:
            number, gold = int(values.get("round", 0)), float(values.get("gold", 0))
        except ValueError:
            raise InputError(f"filter {text!r}: expected a whole number for round and a share for gold") from None
        if kind not in get_args(Kind) or task not in (None, *forms.TASKS) or not 0 <= gold <= 1:
            raise InputError(
                f"filter {text!r}: expected kind in {', '.join(get_args(Kind))}, task in {', '.join(forms.TASKS)},"
                " gold from 0 to 1"
            )
        if adjudicated not in get_args(Adjudicated):
            raise InputError(f"filter {text!r}: expected adjudicated in {', '.join(get_args(Adjudicated))}")
        if kind != "slot" and adjudicated == "only":
            raise InputError(f"filter {text!r}: kind={kind} has no decisions; leave one of the two out")
        return cls(
            round=number if "round" in values else None,
            person=values.get("person"),
            task=task,
            gold=gold,
            aside=values.get("aside", "0") not in ("0", "no", "false"),
            kind=cast(Kind, kind),
            adjudicated=cast(Adjudicated, adjudicated),
        )


def read(path: str | Path, wanted: Filter | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a store's labels, oldest first, each after its kind.

    The kinds are "rankings", "demonstrations", "thumbs" and "dialogues".

    Withdrawn labels and skipped tasks give no row. Raises InputError where there is no such store or person.
    """
    with Store(path, create=False) as store, store.reader() as db:
        yield from labels(db, wanted or Filter())


_LEARNT = {  # fields of a row of each kind
    "rankings": ("prompt", "responses", "ranks", "ended", "ratings", "chosen", "rejected"),
    "demonstrations": ("prompt", "completion"),
    "thumbs": ("prompt", "response", "label", "ended"),
}


def learnt(path: str | Path, wanted: Filter | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the kind and the place of each row of `read`, and those of its fields that training reads.

    A dialogue is none of them: its turns are.
    """
    for kind, row in read(path, wanted):
        if kind != "dialogues":
            number = row["number" if kind == "thumbs" else "label"]
            yield kind, f"label {number}", {name: row[name] for name in _LEARNT[kind] if name in row}


def split(spec: str) -> tuple[str, Filter]:
    """The path and the filter of "PATH?person=ann&round=2"; InputError for a wrong filter."""
    path, _, text = spec.partition("?")
    return path, Filter.parse(text)


def digest(spec: str) -> str:
    """The hash of what training reads from "PATH?filter"; labels that the filter leaves out do not change it."""
    found = hashlib.sha256()
    for kind, _, row in learnt(*split(spec)):
        found.update(json.dumps([kind, row]).encode())
    return found.hexdigest()[:24]


def check(db: sqlite3.Connection, wanted: Filter) -> None:
    """Raise InputError for a filter that names somebody whom the store does not know."""
    if wanted.person is not None and not db.execute("SELECT 1 FROM people WHERE name = ?", (wanted.person,)).fetchone():
        raise InputError(
            f"person {wanted.person}: the store has nobody of that name; the administrator's page lists all names,"
            " in which & is written %26"
        )


def labels(
    db: sqlite3.Connection, wanted: Filter, order: Literal["id", "item"] = "id"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read`, over an open connection; in order of item if that is wanted."""
    check(db, wanted)
    aside, restored = acts.last(db, "aside"), acts.last(db, "restored")
    chosen = {
        "no": "labels.kind IN (?, ?)",
        "yes": "(labels.kind IN (?, ?) AND labels.item NOT IN (SELECT item FROM standing)"
        " OR labels.id IN (SELECT label FROM standing))",
        "only": "'slot' IN (?, ?) AND labels.id IN (SELECT label FROM standing)",
    }["no" if wanted.kind != "slot" else wanted.adjudicated]
    query = (
        f"WITH standing AS ({adjudication.STANDING})"
        " SELECT labels.*, items.round, items.task, items.prompt, items.responses, items.models, items.ended,"
        " people.name, people.aside, shown FROM counting AS labels JOIN items ON items.id = labels.item"
        " JOIN people ON people.id = labels.person"
        " JOIN assignments ON assignments.id = labels.assignment"
        f" WHERE {chosen}"
        " AND (assignments.state = 'done' OR (assignments.state = 'aside' AND ?))"
        " AND (? OR people.aside IS NULL)"
        " AND (? IS NULL OR items.round = ?) AND (? IS NULL OR people.name = ?) AND (? IS NULL OR items.task = ?)"
        " AND (? <= 0 OR labels.kind = 'adjudicate' OR people.id IN"
        " (SELECT person FROM tallies WHERE kind = 'gold' AND pairs > 0 AND agreed >= ? * pairs))"
        f" ORDER BY labels.{order}, labels.id"
    )
    values = (
        wanted.kind,
        "turn" if wanted.kind == "slot" else wanted.kind,
        wanted.aside,
        wanted.aside,
        *(wanted.round, wanted.round),
        *(wanted.person, wanted.person),
        *(wanted.task, wanted.task),
        *(wanted.gold, wanted.gold),
    )
    for label in db.execute(query, values):
        answer = json.loads(label["answer"])
        responses = json.loads(label["responses"])
        about = _about(label, answer)
        if label["aside"] is not None and (act := aside.get(label["person"])):
            about |= {"set_aside": act.why, "set_aside_by": act.by}
        elif (act := restored.get(label["person"])) and label["id"] <= act.label:
            about |= {"restored_by": act.by}
        for kind, row in forms.rows(label["task"], json.loads(label["prompt"]), responses, answer):
            ended = json.loads(label["ended"]) if label["ended"] else None
            if ended and label["task"] != "demonstrate" and kind == "rankings":
                row["ended"] = ended if "responses" in row else [ended[responses.index(row["chosen"])],
                                                                ended[responses.index(row["rejected"])]]  # fmt: skip
            if kind == "thumbs":  # whose `label` is what was said
                row |= {"number": about["label"]} | ({"ended": ended[0]} if ended else {})
            yield kind, row | about | row


def _about(label: sqlite3.Row, answer: dict[str, Any]) -> dict[str, Any]:
    """The facts about a label beside its row."""
    said = dict[str, Any]()
    for name in ("strength", "verdict", "prompt_flags", "confidence", "note", "edited", "turns"):
        if name in answer:
            said[name] = answer[name]
    if any(answer.get("ratings", ())):
        said["ratings"] = answer["ratings"]
    if label["models"]:
        said["models"] = json.loads(label["models"])
    if label["kind"] == "adjudicate":
        said["decided_by"] = label["name"]
        said |= {"taken": answer["taken"]} if "taken" in answer else {}
    return said | {
        "task": label["task"],
        "person": label["name"],
        "round": label["round"],
        "item": label["item"],
        "label": label["id"],
        "shown": json.loads(label["shown"]),
        "started": round(label["started"], 3),
        "submitted": round(label["created"], 3),
        "seconds": round(label["seconds"], 3),
        "too_fast": bool(label["fast"]),
    }


def export(path: Path, out: Path, wanted: Filter | None = None) -> dict[str, int]:
    """Write the rows of a store to a JSON Lines file, whole or not at all; returns how many there are of each kind.

    Decisions, of which there may be none, are rankings and are counted again.
    """
    counts, decided = {"rankings": 0, "demonstrations": 0}, 0
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for kind, row in read(path, wanted):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[kind] = counts.get(kind, 0) + 1
                decided += "decided_by" in row
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    return counts | ({"decisions among them": decided} if decided else {})
