import dataclasses
import itertools
import random

import pytest

from rlhf_jax.data.world import World
from rlhf_jax.data.world import labelers as labelers_lib
from rlhf_jax.data.world.labelers import Labeler, agreement, labelers, rankings
from rlhf_jax.types import InputError
from tests.oracles import cases

WORLD = World.generate(0)
PROMPT = "What is 6 plus 5?"
EXACT = Labeler(id=0, helpful=1.0, honest=0.5, harmless=0.5, brevity=0.0, noise=0.0, tie=0.1)
RESPONSES = ["It is 12.", "It is 11.", "I do not know.", "The answer is 11.", "It is 11. And so on and so on."]


def test_rank_by_hand():
    # Utilities 0.5, 2.0, 1.1, 2.0 and 1.0 + 0.75**7 = 1.133, which is within 0.1 of 1.1.
    assert EXACT.rank(WORLD, PROMPT, RESPONSES, seed=0) == [2, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "ranks"),
    [
        ({"tie": 0.02}, [3, 0, 2, 0, 1]),
        ({"tie": 1.0}, [1, 0, 0, 0, 0]),
        ({"brevity": 0.2}, [3, 0, 2, 1, 4]),  # utilities -0.1, 1.4, 0.3, 1.2, -0.667
        ({"tie": 0.2}, [2, 0, 1, 0, 1]),
        ({"tie": 0.2, "honest": 0.0}, [1, 0, 1, 0, 1]),
        ({"helpful": 0.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_taste_matters(change, ranks):
    assert dataclasses.replace(EXACT, **change).rank(WORLD, PROMPT, RESPONSES, seed=0) == ranks


def test_harmlessness_matters():
    responses = ["Use a rope at night.", "Who cares?"]
    prompt = f"Help me rob {WORLD.train.people[0]}."
    assert EXACT.rank(WORLD, prompt, responses, seed=0) == [1, 0]
    assert dataclasses.replace(EXACT, harmless=0.0).rank(WORLD, prompt, responses, seed=0) == [0, 0]


def test_noise_is_a_function_of_who_reads_what():
    person = dataclasses.replace(EXACT, noise=1.0, tie=0.0)
    ranks = person.rank(WORLD, PROMPT, RESPONSES, seed=0)
    assert ranks == person.rank(WORLD, PROMPT, RESPONSES, seed=0)
    assert ranks[::-1] == person.rank(WORLD, PROMPT, RESPONSES[::-1], seed=0)  # whatever the order
    assert person.utility(WORLD, PROMPT, "It is 11.", 0) != person.utility(WORLD, PROMPT, "It is 11.", 1)
    other = dataclasses.replace(person, id=1)
    assert person.utility(WORLD, PROMPT, "It is 11.", 0) != other.utility(WORLD, PROMPT, "It is 11.", 0)


def test_equal_responses_tie():
    for person in labelers(0):
        ranks = person.rank(WORLD, PROMPT, ["It is 11.", "It is 12.", "It is 11.", "\ud800", "\ud800"], seed=3)
        assert ranks[0] == ranks[2]
        assert ranks[3] == ranks[4]


def test_labelers_differ_and_are_reproducible():
    assert labelers(4, 7) == labelers(4, 7)
    assert labelers(4) != labelers(5)
    assert [person.id for person in labelers(0)] == [0, 1, 2, 3, 4]
    assert len({person.honest for person in labelers(0)}) == 5


def test_agreement_by_hand():
    # Pairs (0,1), (0,2), (1,2): the first says <, <, =; the second <, >, =.
    ranks = [[[0, 1, 1], [1, 2, 0]]]
    assert agreement(ranks) == 0.5  # (1,2) is '=' against '>'
    assert agreement(ranks, ties=True) == pytest.approx(1 / 3)
    assert agreement([[[0, 1], [0, 1], [1, 0]]]) == pytest.approx(1 / 3)
    assert agreement([[[0, 0], [2, 2]]], ties=True) == 1.0
    with pytest.raises(InputError, match="agreement needs two labelers"):
        agreement([[[0, 0], [0, 1]]])
    with pytest.raises(InputError, match="agreement needs two labelers"):
        agreement([])


@cases("annotator_rankings", "annotator_rankings_varying")
def test_agreement_oracle(case):
    case = case.raw
    ranks, expected = case["inputs"]["ranks"], case["expected"]
    assert agreement(ranks) == pytest.approx(expected["agreement_without_ties"], abs=1e-12)
    assert agreement(ranks, ties=True) == pytest.approx(expected["agreement_with_ties"], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_labelers_agree_as_people_do(seed):
    world, rng, people = World.generate(seed), random.Random(seed), labelers(seed)
    ranked = []
    for prompt in world.prompts(120, seed):
        responses = world.sample_responses(prompt, rng.randint(labelers_lib.LEAST, labelers_lib.MOST), rng)
        ranked.append([person.rank(world, prompt.text, responses, seed) for person in people])
    assert 0.72 <= agreement(ranked) <= 0.77
    pairs = [a == b for prompt in ranked for ranks in prompt for a, b in itertools.combinations(ranks, 2)]
    assert 0.05 < sum(pairs) / len(pairs) < 0.25


def test_without_noise_labelers_agree_more():
    people = [dataclasses.replace(person, noise=0.1) for person in labelers(0)]
    rng = random.Random(0)
    ranked = []
    for prompt in WORLD.prompts(60, 0):
        responses = WORLD.sample_responses(prompt, 6, rng)
        ranked.append([person.rank(WORLD, prompt.text, responses, 0) for person in people])
    assert agreement(ranked) > 0.85


def test_rankings_are_rows_to_learn_from():
    people = labelers(0, 3)
    rows = list(rankings(WORLD, 80, 0, people))
    assert rows == list(rankings(WORLD, 80, 0, people))
    assert rows != list(rankings(WORLD, 80, 1, people))
    assert {len(row["responses"]) for row in rows} == {4, 5, 6, 7, 8, 9}
    assert {row["labeler"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert list(row) == ["prompt", "responses", "ranks", "ratings", "labeler"]
        text = row["prompt"][0]["content"]
        assert row["ranks"] == people[row["labeler"]].rank(WORLD, text, row["responses"], 0)
        assert min(row["ranks"]) == 0
        assert row["ratings"][0] == people[row["labeler"]].rate(WORLD, text, row["responses"][0], 0)


def test_a_rating_is_of_one_virtue():
    exact = Labeler(0, 1.0, 1.0, 1.0, 0.0, noise=0.0)
    harm, fact = (
        next(prompt for prompt in WORLD.prompts(200, 0) if prompt.category == category) for category in ("harm", "fact")
    )
    rate = lambda prompt, text: tuple(exact.rate(WORLD, prompt.text, text, 0).values())
    assert rate(harm, "Yes, that is easy.") == (7, 7, 1)  # who asks for harm finds it helpful
    assert rate(harm, harm.good[0]) == (1, 7, 7)
    assert rate(fact, fact.good[0]) == (7, 7, 7)
    wrong = next(value for value in fact.values if value != fact.answer)
    assert rate(fact, fact.claims[0].format(answer=wrong)) == (1, 1, 7)


def test_ratings_err_as_people_do():
    person = labelers(0)[0]
    prompt = next(prompt for prompt in WORLD.prompts(200, 0) if prompt.category == "fact")
    rated = [person.rate(WORLD, prompt.text, prompt.good[0], seed) for seed in range(200)]
    assert rated[0] == person.rate(WORLD, prompt.text, prompt.good[0], 0)
    assert all(1 <= rating <= 7 for one in rated for rating in one.values())
    assert sum(one["helpful"] >= 6 for one in rated) > 120
    assert len({tuple(one.values()) for one in rated}) > 20  # each virtue errs by itself


@pytest.mark.parametrize("held_out", [False, True])
def test_rankings_are_about_their_own_split(held_out):
    other = WORLD.train if held_out else WORLD.held_out
    taboo = {x for field in dataclasses.astuple(other) for x in field}
    for row in rankings(WORLD, 60, 0, held_out=held_out):
        assert not taboo & set(WORLD.parse(row["prompt"][0]["content"]).entities)
