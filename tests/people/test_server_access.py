"""Who may do what: sessions, links, and what administrators alone do."""

import json
import re
import urllib.parse

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.errors import InputError
from rlhf_jax.people import access, guidelines
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from tests.people.visiting import Browser, client

pytestmark = pytest.mark.usefixtures("prompts")


def test_nothing_without_a_session(store: Store):
    nobody = client(store)
    for path in ("/", "/admin", "/guidelines", "/admin/export", "/admin/arena"):
        found = nobody.get(path)
        assert (found.status_code, found.headers["location"]) == (303, "/enter")
    assert nobody.get("/api/task").status_code == 401
    assert nobody.post("/api/submit", json={}).status_code == 401
    assert nobody.post("/enter", json={"token": "guess"}).json()["error"] == "unknown_link"
    for odd in (None, 1, "", "\ud800", "ü"):
        assert nobody.post("/enter", content=json.dumps({"token": odd})).status_code == 401
    nobody.cookies.set("session", "guess")
    assert nobody.get("/api/task").status_code == 401


def test_a_revoked_link_ends_the_session(store: Store):
    ann, admin = Browser(store), Browser(store, "administrator", "administrator")
    assert ann.task()
    page = admin.client.get("/admin").text
    number = re.search(r'revoke.*?name="person" value="(\d+)"', page, re.DOTALL)
    assert number and admin.act("revoke", person=number[1]).status_code == 303
    found = ann.client.get("/api/task")
    assert found.status_code == 401 and found.json()["error"] == "no_session"


def test_only_the_administrator_administers(store: Store):
    ann, admin = Browser(store), Browser(store, "administrator", "administrator")
    assert ann.client.get("/admin").headers["location"] == "/"
    assert ann.act("invite", name="eve").status_code == 403
    assert ann.client.get("/admin/export").status_code == ann.client.get("/admin/arena").status_code == 303
    assert "No battles yet" in admin.client.get("/admin/arena").text
    page = admin.act("invite", name="<b>eve</b>").text
    link = re.search(r"http://127.0.0.1:8000/enter#([\w-]+)", page)
    assert link and access.enter(store, link[1]) and "<b>eve" not in page and "&lt;b&gt;eve" in page
    assert admin.act("rules", gold_least="0.8", lease="60").status_code == 303
    assert (store.rules().gold_least, store.rules().lease) == (0.8, 60)
    assert "gold_least=2.0: expected" in admin.act("rules", gold_least="2").text
    assert "expected a number" in admin.act("rules", lease="soon").text
    assert admin.act("guidelines", text="# Be kind").status_code == 303
    assert ann.client.get("/").headers["location"] == "/guidelines"
    assert ann.client.get("/api/task").json()["error"] == "guidelines"
    for wrong in ("", "x", "9" * 30):
        assert ann.client.post("/guidelines", data={"csrf": ann.csrf, "version": wrong}).status_code == 422
    ann.client.post("/guidelines", data={"csrf": ann.csrf, "version": "1"})
    assert ann.client.get("/").status_code == 200
    ann.submit(ann.task()["id"], {"ranks": [0, 0]})
    (row,) = map(json.loads, admin.client.get("/admin/export").text.splitlines())
    assert row["ranks"] == [0, 0] and row["person"] == "ann"
    for query, message in (("who=x", "filter &#39;who=x&#39;"), ("person=nobody", "the store has nobody of that name")):
        for path in ("export", "arena"):
            wrong = admin.client.get(f"/admin/{path}?{query}")  # the page, with the message
            assert wrong.status_code == 422 and message in wrong.text and "attachment" not in str(wrong.headers)
    assert admin.act("explode").status_code == 404


def test_odd_names_are_filtered(store: Store):
    names = ("Ann & Bob", "a=b?c#d", "1+1", "100 %")
    admin = Browser(store, "administrator", "administrator")
    for name in names:
        one = Browser(store, name)
        one.submit(one.task()["id"], {"skip": "other"})
        store.add([Item(f"prompt of {name}", ("one", "two"))])
        while task := one.task():
            one.submit(
                task["id"], {"ranks": [0, 1]} if name in task["prompt"] else {"skip": "other"}, f"{task['id']:09}"
            )
    for name in names:
        for text in (urllib.parse.quote(name, safe=""), urllib.parse.quote_plus(name)):
            (row,) = map(json.loads, admin.client.get(f"/admin/export?person={text}").text.splitlines())
            assert row["person"] == name


def test_several_administrators_and_who_decided(store: Store):
    ann, admin = Browser(store), Browser(store, "administrator", "administrator")
    link = re.search(r"/enter#([\w-]+)", admin.act("invite", name="fay", role="administrator").text)
    assert link
    fay = client(store)
    assert fay.post("/enter", json={"token": link[1]}).status_code == 200
    assert "Who decided what" in fay.get("/admin").text
    assert "of another role" in admin.act("invite", name="fay").text
    fay = Browser(store, "fay", "administrator")
    number = store.one("SELECT id FROM people WHERE name = 'ann'")["id"]
    assert fay.act("aside", person=number).status_code == 303 and ann.task() is None
    assert fay.act("rules", lease="60").status_code == 303
    assert fay.act("guidelines", text="# Be kind").status_code == 303
    assert admin.act("restore", person=number).status_code == 303
    page = re.sub(r"<[^>]+>|\s+", " ", admin.client.get("/admin").text.split("Who decided what</h2>")[1])
    for what in (
        "Restored: ann administrator",
        "Guidelines, new version 1 fay",
        "Rules changed lease 1800.0 → 60.0 fay",
        "Set aside: ann by the administrator fay",
        "Link sent: fay administrator administrator",
    ):
        assert what in re.sub(" +", " ", page), page
    chief = store.one("SELECT id FROM people WHERE name = 'administrator'")["id"]
    assert admin.act("revoke", person=chief).status_code == 404  # oneself
    assert fay.act("revoke", person=chief).status_code == 303
    assert admin.client.get("/api/task").status_code == 401 and fay.client.get("/admin").status_code == 200


def test_an_administrator_who_is_alone_is_led_to_the_first_task(store: Store):
    guidelines.add(store, "Be kind.\n\n- **prompt**: what is asked\n- **answer**: what is said")
    admin = Browser(store, "boss", "administrator")
    assert "You can label yourself: press Label" in admin.client.get("/admin").text
    assert admin.client.get("/?work").headers["location"] == "/guidelines"
    read = admin.client.post("/guidelines", data={"csrf": admin.csrf, "version": "1"})
    assert read.headers["location"] == "/?work"
    assert admin.client.get("/api/task").json()["about"] == ["prompt: what is asked"]
    admin.act("invite", name="ann")
    assert "You can label yourself" not in admin.client.get("/admin").text


def test_input_errors_reach_the_page(store: Store):
    with pytest.raises(InputError):
        access.invite(store, "  ")
    admin = Browser(store, "administrator", "administrator")
    assert "name: expected 1 to 80 characters" in admin.act("invite", name=" ").text
