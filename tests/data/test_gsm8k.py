"""Tests of rlhf_jax.data.gsm8k: which number a text comes to, and what that is worth."""

import itertools
from collections import Counter
from decimal import Decimal

import pytest

from rlhf_jax.data import gsm8k, json_lines
from rlhf_jax.types import InputError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 apples and 4 pears are 7 fruits.\n#### 7", "7"),
        ("#### 7 because 3 + 4 = 7 and not 8", "7"),
        ("#### 1\n#### 2", "2"),
        ("####-1,234.50.", "-1234.5"),
        ("7 #### none", None),
        ("So it is 7.", "7"),
        ("$1,234,567.", "1234567"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("it falls to -5 degrees", "-5"),
        ("9-5", "5"),
        ("(9)-5", "5"),
        ("9 = -5", "-5"),
        ("costs $0.50", "0.5"),
        (".5", "0.5"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("#### 1,0005", "1"),
        ("5%", "5"),
        ("\\boxed{72}", "72"),
        ("x2", "2"),
        ("٣", None),
        ("", None),
        ("none - at all, $.", None),
        ("9" * 6000, "9" * 6000),
    ],
)
def test_final_number(text, number):
    assert gsm8k.final_number(text) == (None if number is None else Decimal(number))


def test_reward_goes_to_the_same_number_however_it_is_spelled():
    for response in ("#### 1200", "It is $1,200.00.", "1200"):
        assert gsm8k.reward("1,200", response) == 1.0
    for response in ("#### 1201", "1,200 or rather 1,201", "-1200", "#### ", "twelve hundred", ""):
        assert gsm8k.reward("1,200", response) == 0.0


def test_row_becomes_a_demonstration_with_its_answer():
    row = {"question": "What are 2 and 3?", "answer": "They are 2+3=<<2+3=5>>5.\n#### 5"}
    assert gsm8k.read(row, "line 1", Counter()) == {
        "prompt": [{"role": "user", "content": "What are 2 and 3?"}],
        "completion": "They are 2+3=5.\n#### 5",
        "answer": "5",
    }
    for answer in ("5", "#### five", "5 ####"):
        with pytest.raises(InputError, match=r"line 1, field answer: expected #### and a number at its end, got"):
            gsm8k.read({"question": "q", "answer": answer}, "line 1", Counter())


def test_responses_are_scored_by_the_answer_to_their_prompt():
    ask = {text: [{"role": "user", "content": text}] for text in ("2 and 3?", "3 and 4?")}
    score = gsm8k.score_text([{"prompt": ask["2 and 3?"], "answer": "5"}, {"prompt": ask["3 and 4?"], "answer": "7"}])
    assert [score(ask["2 and 3?"], text) for text in ("#### 5", "#### 7")] == [1.0, 0.0]
    assert [score(ask["3 and 4?"], text) for text in ("#### 5", "#### 7")] == [0.0, 1.0]


def test_prompts_without_answers_cannot_be_checked():
    with pytest.raises(InputError, match="the prompts come without answers to check responses by: name them as gsm8k"):
        gsm8k.score_text([{"prompt": "2 and 3?", "answer": "5"}, {"prompt": "3 and 4?"}])


@pytest.mark.slow
def test_every_published_answer_is_worth_its_reward(shared):
    path = shared / "data" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared/data/gsm8k_train.jsonl")

    rows = [gsm8k.read(row, where, Counter()) for where, row in json_lines.json_values(path)]
    score = gsm8k.score_text(rows)
    assert all(score(row["prompt"], row["completion"]) == 1.0 for row in rows)
    assert not any("<<" in row["completion"] for row in rows)
    wrong = [score(row["prompt"], other["completion"]) for row, other in itertools.pairwise(rows)]
    assert sum(wrong) < 0.02 * len(rows)
