"""What an answer must hold, how the order of the page is undone, and which rows training reads from it."""

from typing import Any

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.people import forms

GOOD = [
    {"overall": 6, "helpful": 5, "honest": 7, "harmless": 7},
    {"overall": 2, "helpful": 2, "honest": 1, "harmless": 7},
]


def test_a_ranking_is_stored_without_gaps():
    answer = {"ranks": [2, 0, 2, 3], "ratings": None, "extra": 1}
    assert forms.checked("rank", 4, answer, "none")["ranks"] == [1, 0, 1, 2]


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"ranks": [0]}, "ranks: expected 2, one per response"),
        ({"ranks": [0, 1, 0]}, "ranks: expected 2"),
        ({"ranks": [0, None]}, "never placed"),
        ({"ranks": [0, 2]}, "from 0 to 1"),
        ({"ranks": [0, True]}, "from 0 to 1"),
        ({"ranks": [0, 1], "ratings": GOOD[:1]}, "ratings: expected 2"),
        ({"ranks": [0, 1], "ratings": [GOOD[0], GOOD[1] | {"overall": 8}]}, r"ratings\[1\].overall: .* from 1 to 7"),
        ({"ranks": [0, 1], "ratings": [GOOD[0], GOOD[1] | {"honest": 0}]}, r"ratings\[1\].honest"),
        ({"ranks": [0, 1], "ratings": [GOOD[0], {"overall": 1}]}, r"ratings\[1\]: expected a rating of helpful"),
        ({"ranks": [0, 1], "ratings": [GOOD[0], GOOD[1] | {"flags": ["rude"]}]}, "flags: expected names"),
        ({"ranks": [0, 1], "ratings": GOOD, "confidence": 10}, "confidence: .* from 1 to 9"),
        ({"ranks": [0, 1], "ratings": GOOD, "note": "\ud800"}, "surrogate"),
        ({"ranks": [0, 1], "ratings": GOOD, "prompt_flags": ["odd"]}, "prompt_flags"),
        ({"skip": "lunch"}, "skip: expected one of"),
        (None, "expected an object"),
    ],
)
def test_a_wrong_ranking_is_refused(answer: Any, message: str):
    with pytest.raises(InputError, match=message):
        forms.checked("rank", 2, answer, "all")


def test_a_contradiction_is_asked_once_and_both_are_stored():
    answer: dict = {"ranks": [1, 0], "ratings": GOOD}
    with pytest.raises(forms.Contradiction) as caught:
        forms.checked("rank", 2, answer, "all")
    assert caught.value.pairs == [(0, 1)]
    stored = forms.checked("rank", 2, answer | {"confirmed": True}, "all")
    assert stored["ranks"] == [1, 0] and stored["ratings"] == GOOD and stored["confirmed"]
    assert not forms.checked("rank", 2, {"ranks": [0, 0], "ratings": GOOD}, "all")["confirmed"]  # a tie is none


def test_a_verdict_is_one_of_four():
    assert forms.checked("arena", 2, {"verdict": "bad", "note": "x", "models": 1}, "all") == {
        "verdict": "bad",
        "note": "x",
    }
    for wrong in ({}, {"verdict": None}, {"verdict": "third"}, {"verdict": 0}, {"verdict": ["tie"]}, {"verdict": {}}):
        with pytest.raises(InputError, match=r"^verdict: expected one of first, second, tie, bad$"):
            forms.checked("arena", 2, wrong, "all")


def test_the_order_shown_is_undone():
    shown = [2, 0, 1]  # in the first place stood the last response
    answer = {"ranks": [0, 1, 2], "ratings": [{"overall": 7}, {"overall": 4}, {"overall": 1}], "best": 0}
    restored = forms.restored(answer, shown)
    assert restored == {"ranks": [1, 2, 0], "ratings": [{"overall": 4}, {"overall": 1}, {"overall": 7}], "best": 2}
    assert forms.displayed(restored, shown) == answer
    assert forms.restored({"strength": -3}, [1, 0]) == {"strength": 3}
    assert forms.restored({"strength": -3}, [0, 1]) == {"strength": -3}
    for given, found in (("first", "second"), ("second", "first"), ("tie", "tie"), ("bad", "bad")):
        assert forms.restored({"verdict": given}, [1, 0]) == {"verdict": found}
        assert forms.restored({"verdict": given}, [0, 1]) == {"verdict": given}


@pytest.mark.parametrize(
    "task, answer, expected",
    [
        ("rank", {"ranks": [1, 0]}, [("rankings", {"responses": ["a", "b"], "ranks": [1, 0]})]),
        ("compare", {"strength": -2}, [("rankings", {"chosen": "a", "rejected": "b"})]),
        ("compare", {"strength": 4}, [("rankings", {"chosen": "b", "rejected": "a"})]),
        ("compare", {"strength": 0}, [("rankings", {"responses": ["a", "b"], "ranks": [0, 0]})]),
        ("best", {"best": 1}, [("rankings", {"responses": ["a", "b"], "ranks": [1, 0]})]),
        ("arena", {"verdict": "first"}, [("rankings", {"responses": ["a", "b"], "ranks": [0, 1]})]),
        ("arena", {"verdict": "second"}, [("rankings", {"responses": ["a", "b"], "ranks": [1, 0]})]),
        ("arena", {"verdict": "tie"}, [("rankings", {"responses": ["a", "b"], "ranks": [0, 0]})]),
        ("arena", {"verdict": "bad"}, [("rankings", {"responses": ["a", "b"], "ranks": [0, 0]})]),
        ("arena", {"skip": "unclear"}, []),
        ("demonstrate", {"text": "c", "edited": None}, [("demonstrations", {"completion": "c"})]),
        (
            "demonstrate",
            {"text": "c", "edited": 1},
            [
                ("demonstrations", {"completion": "c"}),
                ("rankings", {"responses": ["c", "b", "a"], "ranks": [0, 1, 2]}),
            ],
        ),
        ("rank", {"skip": "unclear"}, []),
    ],
)
def test_rows(task: str, answer: dict, expected: list):
    rows = list(forms.rows(task, "p", ["a", "b"], answer))
    assert rows == [(kind, {"prompt": "p"} | row) for kind, row in expected]
