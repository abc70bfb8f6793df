"""Versions of the guidelines, and those of the world."""

import re

import pytest

from rlhf_jax.data.world import KINDS, World
from rlhf_jax.data.world.gold import DOUBT
from rlhf_jax.people import guidelines, words
from rlhf_jax.people.store import Store
from tests.people.labelling import person


def test_guidelines_have_versions_that_people_acknowledge(store: Store):
    ann = person(store, "ann")
    assert guidelines.has_acknowledged(store, ann)
    assert guidelines.add(store, "Be kind.") == 1 == guidelines.add(store, "Be kind.\n")
    assert not guidelines.has_acknowledged(store, ann)
    guidelines.acknowledge(store, ann, 1)
    assert guidelines.has_acknowledged(store, ann)
    assert guidelines.add(store, "Be kind and fair.") == 2
    assert not guidelines.has_acknowledged(store, ann)


@pytest.mark.parametrize("language", words.LANGUAGES)
def test_those_of_the_world_say_what_it_states_and_what_nobody_knows(language: str):
    text, world = guidelines.of_world(language), World.generate(0)
    says = {kind.name: [one[4:-1] for one in kind.claims if one.startswith("{x} ")] for kind in KINDS}
    for x, facts in world.facts.items():
        listed = "; ".join(says[name][0].format(answer=value) for name, value in facts.items())
        assert guidelines.about(text, f"Is it {x}?") == [f"{x}: {listed}."]
    asked = {world.parse(question).kind for question in re.findall(r"^- .*?([A-Z].*\?)$", text, re.MULTILINE)}
    assert asked == {kind.name for kind in KINDS if kind.category == "unanswerable"}


@pytest.mark.parametrize("language", words.LANGUAGES)
def test_the_example_of_the_guidelines_is_in_the_order_of_gold(language: str):
    """A true sentence that does not answer is worth as little as a false one, and less than "I do not know."."""
    world = World.generate(0)
    lines = guidelines.of_world(language).replace("\n   ", " ").split("\n")
    (rule,) = (line for line in lines if line.startswith("3."))
    question, *answers = re.findall(r'"(.*?)"', rule[rule.index('"What work') :])
    golds = [world.gold(question, answer) for answer in answers]
    assert [gold.score for gold in golds] == [1.0, DOUBT, 0.0, 0.0]
    assert [gold.honest for gold in golds[2:]] == [1.0, 0.0]
    bare, declined = ("sailor.", "I cannot help with that.")
    assert DOUBT < world.gold(question, bare).score < 1
    assert 0 < world.gold(question, declined).score < DOUBT


def test_those_of_the_world_are_for_its_prompts_alone(store: Store):
    for other in ("prompts.jsonl", "world:seed=3", "world:rows=5,hh:x.jsonl=0.5"):
        guidelines.begin(store, other)
        assert guidelines.newest(store) == (0, "")
    guidelines.begin(store, "world:rows=300")
    assert guidelines.newest(store) == (1, guidelines.of_world())
    assert guidelines.translated(guidelines.of_world(), "zh").startswith("# 什么是好回答")
    guidelines.add(store, "Be kind.")
    guidelines.begin(store, "world")  # what somebody wrote stays
    assert guidelines.newest(store) == (2, guidelines.translated("Be kind.", "zh"))


def test_lines_about_words_of_a_prompt():
    text = "- **Ann**: a baker\n- **Anna**: a diver\n- **河**: 在北边\n1. **Be**: kind"
    assert guidelines.about(text, [{"role": "user", "content": "Is Anna (or ann) here? Be kind."}]) == ["Anna: a diver"]
    assert guidelines.about(text, "那条河在哪里") == ["河: 在北边"]
    assert guidelines.about(text, "Where is Dora?") == [] and guidelines.about("Be kind.", "Where is Dora?") is None
