"""The server without a browser: who may do what, what is refused and how, and what the answers' headers forbid."""

import asyncio
import functools
import json
import re
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from starlette.testclient import TestClient

from rlhf_jax.errors import InputError
from rlhf_jax.people import __main__ as command
from rlhf_jax.people import (
    access,
    acts,
    arena,
    beside,
    forms,
    frame,
    guidelines,
    markdown,
    network,
    record,
    server,
    words,
)
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "people.db") as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
        store.add([Item(f"prompt {n}", ("one", "two")) for n in range(3)])
        yield store


def client(store: Store, options: frame.Options | None = None, *parts: frame.Part) -> TestClient:
    return TestClient(server.app(store, options, *parts), base_url="http://127.0.0.1:8000", follow_redirects=False)


class Browser:
    """Somebody who has followed their link."""

    def __init__(self, store: Store, name: str = "ann", role: Any = "labeler", *parts: frame.Part):
        self.client = client(store, None, *parts)
        assert self.client.post("/enter", json={"token": access.invite(store, name, role)}).json() == {"to": "/"}
        page = self.client.get("/guidelines").text
        found = re.search(r'name="csrf" content="(\w{64})"', page)
        assert found
        self.headers = {"X-CSRF": found[1]}
        self.csrf = found[1]

    def task(self) -> Any:
        return self.client.get("/api/task").json()["task"]

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, content=json.dumps(body), headers=self.headers)

    def submit(self, number: int, answer: Any, name: str = "submission") -> Any:
        return self.post("/api/submit", assignment=number, submission=name, answer=answer, seconds=1.5)

    def act(self, action: str, **form: Any) -> Any:
        return self.client.post(f"/admin/{action}", data={"csrf": self.csrf} | form)


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


def test_a_page_comes_in_the_theme_that_was_chosen(store: Store):
    ann = client(store)
    assert 'data-theme=""' in ann.get("/enter").text
    ann.cookies.set("theme", "dark")
    assert 'data-theme="dark"' in ann.get("/enter").text
    ann.cookies.set("theme", "'><script>")
    assert "'><script>" not in ann.get("/enter").text


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


def test_both_languages_have_all_words(store: Store):
    table = json.loads((frame.PAGES / "words.json").read_text())
    assert all(len(said) == len(words.LANGUAGES) and all(said) for said in table.values())
    for name, (english, chinese) in table.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    texts = "".join(path.read_text() for path in frame.PAGES.rglob("*.*") if path.suffix in (".html", ".js"))
    used = set(re.findall(r'\bt\("(\w+)"', texts)) | set(re.findall(r"\bt\.(\w+)", texts))
    assert used <= table.keys()
    for prefix, names in (("flag", forms.FLAGS), ("pflag", forms.PROMPT_FLAGS)):
        assert {f"{prefix}_{name}" for name in names} <= table.keys()
    assert {f"skip_{name}" for name in forms.SKIPS} <= table.keys()
    assert {f"verdict_{name}" for name in forms.VERDICTS} | {f"arena_{why}" for why in get_args(arena.Why)} <= (
        table.keys()
    )
    assert {f"act_{what}" for what in get_args(acts.What)} | {"chats_wait", "error_chat_broken"} <= table.keys()
    assert {"failed_answers", "failed_serve"} <= table.keys()
    nobody = client(store)
    assert "欢迎" in nobody.get("/enter", headers={"Accept-Language": "zh-CN,en;q=0.5"}).text
    assert "Welcome" in nobody.get("/enter", headers={"Accept-Language": "fr"}).text
    nobody.get("/language?to=zh")
    assert "欢迎" in nobody.get("/enter").text


def test_guidelines_are_markup_of_ours_alone():
    text = "# <b>Hi\n\n**bold** `a*b*<` ![i](https://a.b/i) [x](https://a.b/c) [y](javascript:z)\n\n- one"
    assert markdown.html(text) == (
        "<h2>&lt;b&gt;Hi</h2>\n"
        '<p><strong>bold</strong> <code>a*b*&lt;</code> !<a href="https://a.b/i">i</a>'
        ' <a href="https://a.b/c">x</a> [y](javascript:z)</p>\n'
        "<ul>\n<li>one</li>\n</ul>\n"
    )
    assert markdown.html("```\n<i>*x*\n```\n") == "<pre><code>&lt;i&gt;*x*\n</code></pre>\n"


@pytest.mark.slow
def test_a_large_store_is_as_quick(tmp_path: Path):
    """100,000 labels: open in under 3 s, a task and a submission in under 100 ms each."""
    path = tmp_path / "large.db"
    n = 100_000
    with Store(path) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.5))
        for name in ("ann", "bob"):
            access.invite(store, name)
        with store.writer() as db:
            items = ((bytes(str(k), "ascii"), "rank", '"p"', '["a","b"]', 3, 1, 1.0) for k in range(n + 100))
            db.executemany(
                "INSERT INTO items (key, round, task, prompt, responses, words, overlap, created)"
                " VALUES (?, 0, ?, ?, ?, ?, ?, ?)",
                items,
            )
            db.execute(
                "INSERT INTO assignments (item, person, kind, slot, shown, created, expires, state)"
                " SELECT id, 1 + id % 2, 'slot', 0, '[0,1]', 1, 2, 'done' FROM items WHERE id <= ?",
                (n,),
            )
            db.execute("UPDATE items SET taken = 1 WHERE id <= ?", (n,))
            db.execute(
                "INSERT INTO labels (assignment, item, person, kind, submission, answer, started, created, seconds,"
                " fast) SELECT id, item, person, 'slot', 'submission' || id, '{\"ranks\":[0,1]}', 1, id, 1, 0"
                " FROM assignments"
            )
            db.execute("UPDATE people SET last = ?", (n,))
    start = time.perf_counter()
    with Store(path) as store:
        assert time.perf_counter() - start < 3
        taken = []
        for k in range(5):
            start = time.perf_counter()
            found = store.task(1)
            store.pace(1)
            taken.append(time.perf_counter() - start)
            assert found
            start = time.perf_counter()
            store.submit(1, found.id, f"submission-new-{k}", {"ranks": [0, 1]}, 1.0)
            taken.append(time.perf_counter() - start)
        assert sorted(taken)[-3] < 0.1, taken


def test_the_command_line_names_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture):
    responses = tmp_path / "r.jsonl"
    responses.write_text('{"prompt": "p", "responses": ["a", "b"]}\n{"prompt": 3}\n')
    (tmp_path / "one.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    other = tmp_path / "other.db"
    sqlite3.connect(other).execute("CREATE TABLE t (x)").connection.close()
    for args, message in (
        (["--frobnicate"], "error: --frobnicate; see --help"),
        (["--port", "x"], "error: --port: invalid literal for int() with base 10: 'x'; see --help"),
        (["--port", "70000"], "port=70000: expected at least 0 and less than 65536"),
        (["--host", "0.0.0.0"], "--behind-proxy or --certificate"),
        (["--responses", responses, "--db", tmp_path / "x.db"], "line 2, field prompt"),
        (["--responses", tmp_path / "none"], "no such file"),
        (["--model", tmp_path, "--db", tmp_path / "x.db"], "expected a model directory"),
        (["--model", tmp_path, "--prompts", "0", "--db", tmp_path / "x.db"], "has nothing to answer; leave one of"),
        (["--task", "arena", "--db", tmp_path / "x.db"], "--task arena compares at least two models"),
        (["--task", "arena", "--model", "a", "a", "--db", tmp_path / "x.db"], "--model a: is named twice"),
        (["--task", "arena", "--model", "a", "b", "--pairs", "2", "--db", tmp_path / "x.db"], "pairs=2: expected"),
        (["--task", "arena", "--responses", tmp_path / "one.jsonl", "--db", tmp_path / "x.db"], "line 1, task arena"),
        (["export", "--db", tmp_path / "none.db"], "no such store"),
        (["export", "--db", other], "no store of labels"),
        (["export", "--db", tmp_path / "x.db", "--filter", "x"], "filter 'x'"),
        (["import", "--db", tmp_path / "x.db"], "--responses"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main([str(arg) for arg in args])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and message in said and said.count("\n") == 1, said


def test_pages_without_tasks_of_their_own(tmp_path: Path):
    """Another program adds them, so that no model answers."""
    with Store(tmp_path / "x.db") as store:
        assert command._sampling(command.Serve(db=store.path, prompts=0), store) is None


def test_the_first_start_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(command, "QUICKSTART", tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    for name in ("_run", "_answering"):
        monkeypatch.setattr(command, name, lambda *_: [])
    for flags, ratings, version, said in (
        ({}, "overall", 1, "press Label; the models answer the prompts meanwhile, and the first tasks come in about a"),
        ({"ratings": "none"}, "none", 1, "come in about a minute\n"),
        (
            {"model": (tmp_path / "model",)},
            "all",
            1,
            "A ranking needs four ratings of each answer first; with",
        ),
        ({"data": str(tmp_path / "prompts.jsonl")}, "all", 0, "with --ratings none it needs none"),
    ):
        db = tmp_path / f"{len(flags)}{version}{ratings}.db"
        command.serve(command.Serve(db=db, port=0, talk=False, **flags))
        with Store(db) as store:
            assert (store.rules().ratings, guidelines.newest(store)[0]) == (ratings, version)
        assert said in capsys.readouterr().out


def test_a_restart_finishes_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(command, "QUICKSTART", tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with Store(tmp_path / "x.db") as store:

        def start(**flags: Any) -> Any:
            cfg = command.Serve(db=store.path, **flags)
            return command._answering(cfg, store, command._sampling(cfg, store))

        (first,) = start(prompts=30, k=3)
        record.note(store, 1, 12)
        store.add([Item("p", ("a", "b"))])
        (again,) = start()
        assert again.command == first.command and record.done(store, 1) == 12 and not capsys.readouterr().out
        (again,) = start(prompts=30, k=3)
        assert again.command == first.command and not capsys.readouterr().out
        (again,) = start(prompts=50, k=3)
        assert again.command == first.command
        assert capsys.readouterr().out.startswith("--prompts: ignored, since what was begun before is finished first;")
        record.finish(store, 1)
        assert start() == [] and not capsys.readouterr().out
        for flags, named in (
            ({"data": "prompts.jsonl", "prompts": 200, "k": 4}, "--data, --prompts, --k"),
            ({"task": "compare", "overlap": 2, "overlap_share": 0.5}, "--task, --overlap, --overlap-share"),
            ({"responses": tmp_path / "r.jsonl", "task": "compare", "overlap": 2, "seed": 3}, "--seed"),
        ):
            assert start(**flags) == []
            said = capsys.readouterr().out
            assert said.startswith(f"{named}: ignored, since") and "name --model" in said and said.count("\n") == 1
        (other,) = start(model=(tmp_path / "model",))
        assert other.command != first.command and not capsys.readouterr().out


def test_pages_tell_how_far_the_models_are(store: Store):
    store.set_overlap({1: 0, 2: 0, 3: 0})
    number = record.begin(store, command._asked(command.Serve(), (Path("a"),)))
    programs = [beside.Program([], "answers")]
    note = functools.partial(command._noted, programs)
    admin, ann = Browser(store, "boss", "administrator", note), Browser(store, "ann", "labeler", note)
    assert ann.client.get("/api/task").json()["sampling"] == {"done": 0, "prompts": 200}
    assert "the first tasks come in about a minute" in admin.client.get("/admin").text
    record.note(store, number, 16)
    assert "16 of 200 are ready" in admin.client.get("/admin").text
    programs[0].failed = "no such model"
    assert ann.client.get("/api/task").json()["sampling"] is None
    programs[0].failed = ""
    record.finish(store, number)
    assert ann.client.get("/api/task").json()["sampling"] is None
    assert "are ready" not in admin.client.get("/admin").text


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


def test_people_write_answers_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "QUICKSTART", tmp_path / "none")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    cfg = command.Serve(db=tmp_path / "x.db", task="demonstrate", data=str(file))
    assert [(item.prompt, item.task) for item in command._to_write(cfg)] == [
        ("one", "demonstrate"),
        ("two", "demonstrate"),
    ]
    with Store(tmp_path / "x.db") as store:
        for data in ("world", None):  # read by the program that has JAX
            wanted = command._sampling(command.Serve(db=store.path, task="demonstrate", data=data), store)
            assert wanted and (wanted.model, wanted.data) == ((), "world")
        with pytest.raises(InputError, match="nothing to ask"):
            command._sampling(command.Serve(db=store.path), store)


def test_import_adds_to_a_store(tmp_path: Path, capsys: pytest.CaptureFixture):
    responses = tmp_path / "r.jsonl"
    responses.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    for said in ("1 items added, 0 were", "0 items added, 1 were"):
        command.main(["import", "--db", str(tmp_path / "x.db"), "--responses", str(responses)])
        assert said in capsys.readouterr().out
    responses.write_text('{"prompt": "p", "responses": ["a", "a\\n"], "task": "arena", "models": ["x", "y"]}\n')
    command.main(["import", "--db", str(tmp_path / "x.db"), "--responses", str(responses)])
    assert "1 items added, 0 were there already; 1 battles have the same answer" in capsys.readouterr().out


def test_the_command_line_invites(tmp_path: Path, capsys: pytest.CaptureFixture):
    db = tmp_path / "x.db"
    with pytest.raises(SystemExit):
        command.main(["invite", "--db", str(db), "--name", "fay"])
    assert "no such store" in capsys.readouterr().err
    with Store(db) as store:
        for role, url in (("administrator", "https://label.example/"), ("labeler", "http://127.0.0.1:8000")):
            command.main(["invite", "--db", str(db), "--name", f"the {role}", "--role", role, "--url", url])
            link = re.fullmatch(rf"the {role} \({role}\): {url.rstrip('/')}/enter#(\S+)\n", capsys.readouterr().out)
            found = link and access.person(store, access.enter(store, link[1]) or "")
            assert found and found.role == role


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


def test_input_errors_reach_the_page(store: Store):
    with pytest.raises(InputError):
        access.invite(store, "  ")
    admin = Browser(store, "administrator", "administrator")
    assert "name: expected 1 to 80 characters" in admin.act("invite", name=" ").text
