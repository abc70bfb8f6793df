"""The guidelines: versions of a text in Markdown, each of which people acknowledge before their next task.

Their lines of the form "- **word**: what is to be known of it" are shown beside each prompt that has the word.
"""

import functools
import re
from pathlib import Path
from typing import Any

from rlhf_jax.people import acts
from rlhf_jax.people.store import Store

_PAGES = Path(__file__).parent / "pages"
_ENTRY = re.compile(r"^- \*\*(.+?)\*\*: (.+)$", re.MULTILINE)
_WORLD = re.compile(r"world(:(rows=\d+|seed=0+)(,(rows=\d+|seed=0+))*)?(\[[^\[\]]*\])?")  # of seed 0, in any number


@functools.cache
def of_world(language: str = "en") -> str:
    """The guidelines that this project has for the embedded world of seed 0, with its facts."""
    texts = (_PAGES / f"world.{name}.md" for name in (language, "facts"))
    return "\n".join(text.read_text(encoding="utf-8") for text in texts).strip()


def begin(store: Store, data: str) -> None:
    """Give a store without guidelines those of the world, if its prompts are that `data`."""
    if _WORLD.fullmatch(data) and not newest(store)[0]:
        add(store, of_world())


def translated(text: str, language: str) -> str:
    """The text in a language, if it is this project's; what somebody wrote stays as it is."""
    return of_world(language) if text == of_world() else text


def about(text: str, prompt: Any) -> list[str] | None:
    """The lines of guidelines about words that a prompt, a text or messages, has, each with its word in front.

    None where guidelines have no lines about words at all.
    """
    said = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    entries = _entries(text)
    return [f"{word}: {line}" for word, line in entries if _has(said, word)] if entries else None


@functools.lru_cache(maxsize=8)
def _entries(text: str) -> list[tuple[str, str]]:
    return _ENTRY.findall(text)


def _has(said: str, word: str) -> bool:
    """Whether a text has a word; one in a script that does not put spaces between words may stand anywhere."""
    return word in said and (not word.isascii() or bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said)))


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
