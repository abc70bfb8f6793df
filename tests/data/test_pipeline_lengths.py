"""What is longer than a row: dialogues lose their oldest turns; the rest is cut, or refused."""

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError
from tests.data.examples import prompt_length, says, segments, turns


def test_demonstrations_truncate_and_refuse(tokenizer):
    def ids(text):
        return tokenizer(text)["input_ids"]

    rows = [
        {"prompt": "a b", "completion": "c"},
        {"prompt": "a b", "completion": "the cat sat on a mat and ate two fish"},
        {"prompt": "the cat sat on a mat and ate two fish", "completion": "c"},
        {"prompt": " \n", "completion": "c"},
        {"prompt": "a", "completion": ""},
        {"prompt": [{"role": "user", "content": ""}], "completion": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
    ]
    length = len(ids("a b")) + 2
    data = pipeline.demonstrations(rows, tokenizer, length=length, batch=1, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=2, truncated=1, empty=4, too_long=1)
    cut = (ids("a b") + ids(rows[1]["completion"]))[:length]
    assert sorted(x for x, _ in segments(data)) == sorted([ids("a b") + ids("c") + [tokenizer.eos_token_id], cut])
    refused = f"5 refused (4 empty, 1 too long for --length {length} (first: row 3))"
    assert str(data.counts) == f"2 rows kept (1 of them truncated), {refused}"


@pytest.mark.parametrize(
    ("roles", "left"),
    [
        ("uau", "u"),
        ("uauau", "uau"),
        ("suauau", "suau"),
        ("suau", "su"),
        ("uuau", "uau"),
        ("auau", "uau"),
        ("uauu", "uu"),
    ],
)
def test_dialogues_lose_their_oldest_turns(tokenizer, roles, left):
    whole = turns(roles)
    lead = whole[:1] if left[0] == "s" else []
    kept = lead + whole[len(lead) - len(left) :]
    length = prompt_length(tokenizer, whole) - 1
    batch, counts = pipeline.every_prompt([{"prompt": whole}, {"prompt": kept}], tokenizer, length=length)
    assert counts == pipeline.Counts(kept=2, truncated=1)
    assert np.array_equal(batch.tokens[0], batch.tokens[1]) and batch.index.tolist() == [0, 1]
    ids = tokenizer_lib.render_prompt(tokenizer, kept)
    assert batch.tokens[0, length - len(ids) :].tolist() == ids


def test_dialogues_are_shortened_by_no_more_than_needed(tokenizer):
    whole = turns("suauauau")
    for n in (1, 3, 5, 7):  # where a user's turn may come first
        kept = [*whole[:1], *whole[n:]]
        batch, counts = pipeline.every_prompt([{"prompt": whole}], tokenizer, length=prompt_length(tokenizer, kept))
        assert batch.mask.all() and batch.tokens[0].tolist() == tokenizer_lib.render_prompt(tokenizer, kept)
        assert counts.truncated == (n > 1)
    length = prompt_length(tokenizer, kept) - 1
    refused = rf"1 refused \(0 empty, 1 too long for {length} tokens \(first: row 1\)\)"
    with pytest.raises(InputError, match=rf"0 rows kept \(0 of them truncated\), {refused}"):
        pipeline.every_prompt([{"prompt": whole}], tokenizer, length=length)


def test_a_prompt_of_text_is_never_shortened(tokenizer):
    rows = [{"prompt": says(0, 9)}, {"prompt": "a"}]
    _, counts = pipeline.every_prompt(rows, tokenizer, length=prompt_length(tokenizer, rows[0]["prompt"]) - 1)
    assert counts == pipeline.Counts(kept=1, too_long=1)


def test_ranked_dialogues_are_shortened_until_the_longest_response_fits(tokenizer):
    whole, responses = turns("uauau"), [says(50, 1), says(51, 4)]
    row = {"prompt": whole, "responses": responses, "ranks": [1, 0]}
    kept = whole[2:]
    start = tokenizer_lib.render_prompt(tokenizer, kept)
    ends = [tokenizer_lib.render_completion(tokenizer, kept, text) for text in responses]
    length = len(start) + len(ends[1])
    data = pipeline.rankings([row], tokenizer, length=length, batch=1, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=1, truncated=1)
    (batch,) = data
    assert batch.tokens[0, 1].tolist() == start + ends[1] and batch.start.tolist() == [len(start)]
    assert batch.tokens[0, 0][batch.mask[0, 0]].tolist() == start + ends[0]
    least = prompt_length(tokenizer, whole[-1:]) + len(ends[1]) - 1
    with pytest.raises(InputError, match="1 too long"):
        pipeline.rankings([row], tokenizer, length=least, batch=1, seed=0)


def test_demonstrated_dialogues_are_shortened_then_cut_on_the_right(tokenizer):
    whole = turns("uaua")
    rows = [{"messages": whole}, {"prompt": whole[:-1], "completion": whole[-1]["content"]}]
    start = tokenizer_lib.render_prompt(tokenizer, whole[2:3])
    end = tokenizer_lib.render_completion(tokenizer, whole[2:3], whole[3]["content"])
    ids, learn = start + end, [False] * len(start) + [True] * len(end)
    for length in (len(ids), len(ids) - 2):
        data = pipeline.demonstrations(rows, tokenizer, length=length, batch=1, seed=0, epochs=1)
        assert data.counts == pipeline.Counts(kept=2, truncated=2)
        assert list(segments(data)) == [(ids[:length], learn[:length])] * 2
    with pytest.raises(InputError, match="2 too long"):
        pipeline.demonstrations(rows, tokenizer, length=len(start), batch=1, seed=0)
