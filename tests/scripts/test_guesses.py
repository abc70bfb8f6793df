"""Tests of scripts/guesses.py: what is guessed, and what is counted."""

import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from scripts import guesses
from tests import tiny


def test_a_guess_is_what_followed_the_last_time():
    row = [1, 2, 3, 1, 2, 4, 1, 2]
    assert guesses.follow(row, 2) == [4, 1, 2]
    assert guesses.follow(row, 3) == []  # 4 1 2 stood nowhere before
    assert guesses.follow([7, 7], 1) == [7]  # the place before, which the last token itself follows
    assert guesses.follow([7], 1) == guesses.follow([7], 2) == []


@pytest.mark.parametrize(
    ("prompt", "answer", "most", "found"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 4, (3, 1, 1)),  # 2 3 4 hold, and the answer ends with them
        ([1, 2, 3, 4], [1, 2, 3, 4], 1, (3, 2, 2)),  # 2 holds, 3 is drawn behind it; 4 holds
        ([1, 2, 3, 4], [1, 5, 6], 4, (2, 2, 1)),  # 2 does not, 5 is drawn in its place; nothing followed 5
        ([1], [2], 4, (0, 0, 0)),
    ],
)
def test_a_step_gives_the_guesses_that_hold_and_one_token_more(prompt, answer, most, found):
    assert guesses.count(prompt, answer, 1, most) == found


def test_steps_without_a_guess_cost_as_much_as_ever():
    assert guesses.Found(tokens=30, steps=10, guessing=0).times_as_fast(5.0) == 3.0
    assert guesses.Found(tokens=30, steps=10, guessing=5).times_as_fast(2.0) == 2.0


@pytest.mark.slow
def test_both_tables_are_of_the_model(tmp_path, capsys):
    tokenizer = lib.train(["Question: hello, you?\nAnswer: and you?"] * 9, 280, tmp_path)
    config = models.gpt(1, 16, 2, vocab_size=280, max_length=96)
    model = models.Model(config, tiny.policy(config), tokenizer, models.bind(models.Transformer(config)))
    models.save(model, model.params, tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello, you and you?"}\n' * 3)
    cfg = guesses.Config(
        model=tmp_path / "model",
        data=str(tmp_path / "prompts.jsonl"),
        data_dir=tmp_path,
        temperature=0.0,
        prompt_length=40,
        rows=(2,),
        guesses=(2,),
        passes=1,
        timed=1,
    )
    result = guesses.main(cfg)
    assert len(result["seconds"][2]) == 2 and min(result["seconds"][2]) > 0
    assert all(found.tokens == 3 * 15 for found in result["counts"].values())  # of 16 each; none ends it early
    assert (
        capsys.readouterr().out.count("\n|") == 2 + 2 + 3
    )  # less the first: two heads, a line of rows, three of guesses
