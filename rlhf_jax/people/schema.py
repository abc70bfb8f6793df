"""The tables of a store, and how a file is opened as one: which it must be, and of which version."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError

VERSION = 1  # of the schema
_APPLICATION = 0x70656F70  # marks an SQLite file as a store

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


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the file, which is created if it is not there, and which other people cannot read.

    Raises InputError for a file that is no store, or of a newer version, and leaves it as it is.
    """
    db = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        _check(db, path)
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


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables if the file is empty."""
    if _check(db, path):
        for statement in _statements(_SCHEMA):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")


def _check(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty; InputError for one that is no store, or of a newer version."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        return True
    if application != _APPLICATION:
        raise InputError(f"{path}: an SQLite file, but no store of labels; name another by --db")
    if version > VERSION:
        raise InputError(
            f"{path}: written by a newer version of this project (schema {version}, here {VERSION});"
            " update the project, or name another file by --db"
        )
    return False


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one after another, so that they can be one transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def encoded(value: Any) -> str:
    """The JSON that a column holds."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
