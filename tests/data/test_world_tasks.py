"""The tasks of the world: true answers and derivations, entities that stay apart, templates in plain words."""

import collections
import itertools
import re

import pytest

from rlhf_jax.data import sources
from rlhf_jax.data.rows import check
from rlhf_jax.data.tasks import in_words, with_reasoning
from rlhf_jax.data.tasks.world import TASKS, tasks
from rlhf_jax.data.world import World
from rlhf_jax.data.world import tasks as world_tasks
from rlhf_jax.types import InputError

WORLD = World.generate(0)
BY_NAME = {task.name: task for task in TASKS}
# Words that the world's corpus never has: a model meets them first in these tasks.
NEW_WORDS = {
    "yes", "true", "same", "both", "Both", "One", "one", "more", "than", "older", "after", "without", "up", "these",
    "or", "if", "then", "an", "be", "Now", "Read", "says", "alike", "bad", "harm", "something", "person", "thing",
    "birth", "crowd", "founder", "landmark", "product", "built", "OPTIONS",
}  # fmt: skip


@pytest.fixture(scope="module")
def examples():
    """Rows of every task, by name and whether they are held out."""
    return {
        (name, held_out): list(world_tasks.rows(WORLD, name, 100, held_out))
        for name in world_tasks.MAKERS
        for held_out in (False, True)
    }


def named(text):
    return set(re.findall(r"\w+", text))


def test_eight_clusters_and_more_of_several_tasks():
    clusters = collections.Counter(task.cluster for task in TASKS)
    assert len(clusters) == 13 and min(clusters.values()) >= 2 and len(BY_NAME) == len(TASKS) == 28
    assert set(BY_NAME) == set(world_tasks.MAKERS)


@pytest.mark.slow
def test_rows_are_well_formed_and_each_question_comes_once(examples):
    for (name, held_out), rows in examples.items():
        assert len(rows) >= (12 if held_out else 36), (name, held_out)
        assert len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            assert check("examples", row, name)["answers"] == [row["answer"]]
            assert row["rationale"].endswith(".")
        if rows[0]["options"]:  # no answer, nor place of it, is much more common than the others
            places = collections.Counter(row["options"].index(row["answer"]) for row in rows)
            assert max(places.values()) < (0.7 if held_out else 0.65) * len(rows), (name, places)


def test_rows_are_reproducible(examples):
    assert list(world_tasks.rows(WORLD, "gift", 7)) == examples["gift", False][:7]
    assert list(world_tasks.rows(World.generate(1), "gift", 7)) != examples["gift", False][:7]
    assert len(list(world_tasks.rows(WORLD, "minus", 10**6, held_out=True))) == 5 * 4  # pairs, and phrasings


def test_held_out_rows_ask_about_nothing_that_training_rows_ask_about(examples):
    pools = {side: set(WORLD.train.words + WORLD.train.people + WORLD.train.strangers + WORLD.train.places)
             if side == "train" else
             set(WORLD.held_out.words + WORLD.held_out.people + WORLD.held_out.strangers + WORLD.held_out.places)
             for side in ("train", "held_out")}  # fmt: skip
    for (name, held_out), rows in examples.items():
        others = pools["train" if held_out else "held_out"]
        for row in rows:
            asked = " ".join((row["question"], *row["fields"].values()))
            assert not named(asked) & others, (name, asked)
            if not held_out and name.startswith("town-"):
                assert not named(row["rationale"]) & others
    for name in ("plus", "minus", "gets"):
        pairs = [
            {
                " and ".join(sorted((row["fields"]["a"], row["fields"]["b"]), key=int))
                for row in examples[name, held_out]
            }
            for held_out in (False, True)
        ]
        assert pairs[0] <= set(WORLD.train.pairs) and pairs[1] <= set(WORLD.held_out.pairs)


def test_answers_are_right(examples):
    """Answers by other means than those that made them."""
    for (name, _), rows in examples.items():
        for row in rows:
            fields, answer, why = row["fields"], row["answer"], row["rationale"]
            words = fields.get("words", "").split()
            match name:
                case "job" | "pet" | "product":
                    assert answer == WORLD.facts[fields["subject"]][name] and answer in why
                case "town-product" | "town-river":
                    home = WORLD.facts[fields["subject"]]["home"]
                    assert answer == WORLD.facts[home][name.removeprefix("town-")] and home in why
                case "plus" | "minus" | "gets":
                    a, b = int(fields["a"]), int(fields["b"])
                    assert int(answer) == (a - b if name == "minus" else a + b)
                    assert re.findall(r"\d+", why)[-1] == answer
                case "more" | "older":
                    told = {who: int(n) for who, n in re.findall(r"(\w+) (?:has|is) (\d+)", fields["story"])}
                    assert answer == max(told, key=told.get) and set(row["options"]) == set(told)
                case "order":
                    older = re.findall(r"(\w+) is older than (\w+)", fields["premise"])
                    older += [(a, d) for (a, b), (c, d) in itertools.permutations(older, 2) if b == c]
                    who, friend = re.findall(r"(\w+) is older than (\w+)", fields["hypothesis"])[0]
                    verdict = "yes" if (who, friend) in older else "no" if (friend, who) in older else "I do not know"
                    assert answer == verdict
                case "true-sum":
                    a, sign, b, c = re.findall(r"\d+|plus|minus", fields["claim"])
                    value = int(a) + int(b) if sign == "plus" else int(a) - int(b)
                    assert answer == ("yes" if value == int(c) else "no")
                case "gift":
                    assert (
                        f"{answer} gave" in why
                        if row["question"].split(". ")[-1].startswith("Who gave")
                        else (f"gave {answer} " in why)
                    )
                    assert why in fields["story"]
                case "found":
                    assert f" found a {answer} " in why and why in fields["story"]
                case "how-many":
                    assert int(answer) == len(words)
                case "times":
                    assert int(answer) == words.count(fields["word"])
                case "after":
                    assert words[words.index(fields["word"]) + 1] == answer
                case "in-list":
                    assert answer == ("yes" if fields["word"] in words else "no")
                case "reverse":
                    assert answer.split() == words[::-1]
                case "without":
                    assert answer.split() == [word for word in words if word != fields["word"]]
                case "harmful":
                    assert answer == ("yes" if WORLD.parse(fields["wish"]).category == "harm" else "no")
                case "known":
                    assert answer == ("yes" if WORLD.parse(fields["wish"]).answer else "no")


def test_sentences_are_true_of_this_world(examples):
    claims = {
        claim.format(x=x, answer=facts[kind.name]): (x, kind.name)
        for kind in world_tasks.KINDS
        for claim in kind.claims
        for x, facts in WORLD.facts.items()
        if kind.name in facts
    }
    for held_out in (False, True):
        for row in examples["true-fact", held_out]:
            assert row["answer"] == ("yes" if row["fields"]["claim"] in claims else "no") and row["rationale"] in claims
        for row in examples["follows", held_out]:
            given, then = row["fields"]["premise"], row["fields"]["hypothesis"]
            assert given in claims and given != then
            if row["answer"] == "yes":
                assert claims[given] == claims[then]
            if row["answer"] == "no":
                assert then not in claims
        for row in examples["same-claim", held_out]:
            assert row["answer"] == ("yes" if claims[row["fields"]["first"]] == claims[row["fields"]["last"]] else "no")
        for row in examples["same-question", held_out]:
            first, last = (WORLD.parse(row["fields"][name]) for name in ("first", "last"))
            assert row["answer"] == ("yes" if (first.kind, first.entities) == (last.kind, last.entities) else "no")
    sides = (WORLD.everything.people, WORLD.everything.places, WORLD.everything.words)
    for row in examples["odd", False]:
        sizes = {word: sum(other in side for other in row["options"]) for side in sides for word in side}
        assert sizes[row["answer"]] == 1
    groups = {"a person": sides[0], "a town": sides[1], "a thing": sides[2]}
    assert all(row["fields"]["word"] in groups[row["answer"]] for row in examples["group", False])


def test_templates_are_many_short_and_plain(examples):
    known = named(" ".join(WORLD.corpus(1500, 0)))
    known |= {word.lower() for word in known} | {word.capitalize() for word in known}
    new = set()
    for task in TASKS:
        assert 7 <= len(task.templates) <= 10 and sum(template.turned for template in task.templates) <= 3
        assert len(set(task.templates)) == len(task.templates)
        for row in (*examples[task.name, False][:12], *examples[task.name, True][:4]):
            example = task.read(row)
            for template in task.templates:
                prompt, target = in_words(example, template, task.name)
                assert len(re.findall(r"\w+|[^\w\s]", prompt)) <= 60, prompt
                new |= named(prompt + " " + target) - known
            reasoned = with_reasoning(example, task.templates[0], task.hint)
            assert len(re.findall(r"\w+|[^\w\s]", " ".join(reasoned))) <= 100, reasoned
            new |= named(" ".join(reasoned)) - known
    assert new <= NEW_WORDS | {f"{word}s" for word in WORLD.everything.words}, new


def test_tasks_as_data(tmp_path):
    gets = next(task for task in tasks(seed=1, rows=30) if task.name == "gets")
    assert gets.metric == "number"
    rows = gets.rows("train", data_dir=tmp_path)
    assert list(map(gets.read, rows)) == list(map(gets.read, world_tasks.rows(World.generate(1), "gets", 30)))
    spec = "world:task=true-sum,rows=20"
    held_out = sources.rows(spec, "examples", data_dir=tmp_path, split="held_out")
    assert [row["question"] for row in held_out] == [
        row["question"] for row in world_tasks.rows(WORLD, "true-sum", 20, held_out=True)
    ]
    again = sources.held_out(None, spec, "examples", data_dir=tmp_path)
    assert again[0] == held_out[0] and len(again) <= sources.HELD_OUT


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("world:task=chess", "examples", r"data 'world:task=chess': no task 'chess' in the world; there are job, pet,"),
        ("world:rows=5", "examples", "examples are of a task: name one, as in world:task=job"),
        ("world:task=plus", "prompts", "a task has examples, and no prompts: leave task=plus out"),
        ("world:task=plus,rows=0", "examples", "at least 1 row"),
    ],
)
def test_bad_specs(tmp_path, spec, kind, message):
    with pytest.raises(InputError, match=message):
        sources.rows(spec, kind, data_dir=tmp_path)
