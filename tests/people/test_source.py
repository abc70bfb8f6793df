"""Labels of people as a data set: `--data people:PATH`, in every experiment, and what a resume makes of new ones."""

import json
from pathlib import Path

import pytest

from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.errors import InputError
from rlhf_jax.people import exchange
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from rlhf_jax.runs import contents, directory
from tests.people.labelling import person

RULES = Rules(ratings="none", gold_share=0.0, repeat_share=0.0)


def submit(store: Store, person: int, **answer: object) -> None:
    task = store.task(person)
    assert task
    if "ranks" in answer:
        ranks = dict(zip(("a", "b"), answer["ranks"], strict=True))  # type: ignore[call-overload]
        answer = {"ranks": [ranks[response] for response in task.responses]}
    store.submit(person, task.id, f"submission-{task.id}", answer, 1.0)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """A store with a ranking of ann's and one of bob's, a comparison and an edited demonstration."""
    path = tmp_path / "people.db"
    with Store(path) as store:
        store.set_rules(RULES)
        ann, bob = person(store, "ann"), person(store, "bob")
        store.add([Item([{"role": "user", "content": "one"}], ("a", "b"), ended=(True, False))])
        submit(store, ann, ranks=[1, 0])
        store.add([Item("two", ("a", "b"), round=1)])
        submit(store, bob, ranks=[0, 0])
        store.add([Item("three", ("c", "d"), "compare")])
        submit(store, ann, strength=3)
        store.add([Item("four", ("e",), "demonstrate"), Item("five", (), "demonstrate")])
        submit(store, bob, text="better", edited=0)
        submit(store, bob, skip="unclear")
    return path


def read(spec: str, kind: str, tmp_path: Path) -> list[dict]:
    return list(sources.rows(spec, kind, data_dir=tmp_path / "data"))  # type: ignore[arg-type]


def test_labels_are_rows_like_those_of_their_export(db: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rankings = read(f"people:{db}", "rankings", tmp_path)
    assert rankings[:2] == [
        {
            "prompt": [{"role": "user", "content": "one"}],
            "responses": ["a", "b"],
            "ranks": [1, 0],
            "ended": [True, False],
        },
        {"prompt": "two", "responses": ["a", "b"], "ranks": [0, 0]},
    ]
    assert rankings[2]["prompt"] == "three" and sorted(rankings[2]["responses"]) == ["c", "d"]
    assert rankings[3] == {"prompt": "four", "responses": ["better", "e"], "ranks": [0, 1]}
    assert "1 rows left out, which are no rankings" in capsys.readouterr().out
    assert read(f"people:{db}", "demonstrations", tmp_path) == [{"prompt": "four", "completion": "better"}]
    assert len(read(f"people:{db}", "prompts", tmp_path)) == 5
    out = tmp_path / "labels.jsonl"
    exchange.export(db, out)
    lines = [line for line in out.read_text().splitlines() if "completion" not in json.loads(line)]
    out.write_text("\n".join(lines))
    assert read(str(out), "rankings", tmp_path) == rankings


def test_filters_are_in_the_name(db: Path, tmp_path: Path):
    assert [row["prompt"] for row in read(f"people:{db}?round=1", "rankings", tmp_path)] == ["two"]
    assert len(read(f"people:{db}?person=ann", "rankings", tmp_path)) == 2
    assert len(read(f"people:{db}?person=ann[:1]", "rankings", tmp_path)) == 1
    for spec, kind, message in (
        (f"people:{db}?person=ann", "demonstrations", "got 2 labels of other kinds"),
        (f"people:{db}?colour=red", "rankings", "filter 'colour=red'"),
        (f"people:{db}?person=eve", "rankings", "nobody of that name"),
        (f"people:{db}", "text", "people give rankings, demonstrations, prompts, thumbs, no text"),
        ("people:none.db", "rankings", "no such store"),
    ):
        with pytest.raises(InputError, match=message):
            read(spec, kind, tmp_path)


def test_new_labels_are_read_and_a_resume_tells(db: Path, tmp_path: Path):
    of_ann = f"people:{db}?person=ann"
    before = [directory._files_in(spec, None) for spec in (f"people:{db}", of_ann, f"{of_ann}[:1]")]
    assert all(list(found) == [str(db)] for found in before) and before[1] == before[2] != before[0]
    assert len(read(f"people:{db}", "rankings", tmp_path)) == 4
    with Store(db) as store:
        store.add([Item("six", ("a", "b"))])
        submit(store, 2, ranks=[0, 1])
    assert len(read(f"people:{db}", "rankings", tmp_path)) == 5
    after = [directory._files_in(spec, None) for spec in (f"people:{db}", of_ann)]
    assert after[0] != before[0] and after[1] == before[1]
    assert contents.paths(of_ann) == [str(db)]
    assert directory._files_in("people:none.db", None) == {}


def test_verdicts_of_an_arena_are_comparisons(tmp_path: Path):
    """A tie and both bad are equal ranks, which the loss of a reward model leaves out."""
    db, verdicts = tmp_path / "people.db", ("first", "second", "tie", "bad")
    with Store(db) as store:
        store.set_rules(RULES)
        ann = person(store, "ann")
        store.add(Item(wanted, ("a", "b"), "arena", ("x", "y"), ended=(True, False)) for wanted in verdicts)
        for wanted in verdicts:
            held = store.task(ann)
            assert held
            swapped = {"first": "second", "second": "first"} if held.responses == ["b", "a"] else {}
            store.submit(ann, held.id, f"submission-{wanted}", {"verdict": swapped.get(wanted, wanted)}, 1.0)
    rows = read(f"people:{db}", "rankings", tmp_path)
    assert [(row["prompt"], row["ranks"]) for row in rows] == [
        ("first", [0, 1]),
        ("second", [1, 0]),
        ("tie", [0, 0]),
        ("bad", [0, 0]),
    ]
    assert all(row["responses"] == ["a", "b"] and row["ended"] == [True, False] for row in rows)
    out = tmp_path / "labels.jsonl"
    exchange.export(db, out)
    exported = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verdict"] for row in exported] == [*verdicts] and exported[0]["models"] == ["x", "y"]
    assert {"person", "started", "submitted", "seconds", "shown"} <= exported[0].keys()
    assert read(str(out), "rankings", tmp_path) == rows


def test_the_first_row_that_is_too_long_is_named(db: Path, tmp_path: Path):
    rows = sources.rows(f"people:{db}", "rankings", data_dir=tmp_path / "data")
    tokenizer = tokenizer_lib.train(["one two three four"], 300, tmp_path / "tokenizer")
    with pytest.raises(InputError) as raised:
        pipeline.rankings(rows, tokenizer, length=1, batch=1, seed=0)
    assert f"4 too long for --length 1 (first: people:{db}, label 1)" in str(raised.value)
