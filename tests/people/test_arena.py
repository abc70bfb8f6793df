"""The arena: who meets whom, which votes count, and how the models fare."""

import collections
import itertools
import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data.world import World, labelers
from rlhf_jax.errors import InputError
from rlhf_jax.people import agreement, arena, strengths
from rlhf_jax.people.agreement import Undefined
from rlhf_jax.people.arena import Vote, Votes
from rlhf_jax.people.exchange import Filter
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.labelling import person


@pytest.mark.parametrize("models, a_prompt", [(2, 1), (3, 1), (3, 2), (3, 3), (6, 4), (7, 1)])
def test_all_pairs_meet_equally_often_at_any_moment(models: int, a_prompt: int):
    met: collections.Counter = collections.Counter()
    for battles in itertools.islice(arena.pairs(models, a_prompt, seed=1), 50):
        assert len(set(battles)) == a_prompt and all(0 <= i < j < models for i, j in battles)
        met.update(battles)
        every = [met[pair] for pair in itertools.combinations(range(models), 2)]
        assert max(every) - min(every) <= 1


def test_pairs_depend_on_the_seed_alone():
    first, again, other = ([*itertools.islice(arena.pairs(4, 1, seed), 30)] for seed in (1, 1, 2))
    assert first == again != other
    assert first[:6] != first[6:12]  # in no fixed order
    for wrong in (0, 4):
        with pytest.raises(InputError, match=f"pairs={wrong}: expected from 1 to 3, the pairs that 3 models make"):
            arena.pairs(3, wrong, 1)


def test_names_are_as_short_as_they_may_be():
    names = arena.short_names(["runs/ppo/model", "runs/sft/model", "/far/runs/rm/model/", "gpt"])
    assert names == {
        "runs/ppo/model": "ppo/model",
        "runs/sft/model": "sft/model",
        "/far/runs/rm/model/": "rm/model",
        "gpt": "gpt",
    }
    assert arena.short_names(["b", "a/b", "c/a/b"]) == {"b": "b", "a/b": "a/b", "c/a/b": "c/a/b"}
    assert arena.short_names(["runs/a/model"]) == {"runs/a/model": "model"}
    assert arena.short_names([]) == {}


def votes(text: str) -> Votes:
    """Votes from "a>b a=b a!b", a tie and both bad, with everybody named."""
    said = [Vote(part[0], part[2], {">": "first", "<": "second", "=": "tie", "!": "bad"}[part[1]], "ann", n)
            for n, part in enumerate(text.split())]  # fmt: skip
    return Votes(frozenset(name for vote in said for name in (vote.first, vote.second)), said)


def test_a_table_by_hand():
    found = arena.table(votes("a>b a>b b<a a>b b>a b=a a=b a!b a!b a=b"))
    a, b = found.standings
    assert [one.name for one in found.standings] == ["a", "b"]
    assert a.record == arena.Record(wins=4, losses=1, ties=3, bad=2) and a.record.battles == 10
    assert b.record == arena.Record(wins=1, losses=4, ties=3, bad=2)
    assert a.record.rate and a.record.rate.value == 0.65 and a.record.rate == strengths.win_rate(4, 5, 1)
    # Shares 4 : 1 : 5 of wins, losses and ties fit exactly: both bad is a tie.
    assert (a.strength, b.strength) == (pytest.approx(math.log(4) / 2), pytest.approx(-math.log(4) / 2))
    assert found.nu == pytest.approx(2.5) and a.standard_error == pytest.approx(math.sqrt(1.25) / 2)
    assert found.between[0][1] == a.record and found.between[1][0] == b.record
    assert found.between[0][0].battles == 0 and found.between[0][0].rate is None
    assert (found.votes, found.people, found.battles, found.bad, found.same) == (10, 1, 10, 2, 0)


def test_agreement_of_two_people_by_hand():
    """Cases of two people: equal 1, both tie 1 (a tie and both bad), half a tie 1, opposite 2 (of three people)."""

    def vote(item: int, person: str, verdict: str, same: bool = False) -> Vote:
        return Vote("a", "b", verdict, person, item, same)

    said = [
        *(vote(1, "ann", "first"), vote(1, "bob", "first"), vote(1, "eve", "second")),
        *(vote(2, "ann", "tie"), vote(2, "bob", "bad")),
        *(vote(3, "ann", "tie"), vote(3, "bob", "second")),
        vote(4, "ann", "first"),  # alone
        *(vote(5, "ann", "tie", same=True), vote(5, "bob", "tie", same=True)),  # nothing to choose between
    ]
    found = arena.table(Votes(frozenset("ab"), said))
    assert not isinstance(found.agreement, Undefined) and found.agreement.without_ties
    assert found.agreement.without_ties == agreement.wilson(1, 3)
    assert found.agreement.ties_as_label == agreement.wilson(2, 5)
    assert found.agreement.ties_as_half == agreement.wilson(2.5, 5)
    assert "agree, without ties: 33.3 % (6.1 to 79.2 %, n=3)" in arena.text(found)
    assert arena.as_json(found)["agreement"]["ties_as_label"]["n"] == 5
    alone = arena.table(votes("a>b b>a"))
    assert isinstance(alone.agreement, Undefined) and alone.agreement.why == "no_overlap"
    assert arena.as_json(alone)["agreement"] is None and "raise the overlap" in arena.text(alone)


@pytest.mark.parametrize(
    ("text", "order", "why"),
    [
        ("a>b b>a a>c b>c", "ab c", {"c": "lost"}),
        ("a>b b>a c>a c>b", "c ab", {"c": "won"}),
        ("a>b b>a c>d d>c d>c a>b a>b", "ab dc", {"c": "apart", "d": "apart"}),
        ("a>b b>a x>a x>b x>y y>a y>b", "x ab y", {"x": "won", "y": "apart"}),
        ("a>b b>c", "a b c", {"a": "won", "b": "apart", "c": "lost"}),
        ("a=b a!b", "ab", {"a": "open", "b": "open"}),
        ("a>b a=b", "ab", {"a": "open", "b": "open"}),
        ("a>b", "a b", {"a": "won", "b": "lost"}),
    ],
)
def test_who_has_no_finite_strength_is_told_why(text: str, order: str, why: dict):
    found = arena.table(votes(text))
    assert "".join(one.name for one in found.standings) == order.replace(" ", "")
    assert {one.name: one.why for one in found.standings if one.why} == why
    for one in found.standings:
        assert (one.strength is None) == (one.standard_error is None) == (one.name in why)
    for said in (json.dumps(arena.as_json(found), allow_nan=False), arena.text(found)):
        assert "nan" not in said.lower() and "inf" not in said.lower().replace("infin", "").replace("finite", "")
    # Those with a strength have that of the battles among themselves.
    rest = [one for one in found.standings if one.strength is not None]
    if rest:
        inside = {one.name for one in rest}
        alone = arena.table(votes(" ".join(part for part in text.split() if {part[0], part[2]} <= inside)))
        assert [(one.name, one.strength) for one in rest] == [(one.name, one.strength) for one in alone.standings]


def test_a_table_needs_no_more_memory_for_more_votes():
    peaks = []
    for count in (4000, 20_000):
        said = (Vote("a", "b", ("first", "second", "bad")[n % 3], f"person {n % 8}", n // 2) for n in range(count))
        tracemalloc.start()
        found = arena.table(Votes(frozenset("ab"), said))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (found.votes, found.people, found.battles) == (count, 8, count // 2)
    assert peaks[1] < peaks[0] + 20_000


def test_nothing_yet():
    found = arena.table(Votes(frozenset({"runs/a/model", "runs/b/model"}), []))
    assert [(one.name, one.why) for one in found.standings] == [("a/model", "none"), ("b/model", "none")]
    assert "no battle yet" in arena.text(found)
    assert arena.table(Votes(frozenset(), [])).standings == ()


def test_the_text_has_a_line_a_model():
    lines = arena.text(arena.table(votes("a>b b>a a>b a!b"))).splitlines()
    assert len(lines) == 5 and lines[4].startswith("agreement is undefined")
    assert lines[1].split() == ["a", "4", "2", "1", "0", "1", "62.5%", "(21.9%", "to", "90.8%)", "+0.347", "0.612"]
    assert lines[3].startswith("Votes: 4 · people: 1 · battles: 4 · both bad: 1")


NUMBERS = itertools.count()


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "people.db") as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
        yield store


def vote(store: Store, who: int, better: str) -> int:
    """Vote for the answer `better`, or else what it says, such as a tie; returns the label's number."""
    held = store.task(who)
    assert held and held.task == "arena"
    said = ("first", "second")[held.responses.index(better)] if better in held.responses else better
    answer = {"skip": "unclear"} if better == "skip" else {"verdict": said}
    return store.submit(who, held.id, f"submission-{next(NUMBERS)}", answer, 1.0)


def test_which_votes_count(store: Store):
    """Not those withdrawn, skipped, of people set aside or of another task, nor known and repeated battles."""
    battle = Item("p", ("good", "poor"), "arena", ("x/model", "y/model"), overlap=3)
    store.add([battle, Item("q", ("poor ", " poor"), "arena", ("x/model", "z/model"), round=1, overlap=3)])
    ann, bob, eve = (person(store, name) for name in ("ann", "bob", "eve"))
    vote(store, ann, "good")
    vote(store, ann, "tie")
    vote(store, bob, "poor")
    store.undo(bob)
    vote(store, bob, "bad")
    vote(store, bob, "skip")
    vote(store, eve, "tie")  # what bob skipped
    vote(store, eve, "poor")
    store.set_aside(eve, "a reason")
    store.add([Item("r", ("good", "poor"), "arena", ("y/model", "z/model"), gold=(0, 1))])
    vote(store, ann, "good")  # the known one is all that is left
    with store.reader() as db:
        found = arena.read(db)
        assert [(one.first, one.second, one.verdict, one.person, one.same) for one in found.votes] == [
            ("x/model", "y/model", "first", "ann", False),
            ("x/model", "y/model", "bad", "bob", False),
            ("x/model", "z/model", "tie", "ann", True),
        ]
        assert found.models == {"x/model", "y/model", "z/model"}
        assert len([*arena.read(db, Filter(aside=True)).votes]) == 5
        assert len([*arena.read(db, Filter(person="ann")).votes]) == 2
        assert arena.read(db, Filter(round=1)).models == {"x/model", "z/model"}
        with pytest.raises(InputError, match="filter task=rank: an arena counts"):
            arena.read(db, Filter(task="rank"))
        table = arena.table(arena.read(db))
    assert (table.votes, table.people, table.battles, table.bad, table.same) == (3, 2, 2, 1, 1)
    store.restore(eve)
    with store.reader() as db:
        assert [one.verdict for one in arena.read(db).votes].count("second") == 1


@pytest.mark.slow
def test_simulated_labelers_recover_the_order_of_models(store: Store):
    """Five of the world's labelers vote over three models whose answers are good with known chances."""
    world, rng = World.generate(0), random.Random(0)
    quality = {"runs/ppo/model": 0.95, "runs/sft/model": 0.6, "runs/base/model": 0.2}
    models = list(quality)
    battles = []
    for prompt, met in zip(world.prompts(60, seed=1), arena.pairs(3, 1, seed=0), strict=False):
        ((i, j),) = met
        texts = tuple(world.respond(prompt, rng, quality[models[k]]) for k in (i, j))
        battles.append(Item(prompt.messages, texts, "arena", (models[i], models[j]), overlap=5))
    assert store.add(battles) == (60, 0)
    for labeler in labelers.labelers(seed=3, n=5):
        who = person(store, f"labeler {labeler.id}")
        while held := store.task(who):
            first, second = labeler.rank(world, held.prompt[-1]["content"], held.responses, seed=0)
            verdict = "tie" if first == second else "first" if first < second else "second"
            store.submit(who, held.id, f"submission-{held.id}", {"verdict": verdict}, 1.0)
    with store.reader() as db:
        found = arena.table(arena.read(db))
    assert [one.name for one in found.standings] == ["ppo/model", "sft/model", "base/model"]
    assert (found.votes, found.people, found.battles) == (300, 5, 60)
    assert [one.record.battles for one in found.standings] == [200, 200, 200]
    strength = [one.strength for one in found.standings]
    errors = [one.standard_error for one in found.standings]
    assert np.sum(strength) == pytest.approx(0, abs=1e-9)
    assert all(error and 0 < error < 0.3 for error in errors)
    assert strength[0] - strength[1] > 2 * errors[0] and strength[1] - strength[2] > 2 * errors[1]
