"""Runs that ask people and wait for their answers."""

import dataclasses
import itertools
import sqlite3
import sys
import threading
from pathlib import Path

import pytest

from rlhf_jax.people import access, asking
from rlhf_jax.people.asking import Asked
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.labelling import person


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the store follow each other closely."""
    monkeypatch.setattr(asking, "POLL", 0.01)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """A store in which nothing is asked yet."""
    with Store(tmp_path / "people.db") as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
    return tmp_path / "people.db"


def groups(*, round: int = 1, overlap: int = 2) -> dict[str, list[Item]]:
    train = [Item(f"train {n}", ("a", "b"), round=round, models=("m", "m")) for n in range(4)]
    return {
        "train": train,
        "held_out": [Item(f"held out {n}", ("a", "b"), round=round, overlap=overlap) for n in (0, 1)],
    }


numbers = itertools.count()  # of submissions


def answer(store: Store, person: int, **given: object) -> bool:
    """Answer the person's next task, "a" being better; whether there was one."""
    task = store.task(person)
    if task is None:
        return False
    ranks = [task.responses.index(text) for text in ("a", "b")]
    given = given or {"ranks": [ranks.index(n) for n in range(2)]}
    store.submit(person, task.id, f"submission {next(numbers)}", given, 1.0)
    return True


def test_a_run_waits_until_enough_answers_are_in(db: Path, capsys: pytest.CaptureFixture):
    with Store(db) as store:
        asked = Asked(store, groups())
        assert "6 tasks added, 0 were there already" in capsys.readouterr().out
        assert asked.standing().people == 0 and asked.standing().hint().startswith("nobody labels yet: open the link")
        ann, bob = person(store, "ann"), person(store, "bob")
        store.set_aside(person(store, "eve"), "why not")
        while answer(store, ann):
            pass
        standing = asked.standing()
        assert (standing.done, standing.wanted) == ({"train": 4, "held_out": 2}, {"train": 4, "held_out": 4})
        assert (standing.people, standing.working, standing.stuck) == (2, 1, 0) and standing.hourly > 0
        assert not asked.ready(1.0) and not asked.ready(0.6) and asked.ready(0.5)
        assert answer(store, bob) and asked.ready(0.75) and not asked.ready(0.76)
        assert answer(store, bob) and asked.ready(1.0) and not answer(store, bob)
        rows = asked.rows()
    said = capsys.readouterr().out
    assert "people: train 4/4, held_out 2/4; 1 at work" in said and "to go" in said
    assert [row["prompt"] for row in rows["train"]] == [f"train {n}" for n in range(4)]
    assert [(row["prompt"], row["labeler"]) for row in rows["held_out"]] == [
        (f"held out {n}", person) for n in (0, 1) for person in ("ann", "bob")
    ]
    assert rows["train"][0] == {"prompt": "train 0", "responses": ["a", "b"], "ranks": [0, 1], "labeler": "ann"}


def test_an_administrator_who_has_labelled_is_one_to_ask(db: Path):
    with Store(db) as store:
        boss = person(store, "boss", "administrator")
        asked = Asked(store, groups(overlap=1))
        assert asked.standing().people == 0  # who only invites others
        while answer(store, boss):
            pass
        assert Asked(store, groups(round=2, overlap=1)).standing().people == 1


def test_what_does_not_count(db: Path):
    """Skipped and withdrawn answers, those of people who were set aside, and those to the items of others."""
    with Store(db) as store:
        store.add([Item("of another run", ("a", "b")), Item("train 0", ("a", "b"), round=7)])
        said: list[str] = []
        asked = Asked(store, groups(overlap=1), tell=said.append)
        assert said == [f"{db}: 6 tasks added, 0 were there already; 2 answers to other tasks are wanted there too"]
        ann, bob = person(store, "ann"), person(store, "bob")
        assert answer(store, ann) and answer(store, ann)  # those of others
        assert sum(asked.standing().done.values()) == 0
        assert answer(store, ann, skip="unclear")
        assert answer(store, ann)
        store.undo(ann)
        assert sum(asked.standing().done.values()) == 0
        while answer(store, ann):
            pass
        standing = asked.standing()
        assert (sum(standing.done.values()), standing.stuck) == (5, 0)  # bob can give the skipped one
        access.revoke(store, bob)
        standing = asked.standing()
        assert standing.stuck == 1 and "nobody is left to give 1 of the answers: invite more" in standing.hint()
        assert len([*asked.rows()["train"], *asked.rows()["held_out"]]) == 5
        store.set_aside(ann, "why not")
        assert sum(asked.standing().done.values()) == 0 and asked.rows() == {"train": [], "held_out": []}


def test_who_is_killed_asks_nothing_twice(db: Path):
    with Store(db) as store:
        Asked(store, groups())
        ann = person(store, "ann")
        assert answer(store, ann) and answer(store, ann)
    said: list[str] = []
    with Store(db) as store:
        asked = Asked(store, groups(), tell=said.append)
        assert "0 tasks added, 6 were there already" in said[0]
        assert sum(asked.standing().done.values()) == 2
        while answer(store, ann):
            pass
        bob = person(store, "bob")
        assert answer(store, bob) and answer(store, bob) and not answer(store, bob)
        assert [len(rows) for rows in asked.rows().values()] == [4, 4]


def test_the_same_is_asked_once(db: Path):
    items = groups()
    twice = {name: [*each, dataclasses.replace(each[0], overlap=9)] for name, each in items.items()}
    twice["held_out"].append(items["train"][1])
    said: list[str] = []
    with Store(db) as store:
        assert Asked(store, twice, tell=said.append).standing().wanted == {"train": 4, "held_out": 4}
    assert "6 tasks added" in said[0] and "3 that ask the same as another were left out" in said[0]


def test_what_is_not_waited_for_is_not_asked_any_more(db: Path):
    with Store(db) as store:
        asked = Asked(store, groups())
        ann, bob = person(store, "ann"), person(store, "bob")
        assert answer(store, ann) and store.task(bob)
        asked.retire()
        assert answer(store, bob) and not answer(store, bob) and not answer(store, ann)  # who has one may finish
        assert store.pace(ann).left == 0
        again = Asked(store, groups())  # with another share, say
        while answer(store, ann):
            pass
        while answer(store, bob):
            pass
        assert again.ready(1.0)


def test_more_people_may_be_asked(db: Path):
    with Store(db) as store:
        Asked(store, groups(overlap=1))
        ann, bob = person(store, "ann"), person(store, "bob")
        while answer(store, ann):
            pass
        assert not answer(store, bob)
        asked = Asked(store, groups(overlap=2))
        assert answer(store, bob) and answer(store, bob) and not answer(store, bob) and asked.ready(1.0)


def test_a_busy_store_is_waited_for(db: Path, monkeypatch: pytest.MonkeyPatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **options | {"timeout": 0.01}))
    said: list[str] = []
    with Store(db) as store:
        other = connect(db, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        threading.Timer(0.2, lambda: other.execute("ROLLBACK")).start()
        asked = Asked(store, groups(), tell=said.append)
        assert sum(asked.standing().wanted.values()) == 8
    other.close()
    assert said[0] == f"{db}: database is locked; it is tried again every 0 s"
    assert "6 tasks added" in said[1] and len(said) == 2


def test_the_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    line = asking._Line()
    for n in (0, 0, 1, 2):
        with line.told(f"line {n}", "a hint" if n == 1 else "", last=n == 2):
            pass
    assert capsys.readouterr().out == "line 0\na hint\nline 2\n"  # a minute has not passed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), line.told("x" * 1000, "h" * 200, last=False):
            raise KeyboardInterrupt
    first, second, third, last = capsys.readouterr().out.split("\n")
    assert first == "\r\x1b[K" + "h" * 200 and second == third and set(third) == set("\r\x1b[Kx") and not last
    assert len(second) < 200
