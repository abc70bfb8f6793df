"""People, their links, and the sessions of their browsers. Tokens are stored as hashes alone."""

import dataclasses
import hashlib
import hmac
import secrets
from typing import Literal

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, leases
from rlhf_jax.people.store import Store

SESSION = 30 * 86400  # seconds that a browser stays signed in

Role = Literal["labeler", "administrator"]


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody with a link."""

    id: int
    name: str
    role: Role
    aside: bool = False  # gets no more tasks


def invite(store: Store, name: str, role: Role = "labeler", by: int | None = None, replaces: bool = True) -> str:
    """Add a person, or give one who is there a new link; returns the token of the link.

    `by` is the administrator who invites, None for the command line. A new link ends the sessions of the old one,
    unless it is none that `replaces` it: each start of a server prints one.
    """
    name = " ".join(name.split())
    if not 1 <= len(name) <= 80:
        raise InputError("name: expected 1 to 80 characters")
    token = secrets.token_urlsafe(32)
    with store.writer() as db:
        row = db.execute("SELECT id, role FROM people WHERE name = ?", (name,)).fetchone()
        if row is None:
            values = (name, role, _hash(token), store.now())
            person = db.execute("INSERT INTO people (name, role, token, created) VALUES (?, ?, ?, ?)", values).lastrowid
        elif row["role"] != role:
            raise InputError(f"name {name}: is taken by a person of another role")
        else:
            person = row["id"]
            db.execute("UPDATE people SET token = ?, revoked = NULL WHERE id = ?", (_hash(token), person))
            if replaces:
                db.execute("DELETE FROM sessions WHERE person = ?", (person,))
        if replaces:
            acts.add(db, "invited", by, store.now(), person, role)
    return token


def revoke(store: Store, person: int, by: int | None = None) -> None:
    """End a person's access; their labels stay and their task goes back."""
    with store.writer() as db:
        query = "UPDATE people SET revoked = ?, token = NULL WHERE id = ?"
        if not db.execute(query, (store.now(), person)).rowcount:
            return
        acts.add(db, "revoked", by, store.now(), person)
        db.execute("DELETE FROM sessions WHERE person = ?", (person,))
        leases.release_held(db, person)


def enter(store: Store, token: str) -> str | None:
    """Exchange the token of a link for that of a session; None if it is unknown or revoked."""
    digest = _hash(token)
    with store.writer() as db:
        row = db.execute("SELECT id, token FROM people WHERE token = ? AND revoked IS NULL", (digest,)).fetchone()
        if row is None or not hmac.compare_digest(row["token"], digest):
            return None
        session, now = secrets.token_urlsafe(32), store.now()
        db.execute("DELETE FROM sessions WHERE expires < ?", (now,))
        db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (_hash(session), row["id"], now + SESSION))
        return session


def leave(store: Store, session: str) -> None:
    """End a session."""
    with store.writer() as db:
        db.execute("DELETE FROM sessions WHERE token = ?", (_hash(session),))


def person(store: Store, session: str) -> Person | None:
    """The person of a session; None if it has ended or was revoked."""
    digest = _hash(session)
    row = store.one(
        "SELECT people.*, sessions.token AS session FROM sessions JOIN people ON people.id = sessions.person"
        " WHERE sessions.token = ? AND expires > ? AND revoked IS NULL",
        digest,
        store.now(),
    )
    if row is None or not hmac.compare_digest(row["session"], digest):
        return None
    return Person(row["id"], row["name"], row["role"], row["aside"] is not None)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
