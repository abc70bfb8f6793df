"""The server without a browser: tasks and answers, and what it does with wrong ones, a full disk or a slow store."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import server
from rlhf_jax.people.store import Store
from tests.people.visiting import Browser

pytestmark = pytest.mark.usefixtures("prompts")


def test_from_the_link_to_a_label(store: Store):
    ann = Browser(store)
    task = ann.task()
    assert set(task) == {"id", "item", "task", "prompt", "responses", "draft"}  # no model, no order
    assert ann.post("/api/draft", assignment=task["id"], draft={"ranks": [0, None]}).json() == {"saved": True}
    assert ann.task()["draft"] == {"ranks": [0, None]}
    done = ann.submit(task["id"], {"ranks": [0, 1]})
    assert done.status_code == 200 and ann.submit(task["id"], {"ranks": [0, 1]}).json() == done.json()
    assert ann.submit(task["id"], {"ranks": [0, 1]}, "other-name").json()["error"] == "answered"
    assert ann.task()["prompt"] == "prompt 1"
    assert ann.post("/api/undo").json() == {"undone": True}
    assert ann.task()["prompt"] == "prompt 0"


@pytest.mark.parametrize(
    "body, message",
    [
        ({"ranks": [0]}, "ranks: expected 2"),
        ({"ranks": [0, None]}, "never placed"),
        ({}, "ranks"),
        ([], "expected an object"),
        ({"ranks": [0, 1], "ratings": [{"overall": 9}, {}]}, "from 1 to 7"),
    ],
)
def test_a_wrong_answer_is_named(store: Store, body: Any, message: str):
    ann = Browser(store)
    found = ann.submit(ann.task()["id"], body)
    assert found.status_code == 422 and message in found.json()["message"]
    for wrong in ({"assignment": "x"}, {"assignment": 1, "seconds": "long"}, {"assignment": 1, "seconds": 1}):
        assert ann.post("/api/submit", **wrong).status_code == 422
    assert ann.client.post("/api/submit", content=b"{", headers=ann.headers).status_code == 422


def test_odd_values_break_nothing(store: Store):
    ann = Browser(store, "Ann Lee")
    number = ann.task()["id"]
    odd = ["\ud800" * 9, "x" * 65, "\N{SNOWMAN}" * 9, 12345678, None, ["x" * 9], "short"]
    for name in odd:
        assert ann.submit(number, {"ranks": [0, 1]}, name).status_code == 422
    for answer in ({"ranks": [0, 1], "note": "\ud800"}, {"skip": ["x"]}, {"skip": {}}, {"ranks": {"0": 1}}, "x", None):
        assert ann.submit(number, answer).status_code == 422
    for seconds in (float("nan"), -1, "1", None, 1e300):
        content = json.dumps({"assignment": number, "submission": "x" * 9, "answer": {}, "seconds": seconds})
        assert ann.client.post("/api/submit", content=content, headers=ann.headers).status_code == 422
    for assignment in (True, 1.5, -1, 2**70, "1", None):
        assert ann.post("/api/draft", assignment=assignment, draft={}).status_code == 422
    assert ann.post("/api/draft", assignment=9999, draft={}).json()["error"] == "foreign"
    assert ann.client.post("/api/undo", content=json.dumps({"csrf": "\ud800"})).status_code == 403
    draft = {"text": "\ud83d", "note": "\u0000"}
    assert ann.post("/api/draft", assignment=number, draft=draft).status_code == 200 and ann.task()["draft"] == draft
    assert ann.submit(number, {"ranks": [0, 1], "note": "\u0000 \U0001f600"}).status_code == 200
    admin = Browser(store, "administrator", "administrator")
    assert len(admin.client.get("/admin/export?person=Ann%20Lee").text.splitlines()) == 1


def test_a_contradiction_is_asked(store: Store):
    ann = Browser(store)
    number = ann.task()["id"]
    answer = {"ranks": [0, 1], "ratings": [{"overall": 1}, {"overall": 7}]}
    found = ann.submit(number, answer)
    assert found.status_code == 409 and found.json()["pairs"] == [[1, 0]]
    assert ann.submit(number, answer | {"confirmed": True}).status_code == 200


def test_a_full_disk_is_told_and_nothing_is_lost(store: Store, monkeypatch: pytest.MonkeyPatch):
    ann = Browser(store)
    number = ann.task()["id"]
    with store._lock:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
    note = "x" * 4900
    full = ann.submit(number, {"ranks": [0, 1], "note": note}, "submission-1")
    for n in range(50):  # the pages that were free are used up first
        if full.status_code == 507:
            break
        full = ann.post("/api/draft", assignment=number, draft={"note": note * 20, "n": n})
    assert (full.status_code, full.json()["error"]) == (507, "disk")
    with store._lock:
        store._db.execute(f"PRAGMA max_page_count = {2**30}")
    assert ann.post("/api/draft", assignment=ann.task()["id"], draft={"note": note * 20}).status_code == 200


def test_the_event_loop_is_not_held_up(store: Store):
    """The store is called in threads: a slow one holds up nobody who asks for something else."""

    async def both() -> list[str]:
        import httpx2

        transport = httpx2.ASGITransport(app=server.app(store))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            store._lock.acquire()
            try:
                slow = asyncio.create_task(http.post("/enter", json={"token": "x"}))
                await asyncio.sleep(0.05)
                quick = await asyncio.wait_for(http.get("/enter"), 2)
            finally:
                store._lock.release()
            return [str(quick.status_code), str((await slow).status_code)]

    assert asyncio.run(both()) == ["200", "401"]
