"""The lessons: their language, their exercises, and their cells, which run at a small size."""

import functools
import inspect
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.lessons import course, exercises, language, models, pages, people
from rlhf_jax.people import asking
from rlhf_jax.people.store import Store
from tests.people.labelling import person

SMALL = {"STEPS": 2, "EVERY": 1, "BATCH": 8, "GROUPS": 2, "TEXTS": 8, "SAMPLES": 8}
SMALL |= {"FIT": 2, "EACH": 4, "ROUNDS": 2, "LABELS": 2, "UPDATES": 1}


# The language ---------------------------------------------------------------------------------------------------------


def test_kindness_by_hand():
    assert language.kindness("the soup was great .") == 5 / 8
    assert language.kindness("the soup was very cold .") == 2 / 8
    assert language.kindness("the soup was great but our staff was very rude .") == 3 / 8
    assert language.kindness("the soup was very great and our staff was very kind .") == 1
    assert language.kindness("the soup was very dull and our staff was very rude .") == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the soup was great",
        "the soup was great and our staff was rude .",  # "and" joins the same mood
        "the soup was great but our staff was kind .",
        "the great was soup .",
        "the soup was very very great .",
        "the soup was great . .",
        "the soup was great and",
        "great great great .",
    ],
)
def test_what_is_no_review_has_no_kindness(text: str):
    assert language.points(text) is None
    assert language.kindness(text) == 0


def price(text: str) -> tuple[float, int]:
    """-ln p of a review's words after the first, by the rules of the language, and the number of these words."""
    words = text.split()
    found = language.points(text)
    assert found is not None
    nats = -math.log(1 / 2 / 5 / 7)  # mood, word of praise or blame, thing
    nats -= math.log(language.GOES_ON if len(found) == 2 else 1 - language.GOES_ON)
    nats -= sum(math.log(language.VERY if very else 1 - language.VERY) for very in clauses_with_very(words))
    if len(found) == 2:
        nats -= math.log(1 / 2 / 5 / 7) + math.log(language.TURNS if found[0] * found[1] < 0 else 1 - language.TURNS)
    return nats, len(words) - 1


def clauses_with_very(words: list[str]) -> list[bool]:
    return ["very" in part.split() for part in re.split(" and | but ", " ".join(words))]


def test_the_entropy_is_the_mean_price_of_a_word():
    prices = [price(text) for text in language.reviews(20_000, "entropy")]
    nats, words = np.sum(prices, axis=0)
    assert language.entropy() == pytest.approx(nats / words, abs=0.01)


def test_texts_are_encoded_and_decoded():
    texts = language.reviews(20, 0)
    tokens, mask = language.encode(texts)
    assert tokens.shape == (20, language.LENGTH) and np.array_equal(mask, tokens > 0)
    assert language.decode(tokens) == texts
    batch = language.documents(texts)
    assert not batch.target[:, 0].any() and np.array_equal(batch.target[:, 1:], mask[:, 1:])


def test_rivals_have_the_same_opening():
    for texts in language.rivals(10, 4, 0):
        assert len({" ".join(text.split()[:3]) for text in texts}) == 1
        assert all(language.points(text) is not None for text in texts)


def test_ranks_follow_kindness():
    texts = [
        "the soup was cold .",
        "the soup was great .",
        "the soup was warm .",
        "the soup was cold but the bread was great .",
    ]
    assert language.rank(texts, random.Random(0), slips=0.0) == [3, 0, 0, 2]


def test_an_answer_follows_its_instruction():
    for number in range(70):
        asked = language.instruction(number)
        assert language.follows(asked, language.demonstration(asked, random.Random(number)))
    assert language.follows("cake stale .", "the cake was very stale .")
    wrong = ("the cake was dull .", "the soup was stale .", "the cake was stale and our cake was stale .", "stale .")
    for answer in wrong:
        assert not language.follows("cake stale .", answer)


def test_new_instructions_are_none_to_learn_from():
    learnt, new = (set(language.instructions(2000, 0, new)) for new in (False, True))
    assert len(learnt) == 56 and len(new) == 14 and not learnt & new


# People ---------------------------------------------------------------------------------------------------------------


def test_labels_come_back_from_the_store_as_they_were_given(capsys: pytest.CaptureFixture):
    texts = language.rivals(3, 4, seed=0)
    with people.simulated(0, functools.partial(language.rank, slips=0.0)) as ask:
        first, second = ask(texts, 1), ask(texts[:1], 2)
    assert "round 2 1/1" in capsys.readouterr().out
    wanted = [language.rank(row, random.Random(0), slips=0.0) for row in texts]
    assert [language.decode(row) for row in first.tokens] == texts
    levels = [[sorted(set(ranks)).index(rank) for rank in ranks] for ranks in wanted]
    assert first.rank.tolist() == levels and second.rank.tolist() == levels[:1]


def test_a_reader_ranks_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """While the lesson waits, labels come into the store by another door; they stay there for the next time."""
    db, texts = tmp_path / "people.db", language.rivals(2, 4, seed=0)
    with people.reader(0, db) as ask, Store(db) as page:
        assert page.rules() == people.RULES  # of a page that is opened before the first task comes
        ann = person(page, "ann")

        def rank(seconds: float) -> None:
            task = page.task(ann)
            assert task is not None
            page.submit(ann, task.id, f"submission-{task.id}", {"ranks": [0, 1, 1, 2]}, 1.0)

        monkeypatch.setattr(asking.time, "sleep", rank)
        found = ask(texts, 1)
        assert sorted(found.rank[0].tolist()) == [0, 1, 1, 2]
        assert np.array_equal(ask(texts, 1).rank, found.rank)
    assert f"scripts/people.sh --db {db}" in capsys.readouterr().out


# Exercises ------------------------------------------------------------------------------------------------------------


def log_probability(logits, word):
    top = max(logits)
    return logits[word] - top - math.log(sum(math.exp(x - top) for x in logits))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def ranking_loss(scores, ranks):
    pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
    return -np.mean([math.log(sigmoid(scores[i] - scores[j])) for i, j in pairs])


def gae(rewards, values, gamma, lam):
    found, later = [], 0.0
    for t in reversed(range(len(rewards))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        later = rewards[t] + gamma * after - values[t] + gamma * lam * later
        found.insert(0, later)
    return found


def clipped_loss(logp, logp_old, advantage, clip):
    ratio = math.exp(logp - logp_old)
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))


def token_rewards(score, logp, logp_ref, kl_coef):
    rewards = [-kl_coef * (a - b) for a, b in zip(logp, logp_ref, strict=True)]
    rewards[-1] += score
    return rewards


def agreement_of_two(first, second):
    pairs = [(i, j) for i in range(len(first)) for j in range(i) if first[i] != first[j] and second[i] != second[j]]
    return np.mean([(first[i] < first[j]) == (second[i] < second[j]) for i, j in pairs])


def segments(lengths, length):
    found = [number for number, words in enumerate(lengths, 1) for _ in range(words)]
    return found + [0] * (length - len(found))


ANSWERS = {
    "log_probability": log_probability,
    "loss_of_text": lambda logp, counts: -sum(x for x, on in zip(logp, counts, strict=True) if on) / sum(counts),
    "perplexity": lambda loss: math.e**loss,
    "mask_of_answer": lambda asked, answer, length: [0] * asked + [1] * answer + [0] * (length - asked - answer),
    "loss_of_answers": lambda logp, masks: -np.sum(np.array(logp) * masks) / np.sum(masks),
    "segments": segments,
    "pairs": lambda ranks: [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]],
    "agreement_of_two": agreement_of_two,
    "chance_to_agree": lambda p: p * p + (1 - p) * (1 - p),
    "probability_better": lambda better, worse: sigmoid(better - worse),
    "pair_loss": lambda better, worse: -math.log(sigmoid(better - worse)),
    "ranking_loss": ranking_loss,
    "reinforce_loss": lambda logp, advantage: -sum(a * b for a, b in zip(logp, advantage, strict=True)) / len(logp),
    "leave_one_out": lambda rewards: [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards],
    "group_normalize": lambda rewards: (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-4),
    "without_scale": lambda rewards: [r - sum(rewards) / len(rewards) for r in rewards],
    "flat_probability": lambda p, group: p**group + (1 - p) ** group,
    "sequence_mean": lambda losses: sum(sum(one) / len(one) for one in losses) / len(losses),
    "gae": gae,
    "clipped_loss": clipped_loss,
    "value_target": lambda advantage, value: advantage + value,
    "token_rewards": token_rewards,
    "k3": lambda logp, logp_ref: math.exp(logp_ref - logp) - 1 + logp - logp_ref,
    "next_kl_coef": lambda coef, kl, target, n, horizon: (
        coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)
    ),
    "kl_of_best": lambda n: math.log(n) - (n - 1) / n,
    "gold_of_best": lambda scores, golds: golds[scores.index(max(scores))],
    "best_distance": lambda alpha, beta: alpha / beta / 2,
    "restored": lambda ranks, shown: [ranks[shown.index(k)] for k in range(len(ranks))],
    "normalized": lambda scores, reference: (np.array(scores) - np.mean(reference)) / np.std(reference),
    "standard_error": lambda p, n: (p * (1 - p) / n) ** 0.5,
    "implicit_reward": lambda logp, logp_ref, beta: beta * (sum(logp) - sum(logp_ref)),
    "dpo_loss": lambda w, l, ref_w, ref_l, beta: -math.log(sigmoid(beta * ((w - ref_w) - (l - ref_l)))),  # noqa: E741
    "first_loss": lambda: math.log(2),
}


def test_every_exercise_has_an_answer_here():
    assert ANSWERS.keys() == exercises.EXERCISES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
def test_a_right_answer_is_right(name: str, capsys: pytest.CaptureFixture):
    assert exercises.check(name, ANSWERS[name])
    assert capsys.readouterr().out == f"{name}: right\n"


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_told_what_is_right(name: str, capsys: pytest.CaptureFixture):
    assert not exercises.check(name, lambda *given: np.asarray(ANSWERS[name](*given)) + 0.01)
    assert "should be" in capsys.readouterr().out
    assert not exercises.check(name, lambda *given: {})
    assert not exercises.check(name, lambda: 1 / 0)
    assert "ZeroDivisionError" in capsys.readouterr().out or name != "first_loss"


def test_a_missing_answer_gets_a_hint(capsys: pytest.CaptureFixture):
    def missing(*given):
        raise NotImplementedError

    assert not exercises.check("gae", missing)
    assert "Hint: go from the last token" in capsys.readouterr().out


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages.names())
def test_a_lesson_is_complete(name: str):
    """An equation, our source, a run, three faults, three exercises; and curves of four seeds with their pictures."""
    text = pages.read(name)
    assert text.count("\n$$\n") >= 2
    assert text.count("course.source(") >= 1
    assert len(re.findall(r"lesson\.draw\(", text)) >= 4
    assert len(set(re.findall(r'exercises\.check\("(\w+)"', text)) & exercises.EXERCISES.keys()) == 3
    assert all(len(line) <= 120 for is_code, cell in pages.cells(text) if is_code for line in cell.split("\n"))
    found = json.loads((course.EXPECTED / f"{name}.json").read_text())
    assert len(found["seeds"]) == len(course.SEEDS) and len(found["drawn"]) >= 4
    assert next(iter(found["drawn"])) == "yours"
    for picture in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (pages.LESSONS / picture).exists()


def test_lessons_are_in_order():
    """Their numbers are those of the index, each names the next one, and a lesson named by its number is that one."""
    listed, tree = pages.read("index").split(":hidden:")
    index = re.findall(r"^(\d+)\. \[.+\]\((.+)\.md\)", listed, re.MULTILINE)
    assert [name for _, name in index] == re.findall(r"^[\w-]+$", tree, re.MULTILINE)
    assert sorted(name for _, name in index) == pages.names()
    for (number, name), (_, following) in itertools.pairwise([*index, ("", "")]):
        text = pages.FENCE.sub("", pages.read(name))
        assert text.startswith(f"# {number}. ")
        assert re.findall(r"Next:\s\[[^]]+\]\((.+?)\.md\)", text) == [following] * bool(following)
        named = re.findall(r"(\[)?lesson (\d+)(?:\]\((.+?)\.md\))?", text, re.IGNORECASE)
        assert {(shown, target) for _, shown, target in named} <= set(index)


def test_sources_follow_their_cells():
    text = (
        "```python\nfrom rlhf_jax.algorithms import ppo\n```\n\n```python\ncourse.source(ppo.adapt_kl_coef)\n```\nx\n"
    )
    found = pages.with_sources(text)
    assert found == pages.with_sources(text.replace("```\n\n```python\n", "\n", 1))
    assert "course.source" not in found
    assert "`ppo.adapt_kl_coef` in [rlhf_jax/algorithms/ppo.py](../../rlhf_jax/algorithms/ppo.py)" in found
    assert "error = jnp.clip(kl / target - 1.0, -0.2, 0.2)" in found
    with pytest.raises(LookupError, match=r"ppo\.nothing"):
        pages.with_sources(text.replace("adapt_kl_coef", "nothing"))


def test_a_notebook_has_the_cells_of_its_page():
    book = json.loads(pages.notebook("ppo"))
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code == [part for is_code, part in pages.cells(pages.read("ppo")) if is_code]
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    published = json.loads(pages.notebook("ppo", "someone/rlhf_jax"))
    assert "git clone -q --depth 1 https://github.com/someone/rlhf_jax" in "".join(published["cells"][1]["source"])
    text = "".join("".join(cell["source"]) for cell in published["cells"])
    assert "](../" not in text and "figures/" not in text
    assert "https://github.com/someone/rlhf_jax/blob/main/rlhf_jax/algorithms/ppo.py" in text


@pytest.fixture(scope="module")
def untrained():
    """A model without training, in the place of one that takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        guest = models.fresh(0)
        patch.setattr(models, "guest", lambda: guest)
        yield


def once(run: Callable) -> Callable:
    """`run` of a lesson that computes the first time alone; later calls, of the faults, have to fit its signature."""
    found: list[course.Records] = []

    def call(*args, **changes):
        inspect.signature(run).bind(*args, **changes)
        if not found:
            found.append(run(*args, **changes))
        return found[0]

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", pages.names())
def test_a_lesson_runs(name: str, untrained: None):
    """All cells, at a small size; every record is finite. `scripts/lessons.py measure` runs the faults too."""
    sizes = {size: lambda _, value=value: value for size, value in SMALL.items()}
    lesson = pages.run(name, sizes | {"run": once})["lesson"]
    assert len(lesson.drawn) >= 4
    for row in lesson.drawn["yours"]:
        assert all(np.isfinite(float(row[key])) for key in lesson.panels)
