"""The life of a label: an item is asked about, held by a person, answered, and perhaps withdrawn, in one SQLite file.

Labels are appended and never changed: triggers refuse it. An undo is a row that withdraws a label. Every write is one
transaction, and a label has reached the disk before it is acknowledged (WAL, synchronous=FULL), so an answer that a
page reported as stored survives a killed server and a power cut. Several processes may have a store open at once.

A person answers through an *assignment*: an item, the order in which its responses were shown, and a lease. An item
with overlap n has n slots, each held by one person at a time; a slot whose lease ran out goes to whoever asks next
(`leases`). Gold and repeated items are assigned beside the slots, and so are the turns of a chat (`conversations`).
"""

import contextlib
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, agreement, conversations, forms, items, labels, leases, progress, rules, schema
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.progress import Pace
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.schema import encoded


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A task that a person holds, with the responses in the order in which the page shows them."""

    id: int
    item: int
    task: forms.Task
    prompt: Any
    responses: list[str]
    draft: Any  # what the page last saved, or None


class Store:
    """An open store. Methods may be called from any thread."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time, create: bool = True):
        """Open the store at `path`, and create it if there is none and `create`.

        Raises InputError for a file that is no store, one of a newer version, or one that cannot be written.
        """
        self.path, self._clock, self._lock = Path(path), clock, threading.RLock()
        if not create and not self.path.is_file():
            raise InputError(f"{path}: no such store; start scripts/people.sh with --db {path}, or name another")
        try:
            self._db = schema.connect(self.path)
        except sqlite3.Error as error:
            raise InputError(f"{path}: cannot be opened as a store ({error})") from error
        try:
            with self.writer() as db:
                schema.prepare(db, self.path)
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

    # -- the file ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writer(self, lasting: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction that may change the store, on the disk when the context ends, or else undone as a whole.

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

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for reading, so that a long query holds up nobody; it sees one moment."""
        db = schema.connect(self.path)
        try:
            db.execute("PRAGMA query_only = 1")
            db.execute("BEGIN")
            yield db
        finally:
            db.close()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row that a short query finds; None if it finds nothing."""
        with self._lock:
            return self._db.execute(query, values).fetchone()

    def tidy(self) -> None:
        """Move what was written from the log into the file, beside readers and writers: call it every few seconds."""
        db = schema.connect(self.path)
        try:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            db.close()

    def now(self) -> float:
        """The time, in seconds since 1970."""
        return self._clock()

    # -- what is asked -------------------------------------------------------------------------------------------------

    def rules(self) -> Rules:
        """The rules that hold now."""
        with self._lock:
            return rules.newest(self._db)

    def set_rules(self, wanted: Rules, by: int | None = None) -> None:
        """Let these rules hold from now on; the former ones stay on record, with the administrator who changed them."""
        before = self.rules()
        if wanted != before:
            with self.writer() as db:
                rules.add(db, wanted, self.now())
                acts.add(db, "rules", by, self.now(), why=rules.difference(before, wanted))

    def add(self, asked: Iterable[Item]) -> tuple[int, int]:
        """Add items, in one transaction; returns how many, and how many are there already. InputError for a bad one."""
        added = present = 0
        with self.writer() as db:
            for item in asked:
                items.check(item)
                done = items.insert(db, item, item.key(), encoded(item.prompt), self.now())
                added, present = added + done.rowcount, present + 1 - done.rowcount
        return added, present

    def set_overlap(self, wanted: Mapping[int, int]) -> None:
        """Change how many people answer items, by number; who has a task by now may finish it."""
        with self.writer() as db:
            for item, overlap in wanted.items():
                query = "UPDATE items SET overlap = ? WHERE id = ? AND overlap != ?"
                if db.execute(query, (overlap, item, overlap)).rowcount:
                    db.execute("DELETE FROM freed WHERE item = ?", (item,))
                    db.execute("INSERT INTO freed SELECT id FROM items WHERE id = ? AND taken < overlap", (item,))

    def has_items(self) -> bool:
        """Whether there is anything to ask about."""
        return self.one("SELECT 1 FROM items WHERE overlap > 0 LIMIT 1") is not None

    # -- who is asked --------------------------------------------------------------------------------------------------

    def task(self, person: int, talks: bool = True) -> Assignment | None:
        """The task that a person holds, or the next one, with a fresh lease; None if nothing is left for them.

        Without a model that `talks` it is no conversation, and one that they hold goes back.
        """
        with self.writer(lasting=False) as db:
            now = self.now()
            leases.release_expired(db, now)
            row = db.execute(
                "SELECT assignments.*, task FROM assignments JOIN items ON items.id = assignments.item"
                " WHERE person = ? AND state = 'open'",
                (person,),
            ).fetchone()
            if row and row["task"] == "chat" and not talks:
                leases.release(db, row, "expired")
                row = None
            found = row["id"] if row else leases.assign(db, person, now, talks)
            if found is None:
                return None
            leases.renew(db, found, now)
            return _assignment(db, found)

    def save_draft(self, person: int, number: int, body: Any) -> None:
        """Keep what a person has entered so far, and renew the lease."""
        with self.writer(lasting=False) as db:
            row = leases.held(db, person, number)
            leases.renew(db, number, self.now())
            labels.draft(db, person, row["item"], body, self.now())

    # -- what is answered ----------------------------------------------------------------------------------------------

    def submit(self, person: int, number: int, submission: str, answer: Any, seconds: float) -> int:
        """Store the answer to an assignment, given in the order shown; returns the label's number.

        `submission` is the page's name for this answer: what is sent twice under one name is stored once. `seconds` is
        the time that the person looked at the task. Raises InputError for an answer that is not whole, Contradiction
        for one that needs to be confirmed, once a task, and Refused for a task that the person does not hold.
        """
        labels.check_name(submission, "submission")
        with self.writer() as db:
            if label := labels.replayed(db, person, submission, "assignment", number):
                return label
            held, now, current = leases.held(db, person, number), self.now(), rules.newest(db)
            item = db.execute("SELECT * FROM items WHERE id = ?", (held["item"],)).fetchone()
            shown = json.loads(held["shown"])
            if held["asked"] not in (None, submission) and isinstance(answer, dict):
                answer = answer | {"confirmed": True}
            try:
                answer = forms.restored(forms.checked(item["task"], len(shown), answer, current.ratings), shown)
            except forms.Contradiction:
                db.execute("UPDATE assignments SET asked = ? WHERE id = ?", (submission, number))
                db.execute("COMMIT")  # that the person has been asked stays
                raise
            seconds = min(max(0.0, seconds), now - held["created"])
            is_skipped = "skip" in answer
            if item["task"] == "chat" and not is_skipped:
                answer |= conversations.end(db, person, item["id"])
            agreed = pairs = None
            if not is_skipped and (known := _known(db, held, item)):
                ranks = forms.ranks_of(item["task"], answer, len(shown))
                if ranks:
                    agreed, pairs = agreement.matched(known, ranks, ties=held["kind"] == "repeat")
            values = (
                number,
                held["item"],
                person,
                held["kind"],
                submission,
                encoded(answer),
                held["created"],
                now,
                seconds,
                int(not is_skipped and current.reading > 0 and seconds * current.reading < item["words"]),
                agreed,
                pairs,
            )
            label = labels.append(db, values)
            if is_skipped:
                leases.release(db, held, "skipped")
            else:
                db.execute("UPDATE assignments SET state = 'done' WHERE id = ?", (number,))
            db.execute("DELETE FROM drafts WHERE person = ? AND item = ?", (person, held["item"]))
            if pairs:
                _judge(db, person, current, now)
            return label

    def pace(self, person: int, talks: bool = True) -> Pace:
        """How far a person has come; without a model that `talks`, conversations are not left to do."""
        with self._lock:
            query = "SELECT COALESCE(SUM(labels), 0) FROM tallies WHERE person = ? AND kind != 'adjudicate'"
            done = self._db.execute(query, (person,)).fetchone()[0]
            query = "SELECT COUNT(*) FROM counting WHERE person = ? AND created >= ? AND kind != 'adjudicate'"
            today = self._db.execute(query, (person, progress.midnight(self.now()))).fetchone()[0]
            query = "SELECT seconds FROM labels WHERE person = ? ORDER BY created DESC LIMIT 20"
            recent = [row["seconds"] for row in self._db.execute(query, (person,))]
            left = progress.wanted(self._db) - (0 if talks else progress.wanted(self._db, "chat"))
        return Pace(done, today, progress.middle(recent), left)

    # -- what counts no more -------------------------------------------------------------------------------------------

    def undo(self, person: int) -> None:
        """Withdraw a person's last label and open its task again, with the answer as a draft.

        Within a conversation that is its last turn; what was said of a model outside of it stays.
        """
        with self.writer() as db:
            now = self.now()
            label = db.execute(
                "SELECT labels.* FROM counting AS labels JOIN assignments ON assignments.id = labels.assignment"
                " WHERE labels.person = ?"
                " AND labels.kind != 'adjudicate' AND (labels.kind != 'turn' OR assignments.slot IN"
                " (SELECT item FROM assignments WHERE person = ? AND state = 'open'))"
                " ORDER BY labels.created DESC, labels.id DESC LIMIT 1",
                (person, person),
            ).fetchone()
            if label is None:
                raise Refused("nothing", "there is nothing to undo")
            held = db.execute("SELECT * FROM assignments WHERE id = ?", (label["assignment"],)).fetchone()
            if held["kind"] == "turn":
                conversations.withdraw(db, held, label["id"], now)
                return
            if held["state"] not in ("done", "skipped"):
                raise Refused("nothing", "the last answer was set aside and cannot be undone")
            leases.release_held(db, person)
            labels.withdraw(db, label["id"], person, now)
            if held["state"] == "skipped":
                db.execute("UPDATE assignments SET state = 'expired' WHERE id = ?", (held["id"],))
                leases.held(db, person, held["id"])
            db.execute("UPDATE assignments SET state = 'open' WHERE id = ?", (held["id"],))
            leases.renew(db, held["id"], now)
            answer = json.loads(label["answer"])
            draft = {} if "skip" in answer else forms.displayed(answer, json.loads(held["shown"]))
            labels.draft(db, person, held["item"], draft, now)

    def set_aside(self, person: int, why: str, by: int | None = None) -> None:
        """Give a person no more tasks, and others the slots that the person filled. The labels stay on record."""
        with self.writer() as db:
            leases.set_aside(db, person, why, self.now(), by)

    def restore(self, person: int, by: int | None = None) -> None:
        """Let a person who was set aside go on, and their labels count again; what follows alone is judged anew."""
        with self.writer() as db:
            leases.restore(db, person, self.now(), by)


def _assignment(db: sqlite3.Connection, number: int) -> Assignment:
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


def _known(db: sqlite3.Connection, held: sqlite3.Row, item: sqlite3.Row) -> list[int] | None:
    """The ranks that an answer is held against: gold, or those that the person gave before."""
    if held["kind"] == "gold":
        return json.loads(item["gold"])
    if held["kind"] in ("slot", "turn"):
        return None
    row = db.execute(
        "SELECT answer FROM counting WHERE item = ? AND person = ? AND kind = 'slot' ORDER BY id DESC LIMIT 1",
        (held["item"], held["person"]),
    ).fetchone()
    return forms.ranks_of(item["task"], json.loads(row["answer"]), len(json.loads(item["responses"]))) if row else None


def _judge(db: sqlite3.Connection, person: int, current: Rules, now: float) -> None:
    """Set a person aside who falls below a threshold, by what they answered since they were last restored."""
    since = acts.restored(db, person)
    limits = (("gold", current.gold_least, current.gold_count), ("repeat", current.self_least, current.self_count))
    for kind, least, count in limits:
        row = db.execute(
            "SELECT COUNT(*) AS n, SUM(agreed) AS agreed, SUM(pairs) AS pairs FROM counting"
            " WHERE person = ? AND kind = ? AND pairs IS NOT NULL AND id > ?",
            (person, kind, since),
        ).fetchone()
        if row["n"] >= count and row["agreed"] < least * row["pairs"]:
            share = row["agreed"] / row["pairs"]
            leases.set_aside(db, person, f"{kind} {share:.2f} < {least:.2f}", now, by=None)
