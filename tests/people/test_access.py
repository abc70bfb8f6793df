"""Links and sessions."""

from rlhf_jax.people import access
from rlhf_jax.people.store import Store


def test_links_are_stored_hashed_and_can_be_revoked(store: Store):
    token = access.invite(store, "ann")
    session = access.enter(store, token)
    assert session and access.person(store, session)
    assert access.enter(store, "x" * 43) is None
    content = b"".join(path.read_bytes() for path in store.path.parent.glob("people.db*"))
    assert token.encode() not in content and session.encode() not in content
    newer = access.invite(store, "ann")
    assert access.enter(store, token) is None and access.person(store, session) is None
    session = access.enter(store, newer)
    assert session
    found = access.person(store, session)
    assert found
    access.revoke(store, found.id)
    assert access.person(store, session) is None and access.enter(store, newer) is None
