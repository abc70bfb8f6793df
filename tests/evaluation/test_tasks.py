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
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.likelihood import Likelihood
from rlhf_jax.types import InputError
from tests import tiny
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


def logp(prompt, text, ended=False):
    """The log-probability of a text behind a prompt, and of an EOS behind it, by the network itself."""
    one, tokenizer = model(), model().tokenizer
    before, after = (tokenizers.encode(tokenizer, [part], special=False)[0] for part in (prompt, text))
    whole = np.concatenate([before, after, [tokenizer.eos_token_id] * ended]).astype(np.int32)
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


@pytest.mark.slow
def test_the_same_questions_are_asked_again_of_other_parameters(tmp_path, monkeypatch):
    """Read, ranked and written: nothing is compiled twice, and the answers are those of a model with them."""
    some = [task(tmp_path, OPEN, "sums", metric="exact"), task(tmp_path, ROWS)]
    one, layout, compiled = model(), parallel.layout(), []
    other = dataclasses.replace(one, params=tiny.policy(one.config, 1))
    monkeypatch.setattr(parallel.Pmap, "step", recorded(parallel.Pmap.step, compiled))
    for by in ("read", "auto"):
        cfg = Config(by=by, batch=8, max_new_tokens=2)
        asked = tasks.Evaluation(dataclasses.replace(one, params=None), some, cfg, data_dir=tmp_path / "data")
        programs = len(compiled)
        found = [asked(layout.state(of.params)) for of in (one, other, one)]
        assert len(compiled) == programs
        apart = [tasks.evaluate(of, some, cfg, data_dir=tmp_path / "data") for of in (one, other)]
        assert found == [*apart, apart[0]]
    assert found[0] != found[1]  # where random parameters write, they write something else


def recorded(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


@pytest.mark.slow
def test_answers_are_read_with_what_ends_them(tmp_path):
    """Options are ranked with their EOS; without options each token of the answer has to be the likeliest."""
    (found,) = evaluate(tmp_path, [task(tmp_path, ROWS)], by="read", batch=8)
    right = []
    for n in range(4):
        total = [logp(f"Question: Is {n} even?\nAnswer:", f" {text}", True) for text in ROWS[0]["options"]]
        right.append(np.argmax(total) == n % 2)
    assert [answer.score for answer in found.answers] == right and found.figures["chance"] == 0.5


def test_an_answer_without_options_is_read_token_by_token(tmp_path, monkeypatch):
    likeliest = itertools.cycle([True, False, False, True])
    seen = read_as(monkeypatch, lambda: Likelihood(-1.0, next(likeliest)))
    (found,) = evaluate(tmp_path, [task(tmp_path, OPEN)], by="read")
    assert [answer.score for answer in found.answers] == [1, 0, 0, 1]
    assert [answer.said for answer in found.answers] == [("0",), (), (), ("6",)]
    assert (found.metric, found.figures["chance"]) == ("acc", 0)
    assert [one.continuation[-1] for one in seen] == [model().tokenizer.eos_token_id] * 4
    with pytest.raises(InputError, match="task even: none of 4 questions fits into 9 tokens"):
        evaluate(tmp_path, [task(tmp_path, OPEN)], by="read", length=9)


def read_as(monkeypatch, likelihood_of):
    """Have requests answered by a function; returns those that came."""
    seen = []

    def read(self, requests, params):
        seen.extend(requests)
        return [likelihood_of() for _ in requests]

    monkeypatch.setattr(likelihood.Reader, "__call__", read)
    return seen


def said(monkeypatch, *texts):
    """Have the model write these texts, again and again; returns the prompts that it was asked."""
    asked = []

    def writer(model, prompts, cfg, layout):
        asked.extend(prompts)
        count = itertools.count()
        return lambda params: [[texts[next(count) % len(texts)] for _ in range(cfg.samples)] for _ in prompts]

    monkeypatch.setattr(writing, "Writer", writer)
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
    read_as(monkeypatch, lambda: Likelihood(0.0, True))
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
    for by in ("rank", "read"):
        with pytest.raises(InputError, match=f"reasoning is written, and has no effect with --by {by}"):
            Config(reasoning=True, by=by)
    assert tasks.new_tokens(Config(), 1024) == 32 and tasks.new_tokens(Config(reasoning=True), 1024) == 256
    assert tasks.new_tokens(Config(reasoning=True), 100) == 50 and tasks.new_tokens(Config(max_new_tokens=9), 100) == 9
