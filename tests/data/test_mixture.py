"""Mixtures of tasks: shares, orders and forms of the draws, what is held out, and the packed batches."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from rlhf_jax.data import tokenizer
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.tasks import Example, Task, Template, catalog, mixture, world
from rlhf_jax.types import InputError

ASK = Template("{question}{options}")
TURNED = Template("Which question has the answer {answer}?", target="{question}")


def task(name, cluster="facts", templates=(ASK, TURNED), data="none.jsonl"):
    return Task(name, cluster, data, templates)


def plan(sizes, seed=0, **settings):
    tasks = tuple(task(f"task{n}") for n in range(len(sizes)))
    return mixture.Plan(tasks, tuple(sizes), mixture.Config(**settings), seed)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.train(
        ["Question: Is it so, or is it not?\nAnswer: yes\nno"] * 9, 300, tmp_path_factory.mktemp("t")
    )


def write(folder, name, rows, **settings):
    """A task of these rows."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(task(name, data=str(file)), held_out="train", **settings)


def rows(count, first=0):
    return [
        {"question": f"Is {n} even?", "options": ["yes", "no"], "answer": n % 2, "rationale": f"Half of {n}."}
        for n in range(first, first + count)
    ]


@pytest.fixture
def opened(tmp_path):
    """Two tasks of 6 and 30 rows, opened with these settings."""
    tasks = write(tmp_path, "small", rows(6)), write(tmp_path, "large", rows(30, 100))
    return lambda seed=0, **settings: mixture.open_mixture(
        tasks, mixture.Config(**settings), seed=seed, data_dir=tmp_path / "data"
    )


def stream(mix, tok, length=96, batch=4, **sizes):
    return mixture.Stream(mix, tok, mixture.Sizes(length, batch, **sizes))


# Draws ----------------------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    found = mixture.shares([1000, 3000, 400_000], mixture.Config())
    np.testing.assert_allclose(found, [1 / 7, 3 / 7, 3 / 7])
    np.testing.assert_allclose(mixture.shares([10, 400], mixture.Config(most_rows=30, ceiling=1000)), [0.25, 0.75])


@pytest.mark.slow
def test_the_mixture_has_the_proportions_of_the_formula():
    """Over 100,000 draws of 62 sets of all sizes, each within 1 % of its share."""
    sizes = [250, 635, *(int(n) for n in np.geomspace(1000, 4e6, 60))]
    chosen = plan(sizes, seed=3)
    count = np.bincount([chosen._turn(k)[0] for k in range(100_000)], minlength=62)
    np.testing.assert_allclose(count, 100_000 * mixture.shares(sizes), rtol=0.01)


def test_any_draws_in_a_row_have_almost_the_shares():
    sizes = [10, 500, 90, 3000]
    chosen = plan(sizes, seed=1)
    for first in (0, 5 * 1024, mixture.BLOCK - 1024):
        count = np.bincount([chosen._turn(k)[0] for k in range(first, first + 1024)], minlength=4)
        assert np.all(np.abs(count - 1024 * mixture.shares(sizes)) <= 1)


def test_a_task_has_each_row_once_before_any_comes_again():
    chosen = plan([7, 40], most_rows=20)
    drawn = [chosen.draw(k) for k in range(700)]
    small, large = ([draw.row for draw in drawn if draw.task == n] for n in (0, 1))
    kept = set(large)
    assert len(kept) == 20 and max(kept) >= 20  # chosen among all rows
    # In order but for the draws of one hand, which has 265 of the first task.
    count = np.bincount(small, minlength=7)
    assert count.max() - count.min() <= 1 + 1024 // 7
    numbers = [chosen._turn(k) for k in range(3 * 1024)]
    for n in (0, 1):
        assert sorted(nth for number, nth in numbers if number == n) == list(range(sum(x == n for x, _ in numbers)))


def test_a_block_follows_the_last():
    chosen = plan([5, 9, 3])
    turns = [chosen._turn(k) for k in (*range(mixture.BLOCK - 1024, mixture.BLOCK + 1024),)]
    for n in range(3):
        assert sorted(nth for number, nth in turns if number == n) == list(
            range(min(x for number, x in turns if number == n), 1 + max(x for number, x in turns if number == n))
        )


def test_a_draw_depends_on_its_number_and_the_seed_alone():
    forms = mixture.Forms(few_shot=1.0, reasoning=1.0)
    one, same, other = (plan([7, 40], seed, forms=forms) for seed in (0, 0, 1))
    numbers = [900, 3, 2**33, 5]
    assert [one.draw(k) for k in numbers] == [same.draw(k) for k in reversed(numbers)][::-1]
    assert [one.draw(k) for k in range(30)] != [other.draw(k) for k in range(30)]


@pytest.mark.slow
def test_forms_and_templates_are_drawn():
    forms = mixture.Forms(zero_shot=2.0, few_shot=1.0, reasoning=1.0, few_shot_reasoning=0.0)
    drawn = [plan([50, 40], forms=forms, shots=3).draw(k) for k in range(4000)]
    share = lambda condition: np.mean([condition(draw) for draw in drawn])
    assert share(lambda draw: draw.reasoning) == pytest.approx(0.25, abs=0.03)
    assert share(lambda draw: draw.shots > 0) == pytest.approx(0.25, abs=0.03)
    assert {draw.shots for draw in drawn} == {0, 1, 2, 3}
    assert share(lambda draw: draw.template) == pytest.approx(0.75 / 2, abs=0.03)  # none with reasoning is turned
    assert all(draw.template == 0 for draw in drawn if draw.reasoning)
    assert all(draw.row not in draw.others and len(set(draw.others)) == len(draw.others) for draw in drawn)
    assert {plan([50], templates=1).draw(k).template for k in range(50)} == {0}
    assert plan([1], forms=mixture.Forms(0.0, 1.0)).draw(0).shots == 0  # nothing to show beside the question
    with pytest.raises(InputError, match="all weights are 0"):
        mixture.Forms(zero_shot=0.0)


# Splits ---------------------------------------------------------------------------------------------------------------


def test_leave_out():
    reading, common, both = "reading", "commonsense", "reading_commonsense"
    tasks = [
        task(f"{n}", name, data=f"set{n}") for n, name in enumerate([reading, common, both, "paraphrase", "entailment"])
    ]
    tasks.append(task("5", "sentiment", data="set0[:50%]"))  # of the same data as the first
    split = lambda *held: [one.cluster for one in mixture.leave_out(tasks, held).train]
    assert split(reading) == [common, "paraphrase", "entailment"]
    assert split(common) == [reading, "paraphrase", "entailment", "sentiment"]
    assert split(both) == ["paraphrase", "entailment", "sentiment"]
    assert split("paraphrase") == [reading, common, both, "sentiment"]
    assert split("entailment") == [reading, common, both, "sentiment"]
    assert split() == [one.cluster for one in tasks]
    found = mixture.leave_out(tasks, [reading])
    assert [one.name for one in found.held_out] == ["0"] and [one.name for one in found.left_out] == ["2", "5"]
    with pytest.raises(InputError, match="no task is of cluster 'maths'; there are commonsense, entailment"):
        mixture.leave_out(tasks, ["maths"])
    assert found.templates == 3 and {one.templates for one in found.train} == {(ASK,)}  # the turned one has words
    with pytest.raises(InputError, match="no task is left"):
        mixture.leave_out(tasks[3:5], ["entailment"])


# Words ----------------------------------------------------------------------------------------------------------------


def test_words(opened):
    mix = opened(forms=mixture.Forms(0.0, 0.0, 0.0, 1.0), shots=2)
    draw = mixture.Draw(task=0, row=3, template=0, reasoning=True, shots=2, others=(5, 2, 1))
    words = mix.words(draw)
    reason = lambda n: f"Half of {n}. So the answer is {'no' if n % 2 else 'yes'}."
    ask = lambda n: f"Is {n} even?\n\nOPTIONS:\n- yes\n- no\nLet's think step by step."
    assert words.pairs == ((ask(5), reason(5)), (ask(2), reason(2)))
    assert (words.prompt, words.target) == (ask(3), reason(3))
    assert words.rendered(chat=False) == (
        "\n\n".join([f"{ask(n)} {reason(n)}" for n in (5, 2)] + [ask(3)]),
        f" {reason(3)}",
    )
    prompt, response = words.rendered(chat=True)
    assert [m["role"] for m in prompt] == ["user", "assistant"] * 2 + ["user"] and response == reason(3)
    turned = mix.words(dataclasses.replace(draw, template=1, shots=0))
    assert not turned.reasoning and turned.target == "Is 3 even?" and not turned.pairs


def test_a_row_without_a_rationale_is_put_without(tmp_path):
    bare = write(tmp_path, "bare", [{"question": "a", "answer": "b"}, *rows(1)])
    mix = mixture.open_mixture([bare], mixture.Config(), seed=0, data_dir=tmp_path / "data")
    draw = mixture.Draw(task=0, row=0, template=0, reasoning=True, shots=1, others=(1,))
    assert mix.words(draw).target == "b" and len(mix.words(draw).pairs) == 1
    assert mix.words(dataclasses.replace(draw, row=1, others=(0,))).pairs == ()  # an example must reason too


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_are_packed_and_teach_the_answers(opened, tok):
    packing = mixture.Packing(stream(opened(), tok))
    batch = next(packing)
    assert batch.tokens.shape == (4, 96) and batch.segment.max() > 1
    k = packing.get_state()["next"]
    assert packing.get_state()["learnt"] == k == sum(row.max() for row in batch.segment)
    texts = [
        (tokenizer.decode(tok, row[seg == n]), tokenizer.decode(tok, row[(seg == n) & target]))
        for row, seg, target in zip(batch.tokens, batch.segment, batch.target, strict=True)
        for n in range(1, seg.max() + 1)
    ]
    mix = opened()
    words = [mix.words(mix.plan.draw(n)) for n in range(k)]
    assert sorted(texts) == sorted((f"Question: {w.prompt}\nAnswer: {w.target}", f" {w.target}") for w in words)
    ends = batch.tokens[batch.target & (np.roll(batch.segment, -1, 1) != batch.segment)]
    assert np.all(ends == tok.eos_token_id)
    wide = batch.segment.astype(bool).sum(axis=1)
    (first,) = next(mixture.Packing(stream(opened(), tok, batch=1))).segment
    assert np.array_equal(first[: wide[0]] > 0, batch.segment[0][: wide[0]] > 0)


def test_a_stream_goes_on_where_it_was(opened, tok):
    forms = mixture.Forms(1.0, 1.0, 1.0, 1.0)
    whole = iter(stream(opened(forms=forms), tok))
    first = [next(whole) for _ in range(3)]
    state = json.loads(json.dumps(whole.get_state()))
    rest = [next(whole) for _ in range(4)]
    again = iter(stream(opened(forms=forms), tok))
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, rest, [next(again) for _ in range(4)])
    assert again.get_state() == whole.get_state()
    jax.tree.map(np.testing.assert_array_equal, first[0], next(iter(stream(opened(forms=forms), tok))))
    assert not np.array_equal(first[0].tokens, next(iter(stream(opened(1, forms=forms), tok))).tokens)


def test_only_what_is_drawn_is_read(opened, tok):
    """No task is read as a whole: the rows of a batch, those that are tokenised with them."""
    read = []

    class Counted(Rows):
        def __init__(self): ...

        def __len__(self):
            return 4000

        def __getitem__(self, index):
            read.append(index)
            return {"question": f"Is {index} even?", "answers": ["yes"], "options": [], "rationale": ""}

    chosen = plan([4000], most_rows=3000)
    next(mixture.Packing(stream(mixture.Mixture(chosen, (Counted(),)), tok)))
    assert len(read) == mixture.CHUNK


def test_what_is_too_long_loses_examples_or_is_skipped(tmp_path, tok, monkeypatch):
    long = write(tmp_path, "long", [*rows(8), {"question": "word " * 99, "answer": "yes"}])
    forms = mixture.Forms(0.0, 1.0)
    mix = mixture.open_mixture([long], mixture.Config(forms=forms, shots=4), seed=0, data_dir=tmp_path / "data")
    packing = mixture.Packing(stream(mix, tok))
    for batch in itertools.islice(packing, 9):
        assert batch.tokens.shape == (4, 96)
    counts = mixture.counts(packing)
    assert counts.too_long and counts.shortened and counts.learnt and counts.unusable == 0
    assert counts.learnt + counts.too_long == packing.get_state()["next"]
    assert f"{counts.too_long} too long" in str(counts) and "behind fewer examples than drawn" in str(counts)
    limited = mixture.Packing(stream(mix, tok, prompt=40, target=3))
    for batch in itertools.islice(limited, 3):
        learnt = [np.sum(batch.target & (batch.segment == n), axis=1).max() for n in (1, 2)]
        assert max(learnt) <= 3
    monkeypatch.setattr(mixture, "FRUITLESS", 50)
    with pytest.raises(InputError, match="50 rows in a row cannot be used with length=8"):
        next(mixture.Packing(stream(mix, tok, length=8)))


def test_unusable_rows_are_counted(tmp_path, tok):
    half = write(
        tmp_path, "half", rows(8), reader=lambda row: Example({"question": "?"}, ("a",)) if row["answer"] else None
    )
    packing = mixture.Packing(stream(mixture.open_mixture([half], mixture.Config(), seed=0, data_dir=tmp_path), tok))
    next(packing)
    counts = mixture.counts(packing)
    assert counts.unusable and counts.learnt + counts.unusable == packing.get_state()["next"]


def test_wrong_tasks_are_refused(tmp_path, opened, tok):
    open_one = lambda one: mixture.open_mixture([one], mixture.Config(), seed=0, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match=r"task bad, template 1: no field \{premise\}; there are answer, options"):
        open_one(write(tmp_path, "bad", rows(2), templates=(ASK, Template("{premise}"))))
    with pytest.raises(InputError, match=r"task none: none of the first 2 rows of .* can be used"):
        open_one(write(tmp_path, "none", rows(2), reader=lambda row: None))
    with pytest.raises(InputError, match="task bare: no template"):
        open_one(write(tmp_path, "bare", rows(2), templates=()))
    with pytest.raises(InputError, match="36 rows are fewer than a batch of 64"):
        stream(opened(), tok, batch=64)
    assert str(opened(most_rows=10)) == "2 tasks of 1 clusters (facts), 16 rows (1 tasks with only 10 of their rows)"


# The tasks that there are ---------------------------------------------------------------------------------------------

COLLECTIONS = catalog.COLLECTIONS


@pytest.mark.parametrize(
    ("collection", "cluster"),
    [(of, cluster) for of, tasks in COLLECTIONS.items() for cluster in dict.fromkeys(task.cluster for task in tasks)],
)
def test_nothing_of_a_held_out_cluster_reaches_training(collection, cluster):
    """Neither a task, nor its data, nor a template: of any draw."""
    split = mixture.leave_out(COLLECTIONS[collection], [cluster])
    assert {task.cluster for task in split.held_out} == {cluster}
    data = {task.data.partition("[")[0] for task in split.held_out}
    templates = {template.prompt for task in split.held_out for template in task.templates}
    templates = {prompt for prompt in templates if re.search(r"\w", re.sub(r"\{\w+\}", "", prompt))}  # says something
    assert templates
    chosen = mixture.Plan(split.train, (1000,) * len(split.train), mixture.Config(), 0)
    drawn = [(chosen.tasks[draw.task], draw.template) for draw in map(chosen.draw, range(1024))]
    assert {task.name for task, _ in drawn} == {task.name for task in split.train}
    away = {cluster, *(x for pair in mixture.ALIKE if cluster in pair for x in pair)}
    for task, template in drawn:
        assert task.cluster not in away and task.data.partition("[")[0] not in data
        assert task.templates[template].prompt not in templates


def test_clusters_that_are_alike_are_clusters():
    assert {x for pair in mixture.ALIKE for x in pair} <= {task.cluster for task in COLLECTIONS["flan"]}


def test_select(tmp_path):
    names = lambda *wanted: [task.name for task in catalog.select(wanted)]
    assert names("world") == [task.name for task in world.TASKS]
    assert names("entailment", "follows", "plus") == ["follows", "order", "plus"]  # the world's, and each once
    assert names("flan/paraphrase", "rte")[-1] == "rte"
    assert catalog.select([str(tmp_path / "mine.jsonl")])[0].cluster == "mine"
    with pytest.raises(
        InputError, match=r"no task 'entailmnt'; did you mean entailment\?: expected a file of questions"
    ):
        names("entailmnt")
    with pytest.raises(InputError, match="no tasks: name collections"):
        names()
    with pytest.raises(InputError, match="several tasks have the name 'mine'"):
        names(str(tmp_path / "mine.jsonl"), str(tmp_path / "a" / "mine.jsonl"))
