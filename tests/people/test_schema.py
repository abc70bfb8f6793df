"""Files that are no store, or one of another version."""

import sqlite3
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
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
