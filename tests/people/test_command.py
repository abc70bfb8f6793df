"""The command line of the pages: what it refuses, starts, finishes, imports and invites."""

import functools
import re
import signal
import sqlite3
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.errors import InputError
from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access, beside, guidelines, record
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from tests.people.labelling import person
from tests.people.serving import Server
from tests.people.visiting import Browser


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


@pytest.mark.usefixtures("prompts")
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


@pytest.mark.parametrize("ended", [signal.SIGINT, signal.SIGTERM])
def test_the_server_says_how_many_labels_are_stored(ended: signal.Signals, store: Store):
    """It is the last line, after control-C too; a skipped task and a label that was withdrawn do not count."""
    store.add([Item(f"prompt {n}", ("one", "two")) for n in range(4)])
    ann = person(store, "ann")
    for n, given in enumerate(({"ranks": [0, 1]}, {"skip": "other"}, {"ranks": [0, 0]}, {"ranks": [1, 0]})):
        task = store.task(ann)
        assert task
        store.submit(ann, task.id, f"submission {n}", given, 1.0)
    store.undo(ann)
    server = Server(store.path, "--prompts", 0)
    with urllib.request.urlopen(f"{server.url}/enter", timeout=60):  # it serves
        server.process.send_signal(ended)
    server.process.wait(60)
    server.close()
    assert server.said[-1] == f"{store.path}: 2 labels are stored\n"
