"""The server without a browser: who may do what, what is refused and how, and what the answers' headers forbid."""

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from starlette.testclient import TestClient

from rlhf_jax.errors import InputError
from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access, arena, forms, frame, markdown, server, words
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "people.db") as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
        store.add([Item(f"prompt {n}", ("one", "two")) for n in range(3)])
        yield store


def client(store: Store, options: frame.Options | None = None) -> TestClient:
    return TestClient(server.app(store, options), base_url="http://127.0.0.1:8000", follow_redirects=False)


class Browser:
    """Somebody who has followed their link."""

    def __init__(self, store: Store, name: str = "ann", role: Any = "labeler"):
        self.client = client(store)
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
    assert admin.client.get("/admin/export?who=x").status_code == 200  # the page, with the message
    assert admin.act("explode").status_code == 404


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
    guesses = client(store, frame.Options(attempts=3.0))
    assert [guesses.post("/enter", json={"token": "x"}).status_code for _ in range(4)] == [401, 401, 401, 429]
    assert guesses.post("/enter", json={"token": access.invite(store, "bob")}).status_code == 200


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
        assert command._models(command.Serve(db=store.path, prompts=0), store) == ()


def test_import_adds_to_a_store(tmp_path: Path, capsys: pytest.CaptureFixture):
    responses = tmp_path / "r.jsonl"
    responses.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    for said in ("1 items added, 0 were", "0 items added, 1 were"):
        command.main(["import", "--db", str(tmp_path / "x.db"), "--responses", str(responses)])
        assert said in capsys.readouterr().out
    responses.write_text('{"prompt": "p", "responses": ["a", "a\\n"], "task": "arena", "models": ["x", "y"]}\n')
    command.main(["import", "--db", str(tmp_path / "x.db"), "--responses", str(responses)])
    assert "1 items added, 0 were there already; 1 battles have the same answer" in capsys.readouterr().out


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
