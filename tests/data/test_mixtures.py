"""Tests of rlhf_jax.data.mixtures: shares, order, what is printed, and specs that are wrong."""

import json
from collections import Counter

import numpy as np
import pytest

from rlhf_jax.data import mixtures, pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 30), ("b", 10), ("my,file", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{n}"}}\n' for n in range(count)))
    (tmp_path / "c.csv").write_text("text\nc0\n")


def load(spec, split="train", kind="text"):
    return sources.rows(spec, kind, data_dir="store", split=split)


def texts(*args):
    return [row["text"] for row in load(*args)]


def test_without_weights_all_rows_come_in_order(files):
    rows = load("b.jsonl[8:],c.csv,a.jsonl[:1]")
    assert [row["text"] for row in rows] == ["b8", "b9", "c0", "a0"]
    assert (len(rows), rows[1], rows[-1]) == (4, {"text": "b9"}, {"text": "a0"})
    assert [rows.where(n) for n in (0, 2)] == ["b.jsonl, line 9", "c.csv, line 2"]
    with pytest.raises(IndexError):
        rows[4]


def test_shares(files, capsys):
    rows = load("a.jsonl=3,b.jsonl=1e0")
    counts = Counter(row["text"] for row in rows)
    assert len(rows) == 40 and Counter(text[0] for text in counts.elements()) == {"a": 30, "b": 10}
    assert set(counts.values()) == {1}
    assert capsys.readouterr().out == (
        "a.jsonl: 30 rows of the mixture, 30 of its 30 rows\nb.jsonl: 10 rows of the mixture, 10 of its 10 rows\n"
    )
    counts = Counter(texts("a.jsonl=0.4,b.jsonl=0.6"))
    assert {text: n for text, n in counts.items() if text[0] == "a"} == dict.fromkeys(
        (text for text in counts if text[0] == "a"), 1
    )
    assert sorted(n for text, n in counts.items() if text[0] == "b") == [2] * 6 + [3] * 4
    assert "a.jsonl: 16 rows of the mixture, 16 of its 30 rows\nb.jsonl: 24 rows of the mixture, 10 of its 10" in (
        capsys.readouterr().out
    )
    for weights in ([1e308, 1e308], [1e-300, 3e-300], [1 / 3, 1 / 3], [1e-9, 1.0]):
        assert len(mixtures._drawn([7, 4], weights, 0)) == 11
    assert np.bincount(mixtures._drawn([1, 1, 98], [1.0] * 3, 0)[:, 0]).max() == 34


def test_order_is_a_function_of_the_seed(files):
    spec = "a.jsonl=0.5,b.jsonl=0.5"
    first, other = texts(spec), texts(f"{spec},seed=1")
    assert texts(spec) == first == texts(f"{spec},seed=0") and first != other
    assert sorted(text for text in first if text[0] == "b") == sorted(text for text in other if text[0] == "b")
    assert {text for text in first if text[0] == "a"} != {text for text in other if text[0] == "a"}
    assert first[:20] != sorted(first[:20])
    assert texts(spec, "train[25%:]") == first[10:] and texts(spec, "train[:1]+train[5:6]") == [first[0], first[5]]
    rows = load(spec)
    assert [rows[n]["text"] for n in range(len(rows))] == first


def test_batches_go_on_where_they_were_and_tokens_are_kept(files, tmp_path):
    tokenizer = tokenizer_lib.train(["a0 b0 c0"], 300, tmp_path / "tokenizer")
    make = lambda spec: pipeline.text(load(spec), tokenizer, length=16, batch=2, seed=3)
    stream = iter(make("a.jsonl=0.5,b.jsonl=0.5"))
    next(stream)
    state, expected = stream.get_state(), next(stream).tokens
    again = iter(make("a.jsonl=0.5,b.jsonl=0.5"))
    again.set_state(state)
    np.testing.assert_array_equal(next(again).tokens, expected)
    folders = {load(spec).folder for spec in ("a.jsonl=0.5,b.jsonl=0.5", "a.jsonl=1,b.jsonl=1", "a.jsonl,b.jsonl")}
    assert len(folders) == 2 and any(folder.is_dir() for folder in folders)


def test_what_has_commas_or_equality_signs_of_its_own(files):
    assert texts("my,file.jsonl[:1]") == ["my,file0"]
    assert not mixtures.is_several("hh:my,file.jsonl") and mixtures.is_several("hh:a.jsonl,hh:b.jsonl")
    members = {
        "world:seed=3,rows=9": ["world:seed=3,rows=9"],
        "world:seed=3,rows=9=0.5,a.jsonl=2": ["world:seed=3,rows=9=0.5", "a.jsonl=2"],
        "world=1,imdb_reviews=2": ["world=1", "imdb_reviews=2"],
        "hub:x/y?config=c&split=s=0.5,d/y=1/z.jsonl[:9%]=1": ["hub:x/y?config=c&split=s=0.5", "d/y=1/z.jsonl[:9%]=1"],
        "people:p.db?round=2,world": ["people:p.db?round=2", "world"],
    }
    for spec, expected in members.items():
        assert mixtures._members(spec) == expected
    weights = {
        "world:seed=3,rows=9": ("world:seed=3,rows=9", None),
        "world:rows=9[:5]=0.5": ("world:rows=9[:5]", "0.5"),
        "people:p.db?round=2": ("people:p.db?round=2", None),
        "people:p.db?round=2=2": ("people:p.db?round=2", "2"),
        "nectar:hub:x/y?split=3": ("nectar:hub:x/y?split=3", None),
        "a/y=1/z.jsonl": ("a/y=1/z.jsonl", None),
        "a/y=1/z.jsonl=-inf": ("a/y=1/z.jsonl", "-inf"),
        "hh:a.jsonl[:90%]=.25": ("hh:a.jsonl[:90%]", ".25"),
    }
    for member, expected in weights.items():
        assert mixtures._weighted(member) == expected
    rows = load("world:seed=1,rows=4=1,world:seed=2,rows=4=1", kind="prompts")
    assert len(rows) == 8


def test_held_out_rows_of_a_mixture(files):
    assert sources.held_out(None, "world:rows=4=1,a.jsonl=1", "text", data_dir="store") is None
    rows = sources.held_out("world:rows=4,a.jsonl[:2]", "a.jsonl", "text", data_dir="store")
    assert rows.where(0).startswith("data 'world:rows=4', row 0") and len(rows) == 6
    assert [*rows][:4] == [*load("world:rows=4", "held_out")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *(
            (f"a.jsonl={weight},b.jsonl=1", f"weight of a.jsonl: expected a finite number above 0, got {weight}")
            for weight in ("0", "-1", "0.0", "-0.5", "nan", "inf", "-inf", "1e999", "1.2.3")
        ),
        ("a.jsonl,b.jsonl=1", "expected a weight, as in a.jsonl=0.5, for each source or for none"),
        ("a.jsonl=much,b.jsonl=1", "expected a weight"),
        ("a.jsonl,b.jsonl,seed=1", "expected a weight|a seed needs weights"),
        ("a.jsonl=1,none.jsonl=1", "none.jsonl: no such file"),
        ("a.jsonl=1,", "expected a weight"),
        ("a.jsonl=1,c.csv=1,hub:=1", "expected hub:OWNER/NAME"),
        ("a.jsonl=0", "weight of a.jsonl"),
    ],
)
def test_specs_that_are_wrong(files, spec, message):
    with pytest.raises(InputError, match=message) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_a_bad_row_is_named_by_its_own_source(files, tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}) + "\n{}\n")
    with pytest.raises(InputError, match=r"^b\.jsonl, line 2, field text: missing"):
        load("a.jsonl=1,b.jsonl=1")
    with pytest.raises(InputError, match=r"no rows in \[50:\], of 30"):
        load("a.jsonl=1", "train[50:]")
