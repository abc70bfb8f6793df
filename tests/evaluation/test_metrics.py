"""Measures of answers: by hand, and by the published cases."""

import math
import sys
from decimal import Decimal

import numpy as np
import pytest

from rlhf_jax.evaluation import metrics
from rlhf_jax.types import InputError
from tests.oracles import Case


def published(name: str) -> tuple[Case, dict, dict]:
    case = Case(name)
    return case, case.raw["inputs"], case.raw["expected"]


def test_the_published_multiple_choice():
    case, given, _ = published("multiple_choice")
    pairs = list(zip(given["logprob"], given["choices"], strict=True))
    plain = [metrics.best(logp) for logp, _ in pairs]
    norm = [metrics.best_by_characters(logp, options) for logp, options in pairs]
    acc, acc_norm = (np.mean([a == b for a, b in zip(chosen, given["gold"], strict=True)]) for chosen in (plain, norm))
    case.check(prediction=plain, prediction_norm=norm, acc=acc, acc_norm=acc_norm)


def test_the_published_bits_per_byte():
    case, given, _ = published("bits_per_byte")
    bits = metrics.bits_per_byte(given["nll"], given["documents"])
    case.check(bits_per_byte=bits, byte_perplexity=2**bits)


def test_the_published_majority_vote():
    case, given, _ = published("majority_vote")
    for tie in ("random", "first"):
        rows = [
            [metrics.majority(votes[:k], [gold], tie) for k in given["k"]]
            for votes, gold in zip(given["answers"], given["gold"], strict=True)
        ]
        case.check(**{f"{tie}_tie": rows, f"mean_{tie}_tie": np.mean(rows, axis=0)})


def test_the_published_pass_at_k():
    case, given, _ = published("pass_at_k")
    rows = [[metrics.pass_at(k, n, c) for k in given["k"]] for n, c in zip(given["n"], given["c"], strict=True)]
    case.check(**{"pass": rows, "mean": np.mean(rows, axis=0)})


def test_the_published_calibration_error():
    case, given, _ = published("calibration_error")
    confidence, correct = np.array(given["confidence"]), np.array(given["correct"], bool)
    found = metrics.calibration(confidence, correct, given["bins"])
    case.check(
        ece=found.expected_error,
        mce=found.largest_error,
        bin_count=found.count,
        bin_accuracy=found.accuracy,
        bin_confidence=found.confidence,
        brier=metrics.brier(confidence, correct),
    )


def test_options():
    assert metrics.best([-2.5, -0.5, -0.5]) == 1  # the first of equal ones
    assert metrics.best_by_characters([-3.0, -4.0], ["no", "maybe"]) == 1  # -1.5 against -0.8
    assert metrics.best_by_characters([-1.0, -1.4], ["é", "èè"]) == 1  # characters, not bytes


def test_bits_a_byte_of_all_texts_together():
    assert metrics.bits_per_byte([math.log(2) * 3, math.log(2)], ["é", "ab"]) == pytest.approx(1.0)


def test_calibration():
    found = metrics.calibration(np.array([0.0, 0.5, 0.75]), np.array([True, False, True]), bins=2)
    assert found.count.tolist() == [2, 1]  # an edge belongs to the bin below it
    assert found.expected_error == pytest.approx((2 * abs(0.5 - 0.25) + abs(1 - 0.75)) / 3)
    empty = metrics.calibration(np.array([0.9]), np.array([True]), bins=4)
    assert empty.largest_error == pytest.approx(0.1) and np.isnan(empty.accuracy[0])


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat, sat!", "cat sat"), ("(A)", "a"), ("an", "an"), ("+", "+"), ("Élan", "élan"), (" ", "")],
)
def test_normalize(text, normal):
    assert metrics.normalize(text) == normal


def test_words():
    assert metrics.exact("the yes.", ["no", "Yes"]) == 1.0 and metrics.exact("yes no", ["yes"]) == 0.0
    assert metrics.exact("B", ["(B)"]) == 1.0 and metrics.exact("", ["(A)"]) == 0.0
    assert metrics.f1("a red red fox", ["the red fox", "dog"]) == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.f1("", ["fox"]) == metrics.f1("dog", ["fox"]) == 0.0


def test_what_a_text_states():
    assert metrics.stated("It was so. So the answer is (B).") == "(B)"
    assert metrics.stated("The answer is no. But then the answer is: 3.5. So it goes.") == "3.5"
    assert metrics.stated("So the answer is yes\n\nQ: next") == "yes"
    assert metrics.stated("The answer is **oven**.") == "oven"
    assert metrics.stated("It is yes.") is None
    assert metrics.stated("The answer is") is None


def test_the_option_that_a_text_names():
    assert metrics.named("Not (A), so (B) it is", ["(A)", "(B)"]) == "(B)"
    assert metrics.named("notable, yesterday", ["no", "yes"]) is None  # whole words alone
    assert metrics.named("the top piece", ["top", "top piece"]) == "top piece"  # the longer of two at one place
    assert metrics.option("NO.", ["no", "yes"]) == "no"
    assert metrics.option("yes, not no", ["no", "yes"]) == "no"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("2 + 3 = 5\n#### 1,005", 1005, 1005),
        ("So the answer is $7.50. I had 3.", "7.50", 3),
        ("It is 12 or -4", None, -4),
        ("#### 5\n\nQ: 2 and 9?", 5, 9),
        ("none", None, None),
    ],
)
def test_numbers(text, strict, flexible):
    for form, expected in (("strict", strict), ("flexible", flexible)):
        assert metrics.number(text, form) == (None if expected is None else Decimal(expected)), form


def test_votes():
    assert metrics.majority(["a", "b", None, "b"], ["b"], "random") == 1.0
    assert metrics.majority(["a", "b", "c"], ["b", "c"], "random") == pytest.approx(2 / 3)
    assert metrics.majority(["a", "b"], ["b"], "first") == 0.0
    assert metrics.majority([None, None], ["b"], "random") == 0.0


def test_pass_at_k():
    assert metrics.pass_at(2, 4, 1) == pytest.approx(0.5)  # of 6 pairs 3 have it
    assert metrics.pass_at(3, 4, 2) == 1.0 and metrics.pass_at(1, 4, 0) == 0.0


def test_errors_by_bootstrap():
    values = np.random.default_rng(3).random(400)
    score = metrics.score(values)
    assert score.value == pytest.approx(values.mean())
    assert score.error == pytest.approx(values.std() / 20, rel=0.1)  # of a mean of 400
    assert score.low == pytest.approx(score.value - 1.96 * score.error, abs=0.005)
    assert score == metrics.score(values)
    several = metrics.score(values * 4, np.full(400, 4))  # four samples a question, all alike: no more is known
    assert several.value == pytest.approx(score.value) and several.error == pytest.approx(score.error)
    assert metrics.score([3.0, 1.0], [1, 3]).value == 1.0  # by what they count
    assert str(metrics.score([1.0, 1.0])) == "1.000 (1.000 to 1.000)"


@pytest.mark.parametrize(("measure", "package"), [("rouge", "rouge-score"), ("bleu", "sacrebleu")])
def test_libraries_that_are_missing(monkeypatch, measure, package):
    for module in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'rlhf_jax\[eval\]'"):
        getattr(metrics, measure)("a", ["b"])


def test_rouge():
    pytest.importorskip("rouge_score")
    assert metrics.rouge("the cats sat", ["a dog", "the cat sat down"]) == pytest.approx(2 * 3 / (3 + 4))


def test_bleu():
    pytest.importorskip("sacrebleu")
    assert metrics.bleu("the cat sat on the mat", ["a dog", "the cat sat on the mat"]) == pytest.approx(1.0)
