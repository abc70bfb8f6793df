"""Tasks put to a model: options ranked as by the network itself, written answers measured, bad tasks refused."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.tasks import Example, Task, Template
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import tasks, writing
from rlhf_jax.evaluation.tasks import Config
from rlhf_jax.types import InputError
from tests.evaluation.models import model

ROWS = [
    {"question": f"Is {n} even?", "options": ["yes", "certainly not"], "answer": n % 2, "rationale": f"{n} is it."}
    for n in range(10)
]
OPEN = [{"question": f"{n}+{n}?", "answer": [str(2 * n), f"{2 * n}.0"]} for n in range(10)]


def task(tmp_path, rows, name="even", **others):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = {"templates": (Template("{question}"),), "train": "train[4:]", "held_out": "train[:4]"}
    return Task(name, "numbers", str(file), **defaults | others)


def evaluate(tmp_path, some, layout=parallel.PMAP, **settings):
    return tasks.evaluate(model(), some, Config(**settings), layout=layout, data_dir=tmp_path / "data")


def logp(prompt, text):
    """The log-probability of a text behind a prompt, by the network itself."""
    one, tokenizer = model(), model().tokenizer
    before, after = (tokenizers.encode(tokenizer, [part], special=False)[0] for part in (prompt, text))
    whole = np.concatenate([before, after])
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(whole)] = whole
    logits = _apply()(one.params, padded, np.arange(128)[None] < len(whole))
    logits = jax.nn.log_softmax(np.asarray(logits[0], np.float32))
    places = np.arange(len(before), len(whole))
    return float(logits[places - 1, whole[places]].sum())


def _apply(found=[]):  # noqa: B006  # compiled once
    found[:] = found or [jax.jit(model().apply)]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_options_are_ranked_by_the_network(tmp_path, chat):
    (none, two) = evaluate(tmp_path, [task(tmp_path, ROWS)], shots=(0, 2), chat=chat, batch=8)
    assert (none.shots, two.shots, two.ranked, two.figures["examples"]) == (0, 2, True, 2)
    nothing = "Question: \nAnswer:" if chat else "<|endoftext|>"
    for result in (none, two):
        chosen = {"acc": [], "acc_norm": [], "acc_calibrated": []}
        for n in range(4):
            prompt = f"Is {n} even?"
            if result.shots:
                prompt = result.prompts[0].replace("Is 0 even?", prompt)
            elif chat:
                prompt = f"Question: {prompt}\nAnswer:"
            options = ROWS[0]["options"]
            total = np.array([logp(prompt, f" {option}") for option in options])
            prior = np.array([logp(nothing, f" {option}") for option in options])
            chosen["acc"].append(np.argmax(total) == n % 2)
            chosen["acc_norm"].append(np.argmax(total / [3, 13]) == n % 2)
            chosen["acc_calibrated"].append(np.argmax(total - prior) == n % 2)
        for name, right in chosen.items():
            assert result.scores[name].value == pytest.approx(np.mean(right)), (name, result.shots)
    assert none.figures["chance"] == 0.5 and none.score == none.scores["acc"]
    assert [answer.right for answer in none.answers] == [("yes",), ("certainly not",)] * 2


@pytest.mark.slow
def test_layouts_agree(tmp_path):
    """Ranked as well as written."""
    some = [task(tmp_path, OPEN, "sums", metric="number"), task(tmp_path, ROWS)]
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2))
    one, mesh = (evaluate(tmp_path, some, layout, batch=8, max_new_tokens=2) for layout in (parallel.PMAP, place))
    assert [result.answers for result in one] == [result.answers for result in mesh]
    assert [(result.task, result.ranked) for result in one] == [("sums", False), ("even", True)]


def said(monkeypatch, *texts):
    """Have the model write these texts, again and again; returns the prompts that it was asked."""
    asked = []

    def answers(model, prompts, cfg, *, layout):
        asked.extend(prompts)
        count = itertools.count()
        return [[texts[next(count) % len(texts)] for _ in range(cfg.samples)] for _ in prompts]

    monkeypatch.setattr(writing, "answers", answers)
    return asked


def test_written_answers(tmp_path, monkeypatch):
    said(monkeypatch, "0\n9", "The answer is 2.0.", "", "so 6")
    sums = task(tmp_path, OPEN, metric="exact")
    (result,) = evaluate(tmp_path, [sums])
    assert result.metric == "exact" and not result.ranked
    assert [answer.score for answer in result.answers] == [1.0, 0.0, 0.0, 0.0]
    assert result.scores["extracted"].value == 0.5  # 0 and 2.0
    assert result.figures["no answer found"] == 0.25
    (result,) = evaluate(tmp_path, [dataclasses.replace(sums, metric="number")])
    assert result.scores["number_flexible"].value == 0.5  # 2 and 6, for 9 is the last of the first
    assert result.scores["number_strict"].value == 0.25
    (result,) = evaluate(tmp_path, [dataclasses.replace(sums, metric="f1")])
    assert [answer.score for answer in result.answers] == [1.0, 0.5, 0.0, pytest.approx(2 / 3)]


def test_a_chain_of_thought_is_written_also_where_there_are_options(tmp_path, monkeypatch):
    some = task(tmp_path, ROWS, hint="Think.")
    said(monkeypatch, "It is. So the answer is yes.", "yes? certainly not", "Hm.", "So the answer is certainly not")
    (result,) = evaluate(tmp_path, [some], reasoning=True, shots=(1,), max_new_tokens=8)
    assert [answer.score for answer in result.answers] == [1.0, 1.0, 0.0, 1.0] and result.metric == "extracted"
    assert "is it. So the answer is" in result.prompts[0] and result.prompts[0].count("Think.") == 2
    (result,) = evaluate(tmp_path, [some], by="write")
    assert result.metric == "exact" and "Think." not in result.prompts[0]


def test_several_samples_vote(tmp_path, monkeypatch):
    asked = said(monkeypatch, *["#### 0", "#### 2", "#### 0", "none"] * 2, *["4", "5", "5", "4"], *["7", "7", "6", "8"])
    some = task(tmp_path, OPEN, metric="number")
    (result,) = evaluate(tmp_path, [some], samples=4, temperature=1.0)
    assert len(asked) == 4
    assert result.score.value == pytest.approx((2 + 1 + 2 + 1) / 16)
    assert result.scores["majority@4"].value == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    pass_at_2 = np.mean([1 - 1 / 6, 1 - 3 / 6, 1 - 1 / 6, 1 - 3 / 6])
    assert result.scores["pass@2"].value == pytest.approx(pass_at_2) and result.scores["pass@4"].value == 1.0
    assert result.scores.keys() == {"number_strict", "number_flexible", "majority@4", "pass@2", "pass@4"}


def test_rows_without_options_are_left_out_and_counted(tmp_path, monkeypatch):
    def rank(model, tokenizer, put, cfg, layout):
        (one,) = put
        prior = {ids.tobytes(): 0.0 for question in one.questions for ids in question.options}
        return [tasks._ranked(one, [np.zeros(2) for _ in one.questions], prior)]

    monkeypatch.setattr(tasks, "_rank", rank)
    (result,) = evaluate(tmp_path, [task(tmp_path, [ROWS[0], *OPEN])])
    assert result.left_out == {"questions left out, without options to rank": 3} and len(result.answers) == 1


@pytest.mark.parametrize(
    ("rows", "others", "settings", "message"),
    [
        (OPEN, {}, {"by": "rank"}, "task even: its questions have no options to rank: ask with --by write"),
        (OPEN[:4], {"held_out": "train[4:]"}, {}, "task even, held-out rows: .*even.jsonl: no rows in split"),
        (OPEN, {"reader": lambda row: None}, {}, r"task even: no usable held-out rows in .*, split 'train\[:4\]': add"),
        (OPEN, {"reader": lambda row: Example({}, ("",))}, {}, "line 1: an answer or option is empty"),
        (OPEN, {"templates": (Template("{premise}"),)}, {}, r"task even, template 0: no field \{premise\}"),
        ([{"question": "Why?"}], {}, {}, "even.jsonl, line 1, field answer: missing"),
        ([{"question": "Why?", "answer": " "}], {}, {}, "even.jsonl, line 1: expected a question, an answer"),
    ],
)
def test_bad_tasks(tmp_path, rows, others, settings, message):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, [task(tmp_path, rows, **others)], **settings)


def test_settings_that_contradict():
    with pytest.raises(InputError, match="samples=4 are all the same at temperature 0"):
        Config(samples=4)
    with pytest.raises(InputError, match="reasoning is written"):
        Config(reasoning=True, by="rank")
    assert tasks.new_tokens(Config(), 1024) == 32 and tasks.new_tokens(Config(reasoning=True), 1024) == 256
    assert tasks.new_tokens(Config(reasoning=True), 100) == 50 and tasks.new_tokens(Config(max_new_tokens=9), 100) == 9
