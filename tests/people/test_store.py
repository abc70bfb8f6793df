"""The store: leases, slots, replays, undo, gold and repeated items, and thresholds."""

import dataclasses
import json
import sqlite3
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.people import exchange, progress
from rlhf_jax.people.exchange import Filter
from rlhf_jax.people.forms import Contradiction
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Assignment, Store
from tests.people.labelling import Clock, person

PLAIN = Rules(ratings="none", gold_share=0.0, repeat_share=0.0, lease=60.0)


@pytest.fixture
def store(store: Store) -> Store:
    store.set_rules(PLAIN)
    return store


def task(store: Store, person: int) -> Assignment:
    found = store.task(person)
    assert found
    return found


def items(n: int, **fields: Any) -> list[Item]:
    return [Item(f"prompt {k}", ("one", "two", "three"), **fields) for k in range(n)]


def answer(store: Store, person: int, ranks: tuple[int, ...] = (0, 1, 2), name: str = "") -> int:
    """Ranks in the order of the item, whatever the order shown."""
    found = task(store, person)
    shown = [("one", "two", "three").index(response) for response in found.responses]
    return store.submit(person, found.id, name or f"submission-{found.id}", {"ranks": [ranks[k] for k in shown]}, 5.0)


def rows(store: Store, **fields: Any) -> list[dict]:
    return [row for _, row in exchange.read(store.path, Filter(**fields))]


def test_nothing_here_imports_jax():
    code = (
        "import sys; import rlhf_jax.people.server, rlhf_jax.people.exchange, rlhf_jax.people.__main__;"
        "assert not {'jax', 'flax', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_label_is_stored_in_the_order_of_the_item(store: Store):
    ann = person(store, "ann")
    store.add(items(8))
    orders = set()
    for _ in range(8):
        orders.add(tuple(task(store, ann).responses))
        answer(store, ann, (2, 0, 1))
    assert len(orders) > 1
    assert store.task(ann) is None
    assert [(row["responses"], row["ranks"]) for row in rows(store)] == [(["one", "two", "three"], [2, 0, 1])] * 8
    assert {tuple(row["shown"]) for row in rows(store)} == {
        tuple(("one", "two", "three").index(response) for response in order) for order in orders
    }


def test_a_slot_has_one_person_and_a_person_one_slot(store: Store):
    ann, bob, eve = (person(store, name) for name in ("ann", "bob", "eve"))
    store.add(items(2, overlap=2))
    assert task(store, ann).item == task(store, bob).item == 1
    assert task(store, ann).id == task(store, ann).id  # asked again, the same task
    assert task(store, eve).item == 2
    answer(store, ann)
    assert task(store, ann).item == 2
    answer(store, bob)
    assert store.task(bob) is None  # ann and eve hold both slots of the second
    answer(store, eve)
    assert store.task(eve) is None


def test_no_lease_is_given_twice_to_many_at_once(store: Store):
    store.add(items(40))
    people = [person(store, f"p{k}") for k in range(8)]
    got: list[int] = []

    def work(who: int) -> None:
        while (found := store.task(who)) is not None:
            got.append(found.item)
            store.submit(who, found.id, f"submission-{found.id}", {"ranks": [0, 1, 2]}, 1.0)

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, 41))
    assert len(rows(store)) == 40


def test_an_expired_lease_goes_to_somebody_else(store: Store, clock: Clock):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(1))
    old = task(store, ann)
    assert store.task(bob) is None
    clock.now += 61
    new = task(store, bob)
    assert new.item == old.item
    with pytest.raises(Refused, match="ran out") as caught:
        store.submit(ann, old.id, "submission", {"ranks": [0, 1, 2]}, 1.0)
    assert caught.value.code == "expired"
    assert answer(store, bob)


def test_an_expired_lease_that_nobody_took_still_counts(store: Store, clock: Clock):
    ann, bob, eve = (person(store, name) for name in ("ann", "bob", "eve"))
    store.add(items(2))
    task(store, ann), task(store, bob)
    late = task(store, bob)
    clock.now += 61
    assert task(store, eve).item == 1  # both slots came back, and eve takes the first
    assert store.submit(bob, late.id, "submission", {"ranks": [0, 1, 2]}, 1.0)
    assert store.task(bob) is None and [row["item"] for row in rows(store)] == [2]


def test_a_draft_renews_the_lease_and_comes_back_in_the_same_order(store: Store, clock: Clock):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(1))
    first = task(store, ann)
    for _ in range(3):
        clock.now += 50
        store.save_draft(ann, first.id, {"ranks": [0, None, 1]})
        assert store.task(bob) is None
    clock.now += 61
    store.add(items(2)[1:])
    store.task(bob)  # the lease of ann ran out
    clock.now += 61
    again = task(store, ann)
    assert again.item == first.item and again.responses == first.responses and again.draft == {"ranks": [0, None, 1]}


def test_a_replay_is_answered_as_before_and_stored_once(store: Store):
    ann = person(store, "ann")
    store.add(items(2))
    first = task(store, ann)
    label = store.submit(ann, first.id, "submission-1", {"ranks": [0, 1, 2]}, 1.0)
    assert store.submit(ann, first.id, "submission-1", {"ranks": [2, 1, 0]}, 1.0) == label
    with pytest.raises(Refused, match="another tab") as caught:
        store.submit(ann, first.id, "submission-2", {"ranks": [2, 1, 0]}, 1.0)
    assert caught.value.code == "answered"
    with pytest.raises(Refused, match="another task"):
        store.submit(ann, task(store, ann).id, "submission-1", {"ranks": [0, 1, 2]}, 1.0)
    assert len(rows(store)) == 1


def test_a_foreign_task_is_refused(store: Store):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(1))
    with pytest.raises(Refused) as caught:
        store.submit(bob, task(store, ann).id, "submission", {"ranks": [0, 1, 2]}, 1.0)
    assert caught.value.code == "foreign"


def test_a_wrong_answer_changes_nothing(store: Store):
    ann = person(store, "ann")
    store.add(items(1))
    first = task(store, ann)
    with pytest.raises(InputError, match="ranks"):
        store.submit(ann, first.id, "submission", {"ranks": [0, 1]}, 1.0)
    assert task(store, ann).id == first.id and not rows(store)


def test_undo_withdraws_and_opens_again(store: Store):
    ann = person(store, "ann")
    store.add(items(3))
    answer(store, ann, (2, 0, 1))
    shown = [("one", "two", "three").index(x) for x in rows(store)[0]["responses"]]
    assert shown == [0, 1, 2]
    task(store, ann)
    store.undo(ann)
    assert not rows(store)
    again = task(store, ann)
    wanted = {"one": 2, "two": 0, "three": 1}
    assert again.item == 1 and again.draft["ranks"] == [wanted[response] for response in again.responses]
    answer(store, ann, (0, 1, 2), name="submission-again")
    assert [row["ranks"] for row in rows(store)] == [[0, 1, 2]]
    with store.reader() as db:
        assert db.execute("SELECT COUNT(*) FROM labels").fetchone()[0] == 2
    assert task(store, ann).item == 2
    store.undo(ann)
    with pytest.raises(Refused, match="nothing to undo"):
        store.undo(ann)


def test_labels_are_append_only(store: Store):
    ann = person(store, "ann")
    store.add(items(1))
    answer(store, ann)
    store.undo(ann)
    for statement in ("UPDATE labels SET answer = '{}'", "DELETE FROM labels", "DELETE FROM withdrawals"):
        with store.writer() as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)


def test_a_skipped_task_goes_to_others_and_not_back(store: Store):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(1))
    store.submit(ann, task(store, ann).id, "submission", {"skip": "unclear"}, 1.0)
    assert store.task(ann) is None and not rows(store)
    store.undo(ann)
    store.submit(ann, task(store, ann).id, "submission-2", {"skip": "upsetting"}, 1.0)
    assert task(store, bob).item == 1
    with pytest.raises(Refused):
        store.undo(ann)  # bob has it
    answer(store, bob)
    assert len(rows(store)) == 1


def test_gold_and_repeats_are_mixed_in_and_counted_apart(store: Store):
    store.set_rules(Rules(ratings="none", gold_share=0.3, repeat_share=0.3))
    ann = person(store, "ann")
    store.add(items(30))
    store.add([Item(f"gold {k}", ("one", "two", "three"), gold=(0, 1, 2)) for k in range(30)])
    for n in range(60):
        answer(store, ann, (0, 1, 2) if n % 3 else (0, 0, 1), name=f"submission-{n}")
    gold, repeated = rows(store, kind="gold"), rows(store, kind="repeat")
    assert len(gold) > 5 and len(repeated) > 5 and len(gold) + len(repeated) + len(rows(store)) == 60
    assert all(row["prompt"].startswith("gold") for row in gold)
    assert len({row["item"] for row in repeated}) == len(repeated)
    with store.reader() as db:
        for label in db.execute("SELECT * FROM labels WHERE kind = 'gold'"):
            ranks = json.loads(label["answer"])["ranks"]
            assert (label["agreed"], label["pairs"]) == ((3, 3) if ranks == [0, 1, 2] else (2.5, 3))
        assert db.execute("SELECT MIN(agreed), MAX(agreed), MIN(pairs) FROM labels WHERE kind = 'repeat'").fetchone()[
            :
        ] == (2.5, 3, 3)


def test_below_the_threshold_a_person_is_set_aside(store: Store):
    store.set_rules(Rules(ratings="none", gold_share=0.5, repeat_share=0.0, gold_least=0.7, gold_count=3))
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add([*items(20), *(Item(f"gold {k}", ("one", "two", "three"), gold=(0, 1, 2)) for k in range(9))])
    while store.task(ann):
        answer(store, ann, (2, 1, 0))
    done = len(rows(store, aside=True))
    assert 0 < done < 20 and not rows(store)
    while store.task(bob):
        answer(store, bob)
    assert len(rows(store)) == 20  # what was set aside is asked again
    assert len(rows(store, gold=0.7, aside=True)) == 20
    store.restore(ann)
    assert len(rows(store)) == 20 + done and len(rows(store, gold=0.7)) == 20


def test_who_is_restored_is_judged_anew(store: Store):
    rules = Rules(ratings="none", gold_share=0.99, repeat_share=0.0, gold_least=0.7, gold_count=3)
    store.set_rules(rules)
    ann, eve = person(store, "ann"), person(store, "eve", "administrator")
    store.add([*items(9), *(Item(f"gold {k}", ("one", "two", "three"), gold=(0, 1, 2)) for k in range(30))])
    while store.task(ann):
        answer(store, ann, (2, 1, 0))
    wrong = store.one("SELECT COUNT(*) FROM labels WHERE kind = 'gold'")[0]
    assert wrong == 3
    before = len(rows(store, aside=True, kind="gold"))
    assert {(row["set_aside"], row["set_aside_by"]) for row in rows(store, aside=True, kind="gold")} == {
        ("gold 0.00 < 0.70", None)  # by a rule
    }
    store.restore(ann, eve)
    for _ in range(4):
        answer(store, ann)
    answer(store, ann, (2, 1, 0))
    assert store.task(ann)  # one of five, since then
    assert [row.get("restored_by") for row in rows(store, kind="gold")] == ["eve"] * before + [None] * 5
    while store.task(ann):
        answer(store, ann, (2, 1, 0))
    assert store.one("SELECT why FROM people WHERE id = ?", ann)[0].startswith("gold 0.")
    with store.writer() as db, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        db.execute("DELETE FROM acts")


def test_a_contradiction_is_asked_once_a_task(store: Store):
    ann = person(store, "ann")
    store.set_rules(Rules(ratings="overall", gold_share=0.0, repeat_share=0.0))
    store.add(items(1))
    number = task(store, ann).id
    said = {"ranks": [0, 1, 1], "ratings": [{"overall": 1}, {"overall": 7}, {"overall": 1}]}
    for _ in range(2):  # sent again under the same name, since the question may not have arrived
        with pytest.raises(Contradiction):
            store.submit(ann, number, "submission-1", said, 5.0)
    changed = said | {"ratings": [{"overall": 1}, {"overall": 7}, {"overall": 2}]}
    store.submit(ann, number, "submission-2", changed, 5.0)
    (row,) = rows(store)
    assert sorted(rating["overall"] for rating in row["ratings"]) == [1, 2, 7]
    assert json.loads(store.one("SELECT answer FROM labels")[0])["confirmed"]


def test_the_counts_are_those_of_the_labels(store: Store, clock: Clock):
    """After answers, skips, undone ones, people set aside and restored, and other overlaps."""
    store.set_rules(Rules(ratings="none", gold_share=0.2, repeat_share=0.2))
    people = [person(store, name) for name in ("ann", "bob")]
    store.add([*items(12, overlap=2), *(Item(f"gold {k}", ("one", "two", "three"), gold=(0, 1, 2)) for k in range(6))])
    for n in range(30):
        who = people[n % 2]
        if n == 15:
            store.set_aside(people[0], "why")
        if n == 20:
            store.restore(people[0])
            store.set_overlap({1: 1, 12: 3})
        if held := store.task(who):
            said = {"skip": "other"} if n % 7 == 3 else {"ranks": [0, n % 3, 1]}
            store.submit(who, held.id, f"submission-{n}", said, n / 2)
        if n % 5 == 4 and n != 19:
            store.undo(who)
    sums = "SUM(answer LIKE '{\"skip\"%'), SUM(fast), SUM(seconds), TOTAL(agreed), COALESCE(SUM(pairs), 0)"
    with store.reader() as db:
        counted = db.execute(f"SELECT person, kind, COUNT(*), {sums} FROM counting GROUP BY person, kind").fetchall()
        assert sorted(map(tuple, counted)) == sorted(
            tuple(row) for row in db.execute("SELECT * FROM tallies WHERE labels > 0")
        )
        assert len(counted) > 3
        query = "SELECT SUM(overlap > 0), SUM(overlap), SUM(taken), SUM(MAX(0, overlap - taken)) FROM items"
        wanted = db.execute(f"{query} WHERE gold IS NULL").fetchone()
        assert tuple(db.execute("SELECT items, slots, taken, wanted FROM totals").fetchone()) == tuple(wanted)
        done = db.execute("SELECT COUNT(*) FROM assignments WHERE kind = 'slot' AND state = 'done'").fetchone()[0]
        assert progress.overview(db, clock.now).done == done


def test_conversations_wait_for_a_model(store: Store):
    ann = person(store, "ann")
    store.add([Item("about birds", task="chat"), *items(2)])
    assert task(store, ann).task == "chat"
    for _ in range(2):  # what is held goes back
        held = store.task(ann, talks=False)
        assert held and held.task == "rank"
        store.submit(ann, held.id, f"submission-{held.id}", {"skip": "other"}, 1.0)
    assert store.task(ann, talks=False) is None
    assert (store.pace(ann, talks=False).left, store.pace(ann).left) == (2, 3)
    assert task(store, ann).task == "chat"


def test_who_is_set_aside_does_not_take_a_task_back(store: Store):
    store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(1))
    held = store.task(ann)
    assert held
    store.set_aside(ann, "why")
    for late in (
        lambda: store.save_draft(ann, held.id, {}),
        lambda: store.submit(ann, held.id, "submission-late", {"ranks": [0, 1, 2]}, 1.0),
    ):
        with pytest.raises(Refused, match="no more tasks"):
            late()
    assert store.task(bob)


def test_too_fast_is_noted(store: Store, clock: Clock):
    ann = person(store, "ann")
    store.add([Item("word " * 300, ("one", "two", "three")) for _ in range(1)])
    first = task(store, ann)
    clock.now += 100
    store.submit(ann, first.id, "submission", {"ranks": [0, 1, 2]}, 5.0)
    assert rows(store)[0]["too_fast"] and rows(store)[0]["seconds"] == 5
    store.add(items(3))
    answered = task(store, ann)
    store.submit(ann, answered.id, "submission-2", {"ranks": [0, 1, 2]}, 0.0)  # no time at all
    assert rows(store)[1]["too_fast"]
    store.set_rules(dataclasses.replace(PLAIN, reading=0.0))
    store.submit(ann, task(store, ann).id, "submission-3", {"ranks": [0, 1, 2]}, 0.0)
    assert not rows(store)[2]["too_fast"]


def test_filters(store: Store):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add(items(2, overlap=2))
    store.add(items(2, overlap=2, round=1))
    for who in (ann, bob):
        while store.task(who):
            answer(store, who)
    assert len(rows(store)) == 8
    assert {row["person"] for row in rows(store, person="ann")} == {"ann"}
    assert [row["round"] for row in rows(store, person="ann", round=1)] == [1, 1]
    assert rows(store, task="best") == []
    assert Filter.parse("person=ann&round=2&aside=1") == Filter(person="ann", round=2, aside=True)
    for wrong in ("person", "round=x", "who=ann", "kind=odd", "gold=2", "round=1&round=2"):
        with pytest.raises(InputError):
            Filter.parse(wrong)
    with pytest.raises(InputError, match="nobody"):
        rows(store, person="carl")
    for name in ("Ann & Bob", "a=b?c#d", "100 %", "安"):
        assert Filter.parse(f"person={urllib.parse.quote(name)}&round=1") == Filter(person=name, round=1)
    assert Filter.parse("person=Ann Lee") == Filter(person="Ann Lee")


def test_items_are_read_once_and_bad_rows_are_named(store: Store, tmp_path: Path):
    path = tmp_path / "items.jsonl"
    row = {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["a", "b"], "models": ["x", "y"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "Write"}) + "\n")
    assert store.add(exchange.read_items(path)) == (2, 0)
    assert store.add(exchange.read_items(path)) == (0, 2)
    assert [item.task for item in exchange.read_items(path)] == ["rank", "demonstrate"]
    for wrong, message in (
        ("{", "line 1: expected a JSON object"),
        ('{"responses": ["a", "b"]}', "line 1, field prompt"),
        ('{"prompt": "p", "responses": ["a", 3]}', r"line 1, field responses\[1\]"),
        ('{"prompt": "p", "responses": ["a", "\\ud800"]}', "surrogate"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}', "field prompt: expected rows with a prompt to ask"),
        ('{"prompt": "p", "responses": ["a", "b"], "task": "sing"}', "field task"),
        ("", "empty file"),
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match=message):
            store.add(exchange.read_items(path))
    path.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "p", "responses": ["a"]}))
    with pytest.raises(InputError, match="line 2, task rank: expected 2 to 26 responses"):
        store.add(exchange.read_items(path))
    battle = {"prompt": "p", "responses": ["a", "b"], "task": "arena"}
    for wrong in ({}, {"models": ["x", "x"]}, {"models": ["x"]}, {"responses": ["a", "b", "c"], "models": list("xyz")}):
        path.write_text(json.dumps(battle | wrong))
        with pytest.raises(InputError, match=r"line 1, (task arena|models): expected"):
            store.add(exchange.read_items(path))
    with store.reader() as db:
        assert db.execute("SELECT COUNT(*) FROM items").fetchone()[0] == 2


def test_a_share_of_items_overlaps(tmp_path: Path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "responses": ["a", "b"]}) + "\n" for n in range(400)))
    counts = [item.overlap for item in exchange.read_items(path, overlap=exchange.Overlap(3, 0.25))]
    assert set(counts) == {1, 3} and 60 < counts.count(3) < 140


def test_an_export_is_whole_or_not_there(store: Store, tmp_path: Path):
    ann = person(store, "ann")
    store.add(items(1))
    answer(store, ann, (1, 0, 1))
    assert exchange.export(store.path, tmp_path / "out.jsonl") == {"rankings": 1, "demonstrations": 0}
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["ranks"] == [1, 0, 1] and row["person"] == "ann" and row["prompt"] == "prompt 0"
    with pytest.raises(InputError, match="cannot be written"):
        exchange.export(store.path, tmp_path / "missing" / "out.jsonl")


def test_battles_of_other_models_with_the_same_answers_are_others(store: Store):
    pairs = (("x", "y"), ("x", "z"), ("y", "z"))
    battles = [Item("p", ("same", "other"), "arena", models) for models in pairs]
    assert store.add(battles) == (3, 0) and store.add(battles) == (0, 3)


def test_a_verdict_is_undone_and_exported_in_the_order_of_the_item(store: Store):
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add([Item(f"prompt {k}", ("good", "worse"), "arena", ("x", "y"), overlap=2) for k in range(8)])
    for who, verdicts in ((ann, ["good"] * 7 + ["bad"]), (bob, ["worse"] * 6 + ["tie", "bad"])):
        for n, verdict in enumerate(verdicts):
            held = task(store, who)
            said = ("first", "second")[held.responses.index(verdict)] if verdict in held.responses else verdict
            store.submit(who, held.id, f"submission-{n}", {"verdict": said}, 1.0)
    store.undo(bob)
    again = task(store, bob)
    assert again.draft == {"verdict": "bad"} and again.prompt == "prompt 7"
    store.undo(bob)
    assert task(store, bob).draft == {"verdict": "tie"}
    rows = [row for _, row in exchange.read(store.path, Filter(task="arena"))]
    assert [row["verdict"] for row in rows] == ["first"] * 7 + ["bad"] + ["second"] * 6
    assert {str(row["shown"]) for row in rows} == {"[0, 1]", "[1, 0]"}
    assert (rows[0]["responses"], rows[0]["models"], rows[0]["ranks"]) == (["good", "worse"], ["x", "y"], [0, 1])
    assert rows[7]["ranks"] == [0, 0] and rows[8]["ranks"] == [1, 0]
