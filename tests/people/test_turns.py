"""Turns and conversations of the task "chat" in the store, and their rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.people import exchange, turns
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.labelling import Clock, person

RULES = Rules(ratings="none", gold_share=0.0, repeat_share=0.0, turns=2)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def store(store: Store) -> Store:
    store.set_rules(RULES)
    return store


def say(store: Store, who: int, chat: int, message: str, strength: int | None) -> int:
    """A turn of a conversation, with a choice if `strength` is one."""
    prompt = [*turns.conversation(store, who, chat).messages(), {"role": "user", "content": message}]
    answers = (f"{message} first", f"{message} second")
    item = Item(prompt, answers, "compare", models=("ada", "bob"), ended=(True, True))
    turn = turns.record(store, who, f"name/{message}/{who}", item, [1, 0], chat)
    if strength is not None:
        store.submit(who, turn, f"submission/{message}", {"strength": strength}, 1.0)
    return turn


def test_a_conversation_is_what_its_turns_say(store: Store, tmp_path: Path):
    ann = person(store, "ann")
    store.add([Item("About birds", task="chat"), Item([{"role": "system", "content": "Be brief."}], task="chat")])
    task = store.task(ann)
    assert task and (task.task, task.prompt, task.responses) == ("chat", "About birds", [])
    say(store, ann, task.id, "one", -4)  # the first on the page, which is the second of the item
    say(store, ann, task.id, "two", None)
    found = turns.conversation(store, ann, task.id)
    assert [(turn.message, turn.responses, turn.strength) for turn in found.turns] == [
        ("one", ["one second", "one first"], -4),
        ("two", ["two second", "two first"], None),
    ]
    assert found.messages() == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one second"},
    ]
    with pytest.raises(InputError, match="turns: expected at least 2 in a conversation, got 1"):
        store.submit(ann, task.id, "submission", {}, 1.0)
    store.submit(ann, found.turns[1].id, "submission/two", {"strength": 1}, 1.0)
    store.submit(ann, task.id, "submission", {"note": "nice"}, 1.0)
    second = store.task(ann)
    assert second and second.item != task.item
    say(store, ann, second.id, "three", 2)
    rows = list(exchange.read(store.path))
    assert [kind for kind, _ in rows] == ["rankings", "rankings", "dialogues", "rankings"]
    first, other, dialogue, third = (row for _, row in rows)
    assert (first["chosen"], first["rejected"], first["strength"]) == ("one second", "one first", 4)
    assert (first["models"], first["shown"], first["ended"]) == (["ada", "bob"], [1, 0], [True, True])
    assert other["prompt"] == [*found.messages(), {"role": "user", "content": "two"}] and other["chosen"] == "two first"
    assert (dialogue["turns"], dialogue["topic"], dialogue["note"]) == (2, "About birds", "nice")
    assert [message["content"] for message in dialogue["messages"]] == ["one", "one second", "two", "two first"]
    assert third["prompt"][0] == {"role": "system", "content": "Be brief."}
    read = list(sources.rows(f"people:{store.path}", "rankings", data_dir=tmp_path / "data"))
    assert len(read) == 3 and read[1]["prompt"] == other["prompt"]
    assert len(list(sources.rows(f"people:{store.path}?kind=turn", "prompts", data_dir=tmp_path / "data"))) == 3
    assert exchange.export(store.path, tmp_path / "out.jsonl") == {
        "rankings": 3,
        "demonstrations": 0,
        "dialogues": 1,
    }


def test_another_pair_and_another_tab(store: Store):
    ann = person(store, "ann")
    store.add([Item("", task="chat")])
    task = store.task(ann)
    assert task
    before = say(store, ann, task.id, "one", None)
    assert say(store, ann, task.id, "one", None) == before  # the same name: sent twice
    with pytest.raises(Refused, match="other answers"):
        turns.record(store, ann, f"name/one/{ann}", Item(HELLO, ("a", "b"), "compare"), [0, 1])
    after = say(store, ann, task.id, "another", None)
    with pytest.raises(Refused) as refused:
        store.submit(ann, before, "submission", {"strength": 1}, 1.0)
    assert refused.value.code == "answered"
    stale = Item([{"role": "user", "content": "late"}], ("a", "b"), "compare")
    store.submit(ann, after, "submission", {"strength": 1}, 1.0)
    with pytest.raises(Refused) as refused:
        turns.record(store, ann, "too late", stale, [0, 1], task.id)
    assert refused.value.code == "moved"
    bob = person(store, "bob")
    for what in (lambda: turns.conversation(store, bob, task.id), lambda: turns.recorded(store, bob, after)):
        with pytest.raises(Refused) as refused:
            what()
        assert refused.value.code == "foreign"


def test_an_undo_goes_back_turn_by_turn(store: Store):
    ann = person(store, "ann")
    store.add([Item("a", ("x", "y"), "compare"), Item("", task="chat")])
    task = store.task(ann)
    assert task
    store.submit(ann, task.id, "comparison", {"strength": 1}, 1.0)
    task = store.task(ann)
    assert task
    thumb = turns.record(store, ann, "elsewhere", Item(HELLO, ("Hi",), "thumb"), [0])
    store.submit(ann, thumb, "thumbs up", {"thumb": "up"}, 1.0)
    for message in ("one", "two"):
        say(store, ann, task.id, message, 3)
    store.submit(ann, task.id, "submission", {}, 1.0)
    store.undo(ann)  # of the end
    again = store.task(ann)
    assert again and again.id == task.id and len(turns.conversation(store, ann, task.id).turns) == 2
    say(store, ann, task.id, "three", None)
    store.undo(ann)  # of turn two, and what came after it goes
    assert [turn.strength for turn in turns.conversation(store, ann, task.id).turns] == [3, None]
    store.undo(ann)
    assert [(turn.message, turn.strength) for turn in turns.conversation(store, ann, task.id).turns] == [("one", None)]
    assert [row["thumb"] for row in _answers(store)] == ["up"]
    store.undo(ann)  # of the comparison before; the thumb stays
    found = store.task(ann)
    assert found and found.task == "compare" and [row["thumb"] for row in _answers(store)] == ["up"]


def _answers(store: Store) -> list[Any]:
    with store.reader() as db:
        found = db.execute("SELECT answer FROM labels WHERE id NOT IN (SELECT label FROM withdrawals)")
        return [answer for row in found if "thumb" in (answer := json.loads(row["answer"]))]


def test_a_conversation_is_taken_up_where_it_was(store: Store, clock: Clock):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add([Item("", task="chat")])
    task = store.task(ann)
    assert task
    say(store, ann, task.id, "one", 1)
    clock.now += 2000  # the lease runs out; nobody takes it
    assert len(turns.conversation(store, ann, task.id).turns) == 1
    say(store, ann, task.id, "two", 1)
    clock.now += 2000
    other = store.task(bob)
    assert other and turns.conversation(store, bob, other.id).turns == []
    with pytest.raises(Refused) as refused:
        say(store, ann, task.id, "three", 1)
    assert refused.value.code == "expired"
    assert len(list(exchange.read(store.path))) == 2
    clock.now += 2000
    again = store.task(ann)
    assert again and len(turns.conversation(store, ann, again.id).turns) == 2


def test_turns_are_asked_of_nobody_and_count_as_no_items(store: Store):
    ann, bob = person(store, "ann"), person(store, "bob")
    thumb = turns.record(store, ann, "some name", Item(HELLO, ("Hi",), "thumb", models=("ada",)), [0])
    assert store.task(bob) is None and not store.has_items() and store.pace(bob).left == 0
    store.submit(ann, thumb, "submission", {"thumb": "up"}, 1.0)
    turns.withdraw(store, ann, thumb)
    turns.withdraw(store, ann, thumb)  # nothing is left
    store.submit(ann, thumb, "submission2", {"thumb": "down"}, 1.0)
    ((kind, row),) = exchange.read(store.path)
    assert kind == "thumbs" and (row["prompt"], row["response"], row["label"]) == (HELLO, "Hi", False)
    assert row["models"] == ["ada"] and row["number"] == 2 and row["person"] == "ann"
    with pytest.raises(InputError, match="thumb: expected one of up, down"):
        store.submit(
            ann, turns.record(store, ann, "x", Item(HELLO, ("Hi",), "thumb"), [0]), "submission3", {"thumb": 1}, 1.0
        )
    assert [kind for kind, _, _ in exchange.learnt(store.path)] == ["thumbs"]


def test_conversations_out_of_a_file(tmp_path: Path, store: Store):
    path = tmp_path / "chats.jsonl"
    system = [{"role": "system", "content": "Be brief."}]
    path.write_text(
        "\n".join(
            json.dumps(row)
            for row in (
                {"task": "chat", "prompt": "About birds"},
                {"task": "chat", "prompt": ""},
                {"task": "chat", "prompt": system, "overlap": 2},
            )
        )
    )
    items = list(exchange.read_items(path))
    assert [item.prompt for item in items] == ["About birds", "", system] and store.add(items) == (3, 0)
    path.write_text('{"prompt": "x"}')
    assert [item.task for item in exchange.read_items(path, "chat")] == ["chat"]
    for row, message in (
        ({"prompt": HELLO}, "no user's"),
        ({"prompt": [{"role": "odd", "content": ""}]}, r"prompt\[0\]"),
        ({"prompt": 3}, "field prompt"),
    ):
        path.write_text(json.dumps(row | {"task": "chat"}))
        with pytest.raises(InputError, match=message):
            list(exchange.read_items(path))
    for item in (Item("x", ("a",), "chat"), Item("x", (), "chat", gold=()), Item("x", ("a", "b"), "thumb")):
        with pytest.raises(InputError):
            store.add([item])
