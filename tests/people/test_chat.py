"""Talking to models: who may do it, what is recorded of it, and what an endpoint may do wrong."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from starlette.testclient import TestClient

from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access, chat, exchange, guidelines, server, turns
from rlhf_jax.people.endpoint import Endpoint
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.endpoints import Stub
from tests.people.labelling import person
from tests.people.visiting import Browser

RULES = Rules(ratings="none", gold_share=0.0, repeat_share=0.0, turns=2)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def store(store: Store) -> Store:
    store.set_rules(RULES)
    return store


class Talker(Browser):
    """Somebody who talks to the stub's models."""

    def __init__(self, store: Store, url: str, name: str = "ann", role: Any = "labeler", **options: Any):
        app = server.app(store, None, chat.part(Endpoint(url, **options)))
        self.client = TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False)
        assert self.client.post("/enter", json={"token": access.invite(store, name, role)}).status_code == 200
        self.csrf = self.client.get("/guidelines").text.split('name="csrf" content="')[1][:64]
        self.headers = {"X-CSRF": self.csrf}
        self._names = iter(range(10**6))

    def ask(self, **body: Any) -> list[dict[str, Any]]:
        found = self.post("/api/chat/answer", name=f"question {next(self._names)}", **body)
        if found.status_code != 200:
            return [found.json() | {"status": found.status_code}]
        return [json.loads(line) for line in found.text.splitlines()]


@pytest.fixture
def ann(store: Store, stub: Stub, served: tuple[Stub, str]) -> Iterator[Talker]:
    talker = Talker(store, served[1])
    with talker.client:
        yield talker


def text(events: list[dict[str, Any]], n: int = 0) -> str:
    return "".join(event.get("text", "") for event in events if event.get("n") == n)


def test_a_labeler_talks_and_judges(store: Store, stub: Stub, ann: Talker):
    assert "/chat" in ann.client.get("/").text and ann.client.get("/chat").status_code == 200
    assert ann.client.get("/api/chat/models").json() == {"models": [None, None]}
    system = {"role": "system", "content": "Be brief."}
    events = ann.ask(model=1, messages=[system, *HELLO], temperature=0.3, max_tokens=40)
    assert text(events) == "bob heard: Hello" and events[-2] == {"n": 0, "end": "stop"}
    assert "bob" not in str([event for event in events if "text" not in event])
    (asked,) = stub.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("bob", 0.3, 40)
    turn = events[-1]["turn"]
    assert ann.submit(turn, {"thumb": "down"}).status_code == 200
    assert ann.post("/api/chat/withdraw", assignment=turn).json() == {"withdrawn": True}
    assert ann.submit(turn, {"thumb": "up"}, "another one").status_code == 200
    better = {"assignment": turn, "text": "Good day.", "submission": "a better one", "seconds": 3}
    label = ann.post("/api/chat/better", **better).json()
    assert ann.post("/api/chat/better", **better).json() == label  # sent twice
    assert ann.post("/api/chat/better", **better | {"text": " ", "submission": "another two"}).status_code == 422
    assert ann.post("/api/chat/better", **better | {"assignment": 99}).status_code == 409
    rows = list(exchange.read(store.path))
    assert [kind for kind, _ in rows] == ["thumbs", "demonstrations", "rankings"]
    assert all(row["models"] == ["bob"] and row["prompt"] == [system, *HELLO] for _, row in rows)
    assert rows[0][1]["label"] is True and rows[1][1]["completion"] == "Good day."
    assert rows[2][1]["responses"] == ["Good day.", "bob heard: Hello"] and rows[2][1]["ranks"] == [0, 1]


def test_an_administrator_sees_names_and_adds_conversations(store: Store, served: tuple[Stub, str], stub: Stub):
    admin = Talker(store, served[1], "administrator", "administrator")
    with admin.client:
        assert admin.client.get("/api/chat/models").json() == {"models": ["ada", "bob"]}
        for count in ("0", "x", "1001", "-1", ""):
            assert "count=" in admin.act("chats", count=count, topic="t").text
        assert admin.act("chats", count="3", topic=" About birds ").status_code == 303
        assert admin.act("chats", count="2", topic="").status_code == 303
        assert store.pace(1).left == 5
        stub.fault = "busy"
        assert admin.ask(model=0, messages=HELLO) == [{"error": "chat_busy", "message": "slow down"}]


def test_a_pair_streams_and_the_chosen_one_goes_on(store: Store, stub: Stub, ann: Talker):
    store.add([Item([{"role": "system", "content": "Be brief."}], task="chat")])
    task = ann.task()
    where = f"/api/chat/conversation?assignment={task['id']}"
    for n in range(2):
        events = ann.ask(assignment=task["id"], message=f"message {n}")
        texts = [text(events, n) for n in range(2)]
        assert sorted(texts) == [f"{model} heard: message {n}" for model in ("ada", "bob")]
        assert {event["n"] for event in events if "end" in event} == {0, 1}
        found = ann.client.get(where).json()["turns"][-1]
        assert (found["id"], found["responses"], found["strength"]) == (events[-1]["turn"], texts, None)
        place = [t.startswith("bob") for t in texts].index(True)
        assert ann.submit(events[-1]["turn"], {"strength": 3 if place else -3}, f"choice {n} of ann").status_code == 200
    assert stub.asked[-1]["messages"][1:3] == [
        {"role": "user", "content": "message 0"},
        {"role": "assistant", "content": "bob heard: message 0"},
    ]
    assert len({asked["seed"] for asked in stub.asked}) == 4
    assert ann.submit(task["id"], {}, "the end of it").status_code == 200
    rows = [row for kind, row in exchange.read(store.path) if kind == "rankings"]
    assert [row["chosen"] for row in rows] == ["bob heard: message 0", "bob heard: message 1"]
    assert all(row["strength"] == 3 and row["models"] == ["ada", "bob"] for row in rows)


def test_one_model_answers_twice(store: Store, stub: Stub, ann: Talker):
    stub.names = ["ada"]
    store.add([Item("", task="chat")])
    events = ann.ask(assignment=ann.task()["id"], message="Hi")
    assert text(events, 0) == text(events, 1) == "ada heard: Hi" and "turn" in events[-1]


@pytest.mark.parametrize("fault", ["cut", "malformed", "error", "number"])
def test_what_breaks_in_the_middle_is_told_and_nothing_recorded(store: Store, stub: Stub, ann: Talker, fault: str):
    stub.fault = fault
    events = ann.ask(model=0, messages=HELLO)
    codes = {"cut": "cut", "error": "refused"}
    assert text(events) == "ada " and events[-1] == {"error": f"chat_{codes.get(fault, 'malformed')}", "message": ""}
    store.add([Item("", task="chat")])
    number = ann.task()["id"]
    assert "error" in ann.ask(assignment=number, message="Hi")[-1]
    assert ann.client.get(f"/api/chat/conversation?assignment={number}").json()["turns"] == []
    stub.fault = ""
    assert "turn" in ann.ask(model=0, messages=HELLO)[-1]


def test_a_silent_model_is_waited_for_so_long_and_no_longer(store: Store, stub: Stub, served: tuple[Stub, str]):
    stub.fault = "silent"
    ann = Talker(store, served[1], patience=0.2)
    with ann.client:
        events = ann.ask(model=0, messages=HELLO)
    assert text(events) == "ada " and events[-1] == {"error": "chat_slow", "message": ""}


def test_refusals_of_the_endpoint(store: Store, stub: Stub, served: tuple[Stub, str], ann: Talker):
    for fault, code in (("busy", "busy"), ("long", "long"), ("broken", "refused"), ("no stream", "malformed")):
        stub.fault = fault
        assert ann.ask(model=0, messages=HELLO) == [{"error": f"chat_{code}", "message": ""}]
    stub.fault = "length"
    assert ann.ask(model=0, messages=HELLO)[-2:-1] == [{"n": 0, "end": "length"}]
    away = Talker(store, "http://127.0.0.1:9", "bob")
    with away.client:
        assert away.client.get("/api/chat/models").json() == {"error": "chat_away", "message": ""}
        assert away.ask(model=0, messages=HELLO) == [{"error": "chat_away", "message": "", "status": 502}]


def test_a_model_that_could_not_be_loaded_is_told_to_who_can_act(store: Store):
    why = ["runs/a/model: expected params, got none"]
    store.add([Item("about birds", task="chat")])

    def gone() -> str:
        return why[0]

    ann = Talker(store, "http://127.0.0.1:9", gone=gone)
    admin = Talker(store, "http://127.0.0.1:9", "eve", "administrator", gone=gone)
    with ann.client, admin.client:
        for one, told in ((ann, ""), (admin, why[0])):
            assert one.client.get("/api/chat/models").json() == {"error": "chat_broken", "message": told}
            assert one.ask(model=0, messages=HELLO) == [{"error": "chat_broken", "message": told, "status": 502}]
        assert ann.task() is None and "1 conversations wait for a model" in admin.client.get("/admin").text
        why[0] = ""  # it is starting
        assert ann.client.get("/api/chat/models").json()["error"] == "chat_away"
        assert ann.task()["task"] == "chat" and "wait for a model" not in admin.client.get("/admin").text


def test_conversations_are_not_given_out_without_a_model(store: Store):
    store.add([Item("about birds", task="chat")])
    plain, admin = Browser(store, "eve"), Browser(store, "fay", "administrator")
    assert plain.task() is None and plain.client.get("/api/task").json()["pace"]["left"] == 0
    assert "1 conversations wait for a model" in admin.client.get("/admin").text


@pytest.mark.parametrize(
    "body, message",
    [
        ({}, "model: expected"),
        ({"model": True}, "model: expected"),
        ({"model": 2}, "from 0 to 1"),
        ({"model": 0}, "messages: expected a list"),
        ({"model": 0, "messages": []}, "messages: expected a list"),
        ({"model": 0, "messages": ["x"]}, r"messages[0]"),
        ({"model": 0, "messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"model": 0, "messages": [{"role": "user", "content": 3}]}, "messages[0].content: expected text"),
        ({"model": 0, "messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"model": 0, "messages": [{"role": "user", "content": " "}]}, "got nothing"),
        ({"model": 0, "messages": [{"role": "system", "content": "x"}]}, "in turn"),
        ({"model": 0, "messages": HELLO * 2}, "in turn"),
        ({"model": 0, "messages": HELLO, "temperature": 3}, "temperature"),
        ({"model": 0, "messages": HELLO, "temperature": float("nan")}, "temperature"),
        ({"model": 0, "messages": HELLO, "temperature": True}, "temperature"),
        ({"model": 0, "messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"assignment": "x", "message": "x"}, "assignment: expected a number"),
        ({"assignment": 1, "message": ""}, "got nothing"),
    ],
)
def test_wrong_questions_are_named(ann: Talker, body: dict[str, Any], message: str):
    (found,) = ann.ask(**body)
    assert found["status"] == 422 and message in found["message"]


def test_who_may_talk(store: Store, stub: Stub, ann: Talker, served: tuple[Stub, str]):
    for path in ("answer", "stop", "withdraw", "better"):
        found = ann.client.post(f"/api/chat/{path}", json={"name": "some name"})
        assert found.status_code == 403 and found.json()["error"] == "foreign_page"
    assert ann.act("chats", count="1", topic="x").status_code == 403
    assert ann.ask(assignment=99, message="x")[0]["error"] == "foreign"
    assert ann.client.get("/api/chat/conversation?assignment=99").status_code == 409
    assert ann.client.get("/api/chat/conversation?assignment=x").status_code == 422
    assert ann.post("/api/chat/answer", name="short", model=0, messages=HELLO).status_code == 422
    guidelines.add(store, "Be kind")
    assert ann.client.get("/chat").headers["location"] == "/guidelines"
    assert ann.ask(model=0, messages=HELLO)[0]["error"] == "guidelines"
    ann.client.post("/guidelines", data={"csrf": ann.csrf, "version": "1"})
    store.set_aside(person(store, "ann"), "a test")
    assert ann.ask(model=0, messages=HELLO)[0]["error"] == "aside"
    ann.client.cookies.clear()
    for path in ("/chat", "/api/chat/models", "/api/chat/conversation?assignment=1"):
        assert ann.client.get(path).status_code in (303, 401)
    assert ann.ask(model=0, messages=HELLO)[0]["status"] == 401
    assert not stub.asked
    plain = Browser(store, "eve")
    assert plain.client.get("/chat").status_code == 404 and "/chat" not in plain.client.get("/guidelines").text


def test_a_slow_answer_is_stopped_and_no_more_than_two_run_at_once(store: Store, stub: Stub, ann: Talker):
    stub.pause = 1.0
    found: dict[str, list[dict[str, Any]]] = {}

    def ask(name: str) -> None:
        answer = ann.post("/api/chat/answer", name=name, model=0, messages=[{"role": "user", "content": "x " * 50}])
        found[name] = [json.loads(line) for line in answer.text.splitlines()]

    asking = [threading.Thread(target=ask, args=(f"slow question {n}",)) for n in range(2)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + 5
    while len(stub.asked) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert ann.ask(model=0, messages=HELLO)[0] == {
        "error": "chat_busy",
        "message": server.words.of("en")["error_chat_busy"],
        "status": 429,
    }
    assert ann.post("/api/chat/stop", name="slow question 0").json() == {"stopped": True}  # before the first word
    time.sleep(1.5)
    ann.post("/api/chat/stop", name="slow question 1")
    assert ann.post("/api/chat/stop", name="question nobody asked").json() == {"stopped": True}
    for thread in asking:
        thread.join()
    assert found["slow question 0"] == [{"n": 0, "end": "length"}, {"error": "chat_stopped", "message": ""}]
    assert text(found["slow question 1"]).startswith("ada ") and "turn" in found["slow question 1"][-1]
    assert turns.recorded(store, 1, found["slow question 1"][-1]["turn"]).ended == (False,)
    stub.pause = 0.0
    assert "turn" in ann.ask(model=0, messages=HELLO)[-1]
    assert stub.cancelled == 2


def test_what_came_in_halves_is_whole_in_the_store(store: Store, stub: Stub, ann: Talker):
    stub.text = "\ud83d \ude00 \ud83d"
    events = ann.ask(model=0, messages=HELLO)
    assert turns.recorded(store, 1, events[-1]["turn"]).responses == ("\ufffd \ufffd \ufffd",)


# The command line -----------------------------------------------------------------------------------------------------


def test_where_people_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    db = tmp_path / "people.db"
    models = tuple(tmp_path / name for name in "ab")
    for path in models:
        path.mkdir()
        (path / "config.json").touch()
    monkeypatch.setattr(command, "QUICKSTART", tmp_path / "none")
    assert command._talking(command.Serve(db=db)) == ("", [])
    assert command._talking(command.Serve(db=db, chat="http://h:1/v1", model=models)) == ("http://h:1/v1", [])
    assert command._talking(command.Serve(db=db, model=models, talk=False)) == ("", [])
    url, (program,) = command._talking(command.Serve(db=db, model=models))
    *_, module, flag, port, _, first, second = program.command
    assert (module, flag, first, second) == ("experiments.serve", "--port", *map(str, models)) and url.endswith(port)
    monkeypatch.setattr(command, "QUICKSTART", models[0])
    assert command._talking(command.Serve(db=db))[1][0].command[-1] == str(models[0])
    assert command._talking(command.Serve(db=db, responses=tmp_path / "x.jsonl")) == ("", [])
    for args, message in (
        (["--chat", "ftp://x"], "--chat ftp://x: expected an address"),
        (["--chat", "localhost:8000"], "--chat localhost:8000: expected an address"),
        (["--task", "chat"], "--task chat: no model answers before"),
        (["--task", "thumb"], "--task thumb: give the answers by --responses"),
    ):
        with pytest.raises(SystemExit):
            command.main(args)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
