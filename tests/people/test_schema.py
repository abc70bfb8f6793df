"""Files that are no store, or one of another version."""

import json
import sqlite3
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.people import exchange, progress, schema
from rlhf_jax.people.schema import VERSION
from rlhf_jax.people.store import Store


def test_what_is_no_store_is_refused(tmp_path: Path):
    (tmp_path / "text.db").write_text("not a database, but long enough to have a header" * 10)
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    with Store(tmp_path / "new.db") as store, store.writer() as db:
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    for name, message in (("text.db", "cannot be"), ("other.db", "no store"), ("new.db", "newer version")):
        (tmp_path / name).chmod(0o644)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(InputError, match=message):
            Store(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before and (tmp_path / name).stat().st_mode & 0o777 == 0o644
    with pytest.raises(InputError, match="no such store"):
        Store(tmp_path / "none.db", create=False)
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path / "missing" / "people.db")


def test_a_store_of_the_first_version_goes_on(tmp_path: Path):
    """Its labels, withdrawals and people are as they were, and are counted as they would have been."""
    path = tmp_path / "people.db"
    db = sqlite3.connect(path)
    db.executescript(schema._SCHEMA)
    db.execute(f"PRAGMA application_id = {schema._APPLICATION}")
    db.execute("PRAGMA user_version = 1")
    db.executemany(
        "INSERT INTO people (id, name, role, created, aside, why) VALUES (?, ?, 'labeler', 1, ?, ?)",
        [(1, "ann", None, None), (2, "bob", 5.0, "gold 0.20 < 0.70")],
    )
    db.executemany(
        "INSERT INTO items (key, round, task, prompt, responses, words, overlap, taken, created)"
        ' VALUES (?, 0, ?, \'"p"\', \'["a","b"]\', 3, ?, ?, 1)',
        [(b"1", "rank", 2, 1), (b"2", "rank", 1, 1), (b"3", "chat", 3, 0)],
    )
    answers = [(1, 1, '{"ranks":[0,1]}', "done"), (2, 1, '{"skip":"unclear"}', "skipped"), (1, 2, "{}", "aside")]
    for n, (item, person, said, state) in enumerate(answers, start=1):
        db.execute(f"INSERT INTO assignments VALUES (?, ?, ?, 'slot', 0, '[0,1]', 1, 2, '{state}')", (n, item, person))
        values = (n, item, person, f"submission-{n}", said, n)
        db.execute("INSERT INTO labels VALUES (NULL, ?, ?, ?, 'slot', ?, ?, 1, ?, 4.5, 0, NULL, NULL)", values)
    db.execute("INSERT INTO withdrawals VALUES (2, 1, 9)")
    db.commit()
    db.close()
    with Store(path) as store:
        assert store.one("PRAGMA user_version")[0] == VERSION
        assert [row["ranks"] for _, row in exchange.read(path)] == [[0, 1]]
        assert (store.pace(1).done, store.pace(1).left, store.pace(1, talks=False).left) == (1, 4, 1)
        with store.reader() as reader:
            found = progress.overview(reader, 10.0)
        assert (found.items, found.slots, found.done) == (3, 6, 2)
        assert [(one.name, one.labels, one.skipped, one.seconds) for one in found.people] == [
            ("ann", 1, 0, 4.5),
            ("bob", 1, 0, 4.5),
        ]
        assert [one.aside for one in found.people] == [None, "gold 0.20 < 0.70"]
        task = store.task(1)
        assert task and task.prompt == "p"
        store.restore(2)
    with Store(path) as store:  # it is brought up to date once
        assert store.one("SELECT COUNT(*) FROM acts WHERE what = 'aside'")[0] == 1
        assert json.loads(store.one("SELECT answer FROM labels WHERE id = 1")[0]) == {"ranks": [0, 1]}
