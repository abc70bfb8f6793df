"""What the server does against others: foreign pages, too many requests, and what the answers' headers forbid."""

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from starlette.testclient import TestClient

from rlhf_jax.people import access, frame, network, server
from rlhf_jax.people.store import Store
from tests.people.visiting import Browser, client

pytestmark = pytest.mark.usefixtures("prompts")


def test_changes_need_the_token_of_our_page(store: Store):
    ann = Browser(store)
    for headers in ({}, {"X-CSRF": "0" * 64}, {"X-CSRF": "x"}):
        found = ann.client.post("/api/undo", json={}, headers=headers)
        assert found.status_code == 403 and found.json()["error"] == "foreign_page"
    assert ann.client.post("/leave", data={}).status_code == 403
    foreign = ann.client.post("/enter", json={"token": "x"}, headers={"Sec-Fetch-Site": "cross-site"})
    assert foreign.status_code == 403
    assert ann.client.post("/leave", data={"csrf": ann.csrf}).headers["location"] == "/enter"
    assert ann.client.get("/api/task").status_code == 401


def test_headers_and_cookies(store: Store):
    ann = client(store, frame.Options(secure=True))
    entered = ann.post("/enter", json={"token": access.invite(store, "ann")})
    cookie = entered.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("httponly", "samesite=lax", "secure"))
    for path in ("/enter", "/static/people.js", "/none", "/api/task"):
        headers = ann.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert ann.get("/enter").headers["cache-control"] == "no-store"


def test_nothing_comes_from_elsewhere():
    for path in frame.PAGES.rglob("*.*"):
        text = path.read_text()
        assert not re.findall(r"(?:src|href|url\(|from|import)\s*[=(]?\s*[\"']?(?:https?:)?//", text), path
        if path.suffix == ".html":
            assert " style=" not in text and not re.search(r"\son\w+=", text)
            assert not re.findall(r"<script(?![^>]*(?:src=|application/json))", text)
    script = (frame.PAGES / "static" / "people.js").read_text()
    assert "innerHTML" not in script and "eval(" not in script


def test_too_large_too_many_and_for_another_host(store: Store):
    ann = Browser(store)
    assert ann.client.post("/api/draft", content=b"x" * 2**20 + b"x", headers=ann.headers).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 2**17

    assert ann.client.post("/api/draft", content=pieces(), headers=ann.headers).status_code == 413
    assert ann.client.get("/enter", headers={"Host": "evil.example"}).json()["error"] == "wrong_host"
    few = client(store, frame.Options(rate=0.001, burst=3.0))
    assert [few.get("/enter").status_code for _ in range(4)] == [200, 200, 200, 429]
    # Made-up sessions are no way out, and no way to spend what somebody else has left.
    few = client(store, frame.Options(rate=0.001, burst=4.0))
    assert few.post("/enter", json={"token": access.invite(store, "eve")}).status_code == 200
    session = few.cookies["session"]
    said = [few.get("/enter", headers={"Cookie": f"session=guess{n}"}).status_code for n in range(5)]
    assert said[:2] == [200, 200] and said[-1] == 429
    assert [few.get("/api/task", headers={"Cookie": f"session={session}"}).status_code for _ in range(5)] == [
        *[200] * 4,
        429,
    ]
    guesses = client(store, frame.Options(attempts=3.0))
    assert [guesses.post("/enter", json={"token": "x"}).status_code for _ in range(4)] == [401, 401, 401, 429]
    assert guesses.post("/enter", json={"token": access.invite(store, "bob")}).status_code == 200


def test_the_address_is_the_one_that_a_proxy_names_and_no_other(store: Store):
    def refused(behind_proxy: bool, *addresses: str) -> list[int]:
        app = server.app(store, frame.Options(rate=0.001, burst=1.0, hosts=None))
        config = network.config(app, behind_proxy, None, None)
        config.load()
        asking = TestClient(config.loaded_app, client=("127.0.0.1", 5000))
        return [asking.get("/enter", headers={"X-Forwarded-For": one}).status_code for one in addresses]

    assert refused(False, "1.1.1.1", "2.2.2.2") == [200, 429]
    assert refused(True, "1.1.1.1", "2.2.2.2", "9.9.9.9, 1.1.1.1") == [200, 200, 429]
    assert refused(True, "2001:db8::1", "2001:db8::2:3", "2001:db8:0:1::1") == [200, 429, 200]
