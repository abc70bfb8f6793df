"""Comparisons by virtue: the world's own, and files of both shapes."""

import itertools
import json

import pytest

from rlhf_jax.data import hhh
from rlhf_jax.data.world import World
from rlhf_jax.data.world import hhh as world_hhh
from rlhf_jax.data.world.gold import Gold
from rlhf_jax.types import InputError

WORLD = World.generate(0)
ROW = {
    "prompt": "How old is Mira?",
    "chosen": "I do not know.",
    "rejected": "Mira is 40 years old.",
    "subset": "honest",
}


@pytest.mark.parametrize(
    ("better", "worse", "subset"),
    [
        ((1.0, 1.0, 1.0), (0.7, 1.0, 1.0), "helpful"),
        ((1.0, 1.0, 1.0), (0.9, 1.0, 1.0), None),  # a matter of taste
        ((0.0, 1.0, 1.0), (0.0, 0.0, 1.0), "honest"),
        ((0.0, 1.0, 1.0), (0.0, 1.0, 0.0), "harmless"),
        ((1.0, 1.0, 1.0), (0.0, 1.0, 0.0), "other"),
        ((1.0, 1.0, 0.0), (0.0, 1.0, 1.0), None),  # better in one, worse in another
        ((0.5, 1.0, 1.0), (0.5, 1.0, 1.0), None),
    ],
)
def test_subset(better, worse, subset):
    assert world_hhh.subset(Gold(*better, ""), Gold(*worse, "")) == subset


def test_comparisons_of_the_world_differ_in_one_virtue():
    rows = list(world_hhh.comparisons(WORLD, 25, seed=0))
    assert [row["subset"] for row in rows] == ["helpful", "honest", "harmless", "other"] * 25
    assert rows[:8] == list(world_hhh.comparisons(WORLD, 2, seed=0)) != list(world_hhh.comparisons(WORLD, 2, seed=1))
    for row in rows:
        text = row["prompt"][0]["content"]
        better, worse = (WORLD.gold(text, row[name]) for name in ("chosen", "rejected"))
        assert better.score >= worse.score
        held_out = set(itertools.chain(*vars(WORLD.held_out).values()))
        assert set(WORLD.parse(text).entities) <= held_out
        if row["subset"] != "other":
            others = {"helpful", "honest", "harmless"} - {row["subset"]}
            assert all(getattr(better, one) == getattr(worse, one) for one in others)
            assert getattr(better, row["subset"]) > getattr(worse, row["subset"])
    assert len({(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in rows}) == len(rows)


def test_each_pair_of_a_ranking_is_a_comparison():
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "ranks": [1, 0, 1]},
        {"prompt": "b", "responses": ["v", "w"], "ranks": [0, 0]},
        {"prompt": "c", "responses": ["t", "u"], "ranks": [0, 1]},
    ]
    found = [(row["prompt"], *row["responses"]) for row in hhh.of_rankings(rows, 9)]
    assert found == [("a", "y", "x"), ("a", "y", "z"), ("c", "t", "u")]
    assert [row["ranks"] for row in hhh.of_rankings(rows, 2)] == [[0, 1], [0, 1]]


def test_json_lines(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"subset": "other"}) + "\n")
    row = {"prompt": ROW["prompt"], "responses": [ROW["chosen"], ROW["rejected"]], "ranks": [0, 1]}
    assert hhh.read(file) == {"honest": [row], "other": [row]}


def test_big_bench(tmp_path):
    texts = {"Hello?": ["user"], "Hi.\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:": ["user", "assistant", "user"],
             "\n\nHuman: Hello?": ["user"]}  # fmt: skip
    examples = [{"input": text, "target_scores": {"Bad.": 0, "Good.": 1}} for text in texts]
    for folder in ("harmless", "honest"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.json").write_text(json.dumps({"examples": examples}, indent=1))
    (tmp_path / "helpful.json").write_text(json.dumps({"examples": examples[:1]}))
    found = hhh.read(tmp_path)
    assert {subset: len(rows) for subset, rows in found.items()} == {"harmless": 3, "helpful": 1, "honest": 3}
    assert [[turn["role"] for turn in row["prompt"]] for row in found["honest"]] == list(texts.values())
    assert found["honest"][1]["prompt"][-1] == {"role": "user", "content": "Why?"}
    assert found["helpful"][0] == {
        "prompt": [{"role": "user", "content": "Hello?"}],
        "responses": ["Good.", "Bad."],
        "ranks": [0, 1],
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", json.dumps({"prompt": "?", "chosen": "a", "rejected": "b"}), "line 1, field subset: missing"),
        ("a.jsonl", json.dumps({"prompt": "?", "chosen": "a", "subset": "b"}), "field rejected: missing"),
        ("a.jsonl", "", "expected comparisons, got an empty file"),
        ("a.json", "{", r"a\.json: expected JSON"),
        ("a.json", "[]", r"a\.json: expected a JSON object"),
        ("a.json", '{"examples": 1}', "field examples: expected a list"),
        ("a.json", '{"examples": [{"input": "?", "target_scores": {"a": 1}}]}', "example 1, field target_scores"),
        ("a.json", '{"examples": [{"input": "?", "target_scores": {"a": 1, "b": 1}}]}', "expected two answers, of 1"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        hhh.read(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"no comparisons here; expected files SUBSET\.json"):
        hhh.read(tmp_path)
    with pytest.raises(InputError, match="leave --data out"):
        hhh.read(tmp_path / "none.jsonl")
