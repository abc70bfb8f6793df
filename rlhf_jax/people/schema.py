"""The tables of a store, and how a file is opened as one: which it must be, and of which version."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError

VERSION = 2  # of the schema
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

# What version 2 added: who decided what, what models were asked, which contradictions people were asked about, the
# labels that were not withdrawn, and counts of them and of the items, which triggers keep.
_SECOND = """
ALTER TABLE assignments ADD COLUMN asked TEXT;  -- the submission whose ratings contradicted its ranks
CREATE TABLE acts (
    id INTEGER PRIMARY KEY, what TEXT NOT NULL, by INTEGER REFERENCES people, person INTEGER REFERENCES people,
    why TEXT NOT NULL, label INTEGER NOT NULL, created REAL NOT NULL  -- label: the newest one then
);
CREATE INDEX acts_person ON acts(person, what);
CREATE TRIGGER acts_stay BEFORE UPDATE ON acts BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;
CREATE TRIGGER acts_last BEFORE DELETE ON acts BEGIN SELECT RAISE(ABORT, 'acts are append-only'); END;
CREATE TABLE samplings (
    id INTEGER PRIMARY KEY, body TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0,  -- done: prompts
    created REAL NOT NULL, finished REAL
);
CREATE INDEX labels_assignment ON labels(assignment);
CREATE VIEW counting AS SELECT * FROM labels WHERE id NOT IN (SELECT label FROM withdrawals);
CREATE TABLE tallies (
    person INTEGER NOT NULL, kind TEXT NOT NULL, labels INTEGER NOT NULL, skipped INTEGER NOT NULL,
    fast INTEGER NOT NULL, seconds REAL NOT NULL, agreed REAL NOT NULL, pairs INTEGER NOT NULL,
    PRIMARY KEY (person, kind)
);
CREATE TABLE totals (
    task TEXT PRIMARY KEY, items INTEGER NOT NULL, slots INTEGER NOT NULL, taken INTEGER NOT NULL,
    wanted INTEGER NOT NULL
);
INSERT INTO tallies SELECT person, kind, COUNT(*), SUM(answer LIKE '{"skip"%'), SUM(fast), SUM(seconds),
    TOTAL(agreed), COALESCE(SUM(pairs), 0) FROM counting GROUP BY person, kind;
INSERT INTO totals SELECT task, SUM(overlap > 0), SUM(overlap), SUM(taken), SUM(MAX(0, overlap - taken)) FROM items
    WHERE gold IS NULL GROUP BY task;
INSERT INTO acts (what, person, why, label, created) SELECT 'aside', id, COALESCE(why, ''),
    (SELECT COALESCE(MAX(id), 0) FROM labels), aside FROM people WHERE aside IS NOT NULL;
CREATE TRIGGER labels_tallied AFTER INSERT ON labels BEGIN
    INSERT OR IGNORE INTO tallies VALUES (NEW.person, NEW.kind, 0, 0, 0, 0, 0, 0);
    UPDATE tallies SET labels = labels + 1, skipped = skipped + (NEW.answer LIKE '{"skip"%'), fast = fast + NEW.fast,
        seconds = seconds + NEW.seconds, agreed = agreed + COALESCE(NEW.agreed, 0),
        pairs = pairs + COALESCE(NEW.pairs, 0) WHERE person = NEW.person AND kind = NEW.kind;
END;
CREATE TRIGGER withdrawals_tallied AFTER INSERT ON withdrawals BEGIN
    UPDATE tallies SET labels = tallies.labels - 1, skipped = skipped - (old.answer LIKE '{"skip"%'),
        fast = tallies.fast - old.fast, seconds = tallies.seconds - old.seconds,
        agreed = tallies.agreed - COALESCE(old.agreed, 0), pairs = tallies.pairs - COALESCE(old.pairs, 0)
        FROM labels AS old WHERE old.id = NEW.label AND tallies.person = old.person AND tallies.kind = old.kind;
END;
CREATE TRIGGER items_totalled AFTER INSERT ON items WHEN NEW.gold IS NULL BEGIN
    INSERT OR IGNORE INTO totals VALUES (NEW.task, 0, 0, 0, 0);
    UPDATE totals SET items = items + (NEW.overlap > 0), slots = slots + NEW.overlap, taken = taken + NEW.taken,
        wanted = wanted + MAX(0, NEW.overlap - NEW.taken) WHERE task = NEW.task;
END;
CREATE TRIGGER slots_totalled AFTER UPDATE OF overlap, taken ON items WHEN NEW.gold IS NULL BEGIN
    UPDATE totals SET items = items + (NEW.overlap > 0) - (OLD.overlap > 0), slots = slots + NEW.overlap - OLD.overlap,
        taken = taken + NEW.taken - OLD.taken,
        wanted = wanted + MAX(0, NEW.overlap - NEW.taken) - MAX(0, OLD.overlap - OLD.taken) WHERE task = NEW.task;
END;
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
    """Make the tables if the file is empty, and those that are missing if it is of an older version."""
    version = _check(db, path)
    for script in (_SCHEMA, _SECOND)[version:]:
        for statement in _statements(script):
            db.execute(statement)
    if version < VERSION:
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")


def _check(db: sqlite3.Connection, path: Path) -> int:
    """The version of the file, 0 if it is empty; InputError for one that is no store, or of a newer version."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        return 0
    if application != _APPLICATION:
        raise InputError(f"{path}: an SQLite file, but no store of labels; name another by --db")
    if version > VERSION:
        raise InputError(
            f"{path}: written by a newer version of this project (schema {version}, here {VERSION});"
            " update the project, or name another file by --db"
        )
    return version


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
