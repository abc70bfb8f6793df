"""What people are asked and what they answered, in one SQLite file.

Labels are appended and never changed: triggers refuse it. An undo is a row that withdraws a label. Every write is one
transaction, and a label has reached the disk before it is acknowledged (WAL, synchronous=FULL), so an answer that a
page reported as stored survives a killed server and a power cut. Several processes may have a store open at once.

A person answers through an *assignment*: an item, the order in which its responses were shown, and a lease. An item
with overlap n has n slots, each held by one person at a time; a slot whose lease ran out goes to whoever asks next.
Gold and repeated items are assigned beside the slots.

What a model answers to a person is an item of overlap 0, with an assignment of the kind "turn" which that person may
judge. The `slot` of a turn is the item of the chat task that it belongs to, so a conversation is what these say.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import json
import os
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.people import agreement, forms
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Rate, Settings

VERSION = 1  # of the schema
_APPLICATION = 0x70656F70  # marks an SQLite file as a store
_SESSION = 30 * 86400.0  # seconds that a browser stays signed in
_RECENT = 5  # answers of a person that are not yet repeated

Role = Literal["labeler", "administrator"]
Kind = Literal["slot", "gold", "repeat", "turn"]

_SCHEMA = """
CREATE TABLE rules (id INTEGER PRIMARY KEY, body TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE people (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, role TEXT NOT NULL, token BLOB UNIQUE, created REAL NOT NULL,
    revoked REAL, aside REAL, why TEXT, last INTEGER NOT NULL DEFAULT 0, asked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE sessions (token BLOB PRIMARY KEY, person INTEGER NOT NULL REFERENCES people, expires REAL NOT NULL);
CREATE INDEX sessions_person ON sessions(person);
CREATE TABLE items (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, round INTEGER NOT NULL, task TEXT NOT NULL, prompt TEXT NOT NULL,
    responses TEXT NOT NULL, models TEXT, ended TEXT, gold TEXT, words INTEGER NOT NULL, overlap INTEGER NOT NULL,
    taken INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL
);
CREATE INDEX items_open ON items(id, overlap, taken) WHERE taken < overlap AND gold IS NULL;
CREATE INDEX items_gold ON items(id) WHERE gold IS NOT NULL;
CREATE TABLE freed (item INTEGER PRIMARY KEY REFERENCES items);  -- items with a slot that came back
CREATE TABLE assignments (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, person INTEGER NOT NULL REFERENCES people,
    kind TEXT NOT NULL, slot INTEGER, shown TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL,
    state TEXT NOT NULL  -- open, done, skipped, expired, aside; asked: a turn that is not judged
);
CREATE UNIQUE INDEX slot_has_one_person ON assignments(item, slot) WHERE kind = 'slot' AND state IN ('open', 'done');
CREATE UNIQUE INDEX person_has_one_slot ON assignments(item, person)
    WHERE kind = 'slot' AND state IN ('open', 'done', 'skipped');
CREATE UNIQUE INDEX person_has_one_task ON assignments(person) WHERE state = 'open';
CREATE INDEX assignments_item ON assignments(item, person);
CREATE INDEX assignments_person ON assignments(person, id);
CREATE INDEX leases ON assignments(expires) WHERE state = 'open';
CREATE TABLE labels (
    id INTEGER PRIMARY KEY, assignment INTEGER NOT NULL REFERENCES assignments, item INTEGER NOT NULL REFERENCES items,
    person INTEGER NOT NULL REFERENCES people, kind TEXT NOT NULL, submission TEXT NOT NULL, answer TEXT NOT NULL,
    started REAL NOT NULL, created REAL NOT NULL, seconds REAL NOT NULL, fast INTEGER NOT NULL,
    agreed INTEGER, pairs INTEGER,  -- with gold, or with the person's own earlier answer; agreed may be half a pair
    UNIQUE (person, submission)
);
CREATE INDEX labels_item ON labels(item);
CREATE INDEX labels_person ON labels(person, created);
CREATE INDEX labels_checked ON labels(person, kind) WHERE pairs IS NOT NULL;
CREATE INDEX labels_created ON labels(created);
CREATE TABLE withdrawals (label INTEGER PRIMARY KEY REFERENCES labels, person INTEGER NOT NULL, created REAL NOT NULL);
CREATE TRIGGER labels_stay BEFORE UPDATE ON labels BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER labels_last BEFORE DELETE ON labels BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER withdrawals_stay BEFORE UPDATE ON withdrawals BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER withdrawals_last BEFORE DELETE ON withdrawals BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TABLE drafts (
    person INTEGER NOT NULL, item INTEGER NOT NULL, body TEXT NOT NULL, saved REAL NOT NULL, PRIMARY KEY (person, item)
);
CREATE TABLE guidelines (version INTEGER PRIMARY KEY, text TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE acknowledgements (
    person INTEGER NOT NULL, version INTEGER NOT NULL, created REAL NOT NULL, PRIMARY KEY (person, version)
);
"""


class Refused(InputError):
    """A request that the store turns down, although it is well formed. `code` names the reason for the page."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Rules(Settings):
    """How tasks are given out and what is expected of people; a change holds from the next task on."""

    ratings: forms.Ratings = "all"  # that each response of a ranking needs before it can be ranked
    lease: Positive = 1800.0  # seconds without a sign of life after which a task goes to somebody else
    gold_share: Rate = 0.05  # of tasks, that have a known answer
    repeat_share: Rate = 0.05  # of tasks, that the person has answered before
    gold_least: Fraction = 0.0  # gold accuracy below which a person gets no more tasks; 0 turns this off
    gold_count: Count = 5  # gold answers before that is decided
    self_least: Fraction = 0.0  # agreement with oneself below which a person gets no more tasks; 0 turns this off
    self_count: Count = 5  # repeated answers before that is decided
    turns: Count = 3  # that a conversation has at least
    reading: NonNegative = 15.0  # words a second; who answers sooner than in words / reading is noted as too fast


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


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody with a link."""

    id: int
    name: str
    role: Role
    aside: bool = False  # gets no more tasks


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A task that a person holds, with the responses in the order in which the page shows them."""

    id: int
    item: int
    task: forms.Task
    prompt: Any
    responses: list[str]
    draft: Any  # what the page last saved, or None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a person wrote, and the answers, in the order in which the page shows them."""

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


@dataclasses.dataclass(frozen=True)
class Pace:
    """How far a person has come."""

    done: int  # answers
    today: int  # answers since midnight
    seconds: float  # the median of the last 20 answers
    left: int  # answers that are wanted, from anybody


class Store:
    """An open store. Methods may be called from any thread."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time, create: bool = True):
        """Open the store at `path`, and create it if there is none and `create`.

        Raises InputError for a file that is no store, one of a newer version, or one that cannot be written.
        """
        self.path, self._clock, self._lock = Path(path), clock, threading.RLock()
        self._remaining = (-1e9, 0)
        if not create and not self.path.is_file():
            raise InputError(f"{path}: no such store; start scripts/people.sh with --db {path}, or name another")
        try:
            self._db = _connect(self.path)
        except sqlite3.Error as error:
            raise InputError(f"{path}: cannot be opened as a store ({error})") from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            raise InputError(f"{path}: cannot be used as a store ({error})") from error
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        with self._write() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if not tables and not application:
                for statement in _statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif application != _APPLICATION:
                raise InputError(f"{self.path}: an SQLite file, but no store of labels; name another by --db")
            elif version > VERSION:
                raise InputError(
                    f"{self.path}: written by a newer version of this project (schema {version}, here {VERSION});"
                    " update the project, or name another file by --db"
                )

    @contextlib.contextmanager
    def _write(self, lasting: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when this returns, or else undone as a whole.

        One that is not `lasting` survives a kill too, but perhaps no power cut, and takes a tenth of the time.
        """
        with self._lock:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def tidy(self) -> None:
        """Move what was written from the log into the file, beside readers and writers: call it every few seconds."""
        db = _connect(self.path)
        try:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            db.close()

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for reading, so that a long query holds up nobody; it sees one moment."""
        db = _connect(self.path)
        try:
            db.execute("PRAGMA query_only = 1")
            db.execute("BEGIN")
            yield db
        finally:
            db.close()

    def writer(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """One transaction that may change the store, on the disk when the context ends, or else undone as a whole."""
        return self._write()

    def now(self) -> float:
        """The time, in seconds since 1970."""
        return self._clock()

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        with self._lock:
            return self._db.execute(query, values).fetchone()

    # -- rules and guidelines ------------------------------------------------------------------------------------------

    def rules(self) -> Rules:
        """The rules that hold now."""
        row = self._one("SELECT body FROM rules ORDER BY id DESC LIMIT 1")
        return Rules(**json.loads(row["body"])) if row else Rules()

    def set_rules(self, rules: Rules) -> None:
        """Let `rules` hold from now on; the former ones stay on record."""
        if rules != self.rules():
            with self._write() as db:
                body = json.dumps(dataclasses.asdict(rules))
                db.execute("INSERT INTO rules (body, created) VALUES (?, ?)", (body, self._clock()))

    def guidelines(self) -> tuple[int, str]:
        """The newest version of the guidelines and their text, in Markdown; version 0 is none."""
        row = self._one("SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1")
        return (row["version"], row["text"]) if row else (0, "")

    def set_guidelines(self, text: str) -> int:
        """Add a version of the guidelines, which people acknowledge before their next task; returns its number."""
        version, before = self.guidelines()
        if text.strip() == before:
            return version
        with self._write() as db:
            db.execute("INSERT INTO guidelines (text, created) VALUES (?, ?)", (text.strip(), self._clock()))
        return self.guidelines()[0]

    def acknowledge(self, person: int, version: int) -> None:
        """Record that a person has read a version of the guidelines."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO acknowledgements VALUES (?, ?, ?)", (person, version, self._clock()))

    def has_acknowledged(self, person: int) -> bool:
        """Whether a person has read the newest guidelines, or there are none."""
        version, _ = self.guidelines()
        found = self._one("SELECT 1 FROM acknowledgements WHERE person = ? AND version = ?", person, version)
        return version == 0 or found is not None

    # -- people --------------------------------------------------------------------------------------------------------

    def invite(self, name: str, role: Role = "labeler") -> str:
        """Add a person, or give one who is there a new link; returns the token, which is stored as a hash alone."""
        name = " ".join(name.split())
        if not 1 <= len(name) <= 80:
            raise InputError("name: expected 1 to 80 characters")
        token = secrets.token_urlsafe(32)
        with self._write() as db:
            row = db.execute("SELECT id, role FROM people WHERE name = ?", (name,)).fetchone()
            if row is None:
                values = (name, role, _hash(token), self._clock())
                db.execute("INSERT INTO people (name, role, token, created) VALUES (?, ?, ?, ?)", values)
            elif row["role"] != role:
                raise InputError(f"name {name}: is taken by a person of another role")
            else:
                db.execute("UPDATE people SET token = ?, revoked = NULL WHERE id = ?", (_hash(token), row["id"]))
        return token

    def revoke(self, person: int) -> None:
        """End a person's access; their labels stay and their task goes back."""
        with self._write() as db:
            db.execute("UPDATE people SET revoked = ?, token = NULL WHERE id = ?", (self._clock(), person))
            db.execute("DELETE FROM sessions WHERE person = ?", (person,))
            for row in db.execute(
                "SELECT * FROM assignments WHERE person = ? AND state = 'open'", (person,)
            ).fetchall():
                self._release(db, row, "expired")

    def enter(self, token: str) -> str | None:
        """Exchange the token of a link for that of a session; None if it is unknown or revoked."""
        digest = _hash(token)
        with self._write() as db:
            row = db.execute("SELECT id, token FROM people WHERE token = ? AND revoked IS NULL", (digest,)).fetchone()
            if row is None or not hmac.compare_digest(row["token"], digest):
                return None
            session, now = secrets.token_urlsafe(32), self._clock()
            db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
            db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (_hash(session), row["id"], now + _SESSION))
            return session

    def leave(self, session: str) -> None:
        """End a session."""
        with self._write() as db:
            db.execute("DELETE FROM sessions WHERE token = ?", (_hash(session),))

    def person(self, session: str) -> Person | None:
        """The person of a session; None if it has ended or was revoked."""
        digest = _hash(session)
        row = self._one(
            "SELECT people.*, sessions.token AS session FROM sessions JOIN people ON people.id = sessions.person"
            " WHERE sessions.token = ? AND expires > ? AND revoked IS NULL",
            digest,
            self._clock(),
        )
        if row is None or not hmac.compare_digest(row["session"], digest):
            return None
        return Person(row["id"], row["name"], row["role"], row["aside"] is not None)

    def set_aside(self, person: int, why: str) -> None:
        """Give a person no more tasks, and others the slots that the person filled. The labels stay on record."""
        with self._write() as db:
            self._set_aside(db, person, why)

    def _set_aside(self, db: sqlite3.Connection, person: int, why: str) -> None:
        db.execute("UPDATE people SET aside = ?, why = ? WHERE id = ? AND aside IS NULL", (self._clock(), why, person))
        query = "SELECT * FROM assignments WHERE person = ? AND state IN ('open', 'done') AND kind = 'slot'"
        for row in db.execute(query, (person,)).fetchall():
            self._release(db, row, "aside" if row["state"] == "done" else "expired")

    def restore(self, person: int) -> None:
        """Let a person who was set aside go on, and their labels count again."""
        with self._write() as db:
            db.execute("UPDATE people SET aside = NULL, why = NULL WHERE id = ?", (person,))
            query = "SELECT * FROM assignments WHERE person = ? AND state = 'aside'"
            for row in db.execute(query, (person,)).fetchall():
                values = (_free_slot(db, row["item"]), row["id"])
                db.execute("UPDATE assignments SET state = 'done', slot = ? WHERE id = ?", values)
                db.execute("UPDATE items SET taken = taken + 1 WHERE id = ?", (row["item"],))

    # -- items ---------------------------------------------------------------------------------------------------------

    def add(self, items: Iterable[Item]) -> tuple[int, int]:
        """Add items, in one transaction; returns how many, and how many are there already. InputError for a bad one."""
        added = present = 0
        with self._write() as db:
            for item in items:
                check_item(item)
                values = (
                    item.key(),
                    item.round,
                    item.task,
                    _json(item.prompt),
                    _json(item.responses),
                    _json_or_null(item.models),
                    _json_or_null(item.ended),
                    _json_or_null(item.gold),
                    len(_json(item.prompt).split()) + sum(len(response.split()) for response in item.responses),
                    item.overlap,
                    self._clock(),
                )
                done = db.execute(
                    "INSERT OR IGNORE INTO items (key, round, task, prompt, responses, models, ended, gold, words,"
                    f" overlap, created) VALUES ({', '.join('?' * len(values))})",
                    values,
                )
                added, present = added + done.rowcount, present + 1 - done.rowcount
        return added, present

    def set_overlap(self, wanted: Mapping[int, int]) -> None:
        """Change how many people answer items, by number; who has a task by now may finish it."""
        with self._write() as db:
            for item, overlap in wanted.items():
                query = "UPDATE items SET overlap = ? WHERE id = ? AND overlap != ?"
                if db.execute(query, (overlap, item, overlap)).rowcount:
                    db.execute("DELETE FROM freed WHERE item = ?", (item,))
                    db.execute("INSERT INTO freed SELECT id FROM items WHERE id = ? AND taken < overlap", (item,))

    def has_items(self) -> bool:
        """Whether there is anything to ask about."""
        return self._one("SELECT 1 FROM items WHERE overlap > 0 LIMIT 1") is not None

    # -- assignments ---------------------------------------------------------------------------------------------------

    def task(self, person: int) -> Assignment | None:
        """The task that a person holds, or the next one, with a fresh lease; None if nothing is left for them."""
        with self._write(lasting=False) as db:
            now, rules = self._clock(), self.rules()
            query = "SELECT * FROM assignments WHERE state = 'open' AND expires < ?"
            for row in db.execute(query, (now,)).fetchall():
                self._release(db, row, "expired")
            row = db.execute("SELECT id FROM assignments WHERE person = ? AND state = 'open'", (person,)).fetchone()
            found = row["id"] if row else self._assign(db, person, rules)
            if found is None:
                return None
            db.execute("UPDATE assignments SET expires = ? WHERE id = ?", (now + rules.lease, found))
            return self._assignment(db, found)

    def _assignment(self, db: sqlite3.Connection, number: int) -> Assignment:
        row = db.execute(
            "SELECT assignments.*, task, prompt, responses, body FROM assignments"
            " JOIN items ON items.id = assignments.item"
            " LEFT JOIN drafts ON drafts.person = assignments.person AND drafts.item = assignments.item"
            " WHERE assignments.id = ?",
            (number,),
        ).fetchone()
        responses = json.loads(row["responses"])
        return Assignment(
            id=number,
            item=row["item"],
            task=row["task"],
            prompt=json.loads(row["prompt"]),
            responses=[responses[k] for k in json.loads(row["shown"])],
            draft=json.loads(row["body"]) if row["body"] else None,
        )

    def _assign(self, db: sqlite3.Connection, person: int, rules: Rules) -> int | None:
        """A new assignment; None if nothing is left, or the person is set aside."""
        row = db.execute("SELECT * FROM people WHERE id = ?", (person,)).fetchone()
        if row["aside"] is not None:
            return None
        rng = random.Random(f"{person}/{row['asked']}")
        draw = rng.random()
        kind: Kind = "slot"
        item, last = None, row["last"]
        if draw < rules.gold_share:
            kind, item = "gold", _gold_item(db, person)
        elif draw < rules.gold_share + rules.repeat_share:
            kind, item = "repeat", _own_item(db, person, rng)
        if item is None:
            kind, item, last = "slot", *_open_item(db, person, last)
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
        slot = None
        if kind == "slot":
            slot = _free_slot(db, item)
            self._take(db, item)
        db.execute("UPDATE people SET asked = asked + 1, last = ? WHERE id = ?", (last, person))
        values = (item, person, kind, slot, shown, self._clock(), self._clock() + rules.lease)
        return db.execute(
            "INSERT INTO assignments (item, person, kind, slot, shown, created, expires, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'open')",
            values,
        ).lastrowid

    def _take(self, db: sqlite3.Connection, item: int) -> None:
        db.execute("UPDATE items SET taken = taken + 1 WHERE id = ?", (item,))
        full = db.execute("SELECT 1 FROM items WHERE id = ? AND taken >= overlap", (item,)).fetchone()
        if full:
            db.execute("DELETE FROM freed WHERE item = ?", (item,))

    def _release(self, db: sqlite3.Connection, row: sqlite3.Row, state: str) -> None:
        """End an assignment without a label, and give its slot back."""
        db.execute("UPDATE assignments SET state = ? WHERE id = ?", (state, row["id"]))
        if row["kind"] == "slot":
            db.execute("UPDATE items SET taken = taken - 1 WHERE id = ?", (row["item"],))
            db.execute("INSERT OR IGNORE INTO freed VALUES (?)", (row["item"],))

    def _release_held(self, db: sqlite3.Connection, person: int) -> None:
        """Give back the task that a person holds, if any."""
        for row in db.execute("SELECT * FROM assignments WHERE person = ? AND state = 'open'", (person,)).fetchall():
            self._release(db, row, "expired")

    def _held(self, db: sqlite3.Connection, person: int, number: int) -> sqlite3.Row:
        """The assignment, opened again if its lease ran out and its slot is free; Refused if the person has it not."""
        row = db.execute("SELECT * FROM assignments WHERE id = ?", (number,)).fetchone()
        if row is None or row["person"] != person:
            raise Refused("foreign", "this task was given to somebody else")
        if row["state"] in ("done", "skipped", "aside"):
            raise Refused("answered", "this task has been answered already, perhaps in another tab")
        if row["state"] in ("open", "asked"):
            return row
        other = db.execute("SELECT 1 FROM assignments WHERE person = ? AND state = 'open'", (person,)).fetchone()
        item = db.execute("SELECT taken < overlap FROM items WHERE id = ?", (row["item"],)).fetchone()
        if other or (row["kind"] == "slot" and not item[0]):
            raise Refused("expired", "the time for this task ran out, and somebody else has it now")
        slot = None
        if row["kind"] == "slot":
            slot = _free_slot(db, row["item"])
            self._take(db, row["item"])
        db.execute("UPDATE assignments SET state = 'open', slot = ? WHERE id = ?", (slot, number))
        return row

    def save_draft(self, person: int, number: int, body: Any) -> None:
        """Keep what a person has entered so far, and renew the lease."""
        with self._write(lasting=False) as db:
            row = self._held(db, person, number)
            lease = self._clock() + self.rules().lease
            db.execute("UPDATE assignments SET expires = ? WHERE id = ?", (lease, number))
            values = (person, row["item"], json.dumps(body), self._clock())  # in ASCII: a draft may be no Unicode yet
            db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?, ?)", values)

    # -- labels --------------------------------------------------------------------------------------------------------

    def submit(self, person: int, number: int, submission: str, answer: Any, seconds: float) -> int:
        """Store the answer to an assignment, given in the order shown; returns the label's number.

        `submission` is the page's name for this answer: what is sent twice under one name is stored once. `seconds` is
        the time that the person looked at the task. Raises InputError for an answer that is not whole, Contradiction
        for one that needs to be confirmed, and Refused for a task that the person does not hold.
        """
        check_submission(submission)
        with self._write() as db:
            query = "SELECT id, assignment FROM labels WHERE person = ? AND submission = ?"
            if row := db.execute(query, (person, submission)).fetchone():
                if row["assignment"] != number:
                    raise Refused("foreign", "this name of a submission stands for the answer to another task")
                return row["id"]
            held, now, rules = self._held(db, person, number), self._clock(), self.rules()
            item = db.execute("SELECT * FROM items WHERE id = ?", (held["item"],)).fetchone()
            shown = json.loads(held["shown"])
            answer = forms.restored(forms.checked(item["task"], len(shown), answer, rules.ratings), shown)
            seconds = min(max(0.0, seconds), now - held["created"])
            if item["task"] == "chat" and "skip" not in answer:
                answer |= self._dialogue(db, person, item)
            agreed = pairs = None
            if "skip" not in answer and (known := self._known(db, held, item)):
                ranks = forms.ranks_of(item["task"], answer, len(shown))
                agreed, pairs = (
                    agreement.matched(known, ranks, ties=held["kind"] == "repeat") if ranks else (None, None)
                )
            values = (
                number,
                held["item"],
                person,
                held["kind"],
                submission,
                _json(answer),
                held["created"],
                now,
                seconds,
                int("skip" not in answer and 0 < seconds * rules.reading < item["words"]),
                agreed,
                pairs,
            )
            label = append_label(db, values)
            if "skip" in answer:
                self._release(db, held, "skipped")
            else:
                db.execute("UPDATE assignments SET state = 'done' WHERE id = ?", (number,))
            db.execute("DELETE FROM drafts WHERE person = ? AND item = ?", (person, held["item"]))
            if pairs:
                self._judge(db, person, rules)
            return label

    def _known(self, db: sqlite3.Connection, held: sqlite3.Row, item: sqlite3.Row) -> list[int] | None:
        """The ranks that an answer is held against: gold, or those that the person gave before."""
        if held["kind"] == "gold":
            return json.loads(item["gold"])
        if held["kind"] in ("slot", "turn"):
            return None
        row = db.execute(
            "SELECT answer FROM labels WHERE item = ? AND person = ? AND kind = 'slot'"
            " AND id NOT IN (SELECT label FROM withdrawals) ORDER BY id DESC LIMIT 1",
            (held["item"], held["person"]),
        ).fetchone()
        return (
            forms.ranks_of(item["task"], json.loads(row["answer"]), len(json.loads(item["responses"]))) if row else None
        )

    def _judge(self, db: sqlite3.Connection, person: int, rules: Rules) -> None:
        """Set a person aside who falls below a threshold."""
        limits = (("gold", rules.gold_least, rules.gold_count), ("repeat", rules.self_least, rules.self_count))
        for kind, least, count in limits:
            row = db.execute(
                "SELECT COUNT(*) AS n, SUM(agreed) AS agreed, SUM(pairs) AS pairs FROM labels"
                " WHERE person = ? AND kind = ? AND pairs IS NOT NULL AND id NOT IN (SELECT label FROM withdrawals)",
                (person, kind),
            ).fetchone()
            if row["n"] >= count and row["agreed"] < least * row["pairs"]:
                share = row["agreed"] / row["pairs"]
                self._set_aside(db, person, f"{kind} {share:.2f} < {least:.2f}")

    def undo(self, person: int) -> None:
        """Withdraw a person's last label and open its task again, with the answer as a draft.

        Within a conversation that is its last turn; what was said of a model outside of it stays.
        """
        with self._write() as db:
            label = db.execute(
                "SELECT labels.* FROM labels JOIN assignments ON assignments.id = labels.assignment"
                " WHERE labels.person = ? AND labels.id NOT IN (SELECT label FROM withdrawals)"
                " AND labels.kind != 'adjudicate' AND (labels.kind != 'turn' OR assignments.slot IN"
                " (SELECT item FROM assignments WHERE person = ? AND state = 'open'))"
                " ORDER BY labels.created DESC, labels.id DESC LIMIT 1",
                (person, person),
            ).fetchone()
            if label is None:
                raise Refused("nothing", "there is nothing to undo")
            held = db.execute("SELECT * FROM assignments WHERE id = ?", (label["assignment"],)).fetchone()
            if held["kind"] == "turn":
                self._withdraw(db, held, label["id"])
                return
            if held["state"] not in ("done", "skipped"):
                raise Refused("nothing", "the last answer was set aside and cannot be undone")
            for row in db.execute(
                "SELECT * FROM assignments WHERE person = ? AND state = 'open'", (person,)
            ).fetchall():
                self._release(db, row, "expired")
            db.execute("INSERT INTO withdrawals VALUES (?, ?, ?)", (label["id"], person, self._clock()))
            if held["state"] == "skipped":
                db.execute("UPDATE assignments SET state = 'expired' WHERE id = ?", (held["id"],))
                self._held(db, person, held["id"])
            answer = json.loads(label["answer"])
            draft = {} if "skip" in answer else forms.displayed(answer, json.loads(held["shown"]))
            lease = self._clock() + self.rules().lease
            db.execute("UPDATE assignments SET state = 'open', expires = ? WHERE id = ?", (lease, held["id"]))
            values = (person, held["item"], _json(draft), self._clock())
            db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?, ?)", values)

    # -- turns ---------------------------------------------------------------------------------------------------------

    def turn(self, person: int, name: str, item: Item, shown: Sequence[int], chat: int | None = None) -> int:
        """Record what models answered to a person; returns the number of the assignment by which they may judge it.

        `name` is the page's: what comes twice under one name is recorded once. With the assignment of a `chat` task the
        answers are its next turn, in the place of one that is not judged; Refused if it has gone on in the meantime.
        """
        check_item(item)
        key = hashlib.sha256(json.dumps([person, name]).encode()).digest()
        with self._write() as db:
            query = "SELECT assignments.id, responses FROM items JOIN assignments ON item = items.id WHERE key = ?"
            if row := db.execute(query, (key,)).fetchone():
                if row["responses"] != _json(item.responses):
                    raise Refused("moved", "other answers have been recorded under this name")
                return row["id"]
            now, about = self._clock(), None
            if chat is not None:
                held = self._held(db, person, chat)
                about = held["item"]
                if item.prompt[:-1] != self._conversation(db, person, about).messages():
                    raise Refused("moved", "the conversation has gone on, perhaps in another tab")
                self._drop(db, person, about, 0)
                db.execute("UPDATE assignments SET expires = ? WHERE id = ?", (now + self.rules().lease, chat))
            words = sum(len(text.split()) for text in (item.prompt[-1]["content"], *item.responses))
            models, ended = _json_or_null(item.models), _json_or_null(item.ended)
            asked = (key, item.round, item.task, _json(item.prompt), _json(item.responses), models, ended, words, now)
            number = db.execute(
                "INSERT INTO items (key, round, task, prompt, responses, models, ended, words, overlap, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
                asked,
            ).lastrowid
            assignment = db.execute(
                "INSERT INTO assignments (item, person, kind, slot, shown, created, expires, state)"
                " VALUES (?, ?, 'turn', ?, ?, ?, ?, 'asked')",
                (number, person, about, json.dumps(list(shown)), now, now),
            ).lastrowid
            assert assignment is not None
            return assignment

    def turned(self, person: int, number: int) -> Item:
        """The answers that were recorded as a turn of a person's."""
        row = self._one(
            "SELECT items.* FROM assignments JOIN items ON items.id = assignments.item"
            " WHERE assignments.id = ? AND person = ? AND kind = 'turn'",
            number,
            person,
        )
        if row is None:
            raise Refused("foreign", "this answer was given to somebody else")
        return Item(
            prompt=json.loads(row["prompt"]),
            responses=tuple(json.loads(row["responses"])),
            task=row["task"],
            models=tuple(json.loads(row["models"])) if row["models"] else None,
            ended=tuple(json.loads(row["ended"])) if row["ended"] else None,
            round=row["round"],
        )

    def withdraw(self, person: int, number: int) -> None:
        """Take back what a person said of a turn, if anything, which they may then judge anew."""
        with self._write() as db:
            query = (
                "SELECT labels.id, assignments.* FROM labels JOIN assignments ON assignments.id = labels.assignment"
                " WHERE assignment = ? AND labels.person = ? AND assignments.kind = 'turn' AND assignments.slot IS NULL"
                " AND labels.id NOT IN (SELECT label FROM withdrawals)"
            )
            for row in db.execute(query, (number, person)).fetchall():
                held = db.execute("SELECT * FROM assignments WHERE id = ?", (number,)).fetchone()
                self._withdraw(db, held, row[0])

    def _withdraw(self, db: sqlite3.Connection, held: sqlite3.Row, label: int) -> None:
        """Withdraw the label of a turn; what came after it in its conversation is no part of that any more."""
        if held["slot"] is not None:
            self._drop(db, held["person"], held["slot"], held["id"])
        db.execute("INSERT INTO withdrawals VALUES (?, ?, ?)", (label, held["person"], self._clock()))
        db.execute("UPDATE assignments SET state = 'asked' WHERE id = ?", (held["id"],))

    def _drop(self, db: sqlite3.Connection, person: int, item: int, after: int) -> None:
        """End the turns of a conversation that are not judged."""
        db.execute(
            "UPDATE assignments SET state = 'skipped' WHERE person = ? AND kind = 'turn' AND slot = ? AND id > ?"
            " AND state = 'asked'",
            (person, item, after),
        )

    def conversation(self, person: int, number: int) -> Conversation:
        """How the conversation of a chat task stands, which a person holds."""
        with self._write(lasting=False) as db:
            return self._conversation(db, person, self._held(db, person, number)["item"])

    def _conversation(self, db: sqlite3.Connection, person: int, item: int) -> Conversation:
        row = db.execute("SELECT task, prompt FROM items WHERE id = ?", (item,)).fetchone()
        if row["task"] != "chat":
            raise Refused("foreign", "this task is no conversation")
        found = db.execute(
            "SELECT turn.id, turn.shown, turn.state, prompt, responses, (SELECT answer FROM labels WHERE assignment ="
            " turn.id AND labels.id NOT IN (SELECT label FROM withdrawals)) AS answer FROM assignments AS turn"
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
        return Conversation(json.loads(row["prompt"]), turns, self.rules().turns)

    def _dialogue(self, db: sqlite3.Connection, person: int, item: sqlite3.Row) -> dict[str, Any]:
        """The whole of a conversation that a person ends; InputError for one that is too short."""
        conversation = self._conversation(db, person, item["id"])
        done = sum(turn.strength is not None for turn in conversation.turns)
        if done < conversation.least:
            raise InputError(f"turns: expected at least {conversation.least} in a conversation, got {done}")
        self._drop(db, person, item["id"], 0)
        return {"turns": done, "messages": conversation.messages()}

    # -- progress ------------------------------------------------------------------------------------------------------

    def pace(self, person: int) -> Pace:
        """How far a person has come."""
        now = self._clock()
        midnight = datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        with self._lock:
            counts = self._db.execute(
                "SELECT COUNT(*) AS done, COALESCE(SUM(created >= ?), 0) AS today FROM labels WHERE person = ?"
                " AND kind != 'adjudicate' AND id NOT IN (SELECT label FROM withdrawals)",
                (midnight, person),
            ).fetchone()
            query = "SELECT seconds FROM labels WHERE person = ? ORDER BY created DESC LIMIT 20"
            recent = sorted(row["seconds"] for row in self._db.execute(query, (person,)))
            if now - self._remaining[0] > 2:  # it is a scan
                query = "SELECT COALESCE(SUM(overlap - taken), 0) FROM items WHERE taken < overlap AND gold IS NULL"
                self._remaining = now, self._db.execute(query).fetchone()[0]
        median = recent[len(recent) // 2] if recent else 0.0
        return Pace(counts["done"], counts["today"], median, self._remaining[1])


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA wal_autocheckpoint = 20000")  # pages; before that `tidy` does it, without holding up anybody
        with contextlib.suppress(OSError):
            os.chmod(path, 0o600)
    except BaseException:
        db.close()
        raise
    return db


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one after another, so that they can be one transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _free_slot(db: sqlite3.Connection, item: int) -> int:
    query = "SELECT slot FROM assignments WHERE item = ? AND kind = 'slot' AND state IN ('open', 'done')"
    taken = {row["slot"] for row in db.execute(query, (item,))}
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)


# The person has, or had and skipped, a slot of the item.
_MET = (
    "EXISTS (SELECT 1 FROM assignments WHERE assignments.item = items.id AND assignments.person = ?"
    " AND state IN ('open', 'done', 'skipped', 'aside'))"
)


def _open_item(db: sqlite3.Connection, person: int, last: int) -> tuple[int | None, int]:
    """The next item with a free slot, and the last one that the person was given in their order.

    That is one that came back or else the first beyond `last`, so that no query looks at all that was answered.
    """
    query = (
        f"SELECT items.id FROM freed JOIN items ON items.id = freed.item WHERE taken < overlap AND NOT {_MET} LIMIT 1"
    )
    if row := db.execute(query, (person,)).fetchone():
        return row["id"], last
    query = (
        "SELECT id FROM items INDEXED BY items_open WHERE taken < overlap AND gold IS NULL AND id > ?"
        f" AND NOT {_MET} ORDER BY id LIMIT 1"
    )
    row = db.execute(query, (last, person)).fetchone()
    return (row["id"], row["id"]) if row else (None, last)


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


def check_submission(name: str) -> None:
    """Raise InputError for a name that no page would give its answer."""
    if not 8 <= len(name) <= 64 or not name.isascii():
        raise InputError("submission: expected a name of 8 to 64 ASCII characters")


def append_label(db: sqlite3.Connection, values: Sequence[Any]) -> int:
    """Append a label, given by its columns from assignment to pairs; returns its number."""
    label = db.execute(
        "INSERT INTO labels (assignment, item, person, kind, submission, answer, started, created, seconds, fast,"
        f" agreed, pairs) VALUES ({', '.join('?' * len(values))})",
        values,
    ).lastrowid
    assert label is not None
    return label


def check_item(item: Item) -> None:
    """Raise InputError for an item that cannot be asked about."""
    fewest = {"rank": 2, "compare": 2, "best": 2, "demonstrate": 0, "arena": 2, "chat": 0, "thumb": 1}
    least = fewest.get(item.task)
    if least is None:
        raise InputError(f"task {item.task}: expected one of {', '.join(forms.TASKS)}")
    count = len(item.responses)
    most = least if item.task in ("compare", "arena", "chat", "thumb") else 26
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


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _json_or_null(value: Any) -> str | None:
    return None if value is None else _json(value)
