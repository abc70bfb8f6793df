"""The guidelines: versions of a text in Markdown, each of which people acknowledge before their next task."""

from rlhf_jax.people import acts
from rlhf_jax.people.store import Store


def newest(store: Store) -> tuple[int, str]:
    """The newest version of the guidelines and their text; version 0 is none."""
    row = store.one("SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1")
    return (row["version"], row["text"]) if row else (0, "")


def add(store: Store, text: str, by: int | None = None) -> int:
    """Add a version, unless the text is that of the newest; returns the number of the newest."""
    version, before = newest(store)
    if text.strip() == before:
        return version
    with store.writer() as db:
        db.execute("INSERT INTO guidelines (text, created) VALUES (?, ?)", (text.strip(), store.now()))
        acts.add(db, "guidelines", by, store.now(), why=f"{version + 1}")
    return newest(store)[0]


def acknowledge(store: Store, person: int, version: int) -> None:
    """Record that a person has read a version."""
    with store.writer() as db:
        db.execute("INSERT OR IGNORE INTO acknowledgements VALUES (?, ?, ?)", (person, version, store.now()))


def has_acknowledged(store: Store, person: int) -> bool:
    """Whether a person has read the newest version, or there is none."""
    version, _ = newest(store)
    found = store.one("SELECT 1 FROM acknowledgements WHERE person = ? AND version = ?", person, version)
    return version == 0 or found is not None
