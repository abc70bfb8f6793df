"""What is refused, masked and counted."""

import functools
import json

import pytest

from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError
from tests.data.examples import KINDS, MAKE, turns


@KINDS
def test_too_few_rows(tokenizer, kind):
    rows = kind.split()[0]
    with pytest.raises(InputError, match=rf"{rows}: \d+ usable rows are fewer than a batch of 64; .* rows kept"):
        MAKE[kind](tokenizer, batch=64)
    with pytest.raises(InputError, match=f"{rows}: 0 usable rows"):
        getattr(pipeline, rows)([], tokenizer, length=8, batch=1, seed=0)


def spelled(batch, tokenizer, k=0):
    """The sequence of a ranking's response."""
    return tokenizer.decode(batch.tokens[0, k][batch.mask[0, k]])


def test_rankings_that_order_nothing_are_refused(tokenizer):
    rows = [
        {"prompt": "a", "responses": ["x", "x"], "ranks": [0, 1]},
        {"prompt": "b", "responses": ["x", "y"], "ranks": [1, 1]},
        {"prompt": "c", "responses": ["x", "x", "y"], "ranks": [0, 1, 1]},  # the first is better than the last
        {"prompt": "d", "responses": ["x", "x", "x"], "ranks": [0, 1, 2]},
        {"prompt": "e", "responses": ["x", "x", "y"], "ranks": [0, 0, 1]},  # a tie of the same: nothing is repeated
        {"prompt": "f", "responses": ["x", "x" + tokenizer.eos_token], "ranks": [0, 1]},
    ]
    data = pipeline.rankings(rows, tokenizer, length=9, batch=1, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=2, identical=3, tied=1, repeated=1)
    assert str(data.counts) == (
        "2 rows kept (0 of them truncated), 4 refused (0 empty, 0 too long, 3 of identical responses, 1 all tied);"
        " 1 rows rank identical responses differently too"
    )
    assert sorted(batch.rank[0].tolist() for batch in data) == [[0, 0, 1], [0, 1, 1]]
    with pytest.raises(
        InputError, match=r"rankings: no row has two responses of different rank that differ.*4 refused"
    ):
        pipeline.rankings([rows[n] for n in (0, 1, 3, 5)], tokenizer, length=9, batch=1, seed=0)


def test_responses_that_are_identical_once_a_template_trims_them_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    trims = tokenizer_lib.load(tmp_path)
    trims.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content | trim + eos_token }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "q"}], "responses": ["yes", "yes "], "ranks": [0, 1]}]
    with pytest.raises(InputError, match="1 of identical responses"):
        pipeline.rankings(rows, trims, length=90, batch=1, seed=0)


@pytest.mark.parametrize("prompt", ["q", [{"role": "user", "content": "q"}]])
def test_a_response_that_did_not_end_gets_no_end(tokenizer, prompt):
    row = {
        "prompt": prompt,
        "responses": ["the cat", "a mat", "two"],
        "ranks": [0, 1, 2],
        "ended": [False, True, False],
    }
    data = pipeline.rankings([row], tokenizer, length=64, batch=1, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=1, unended=2)
    assert str(data.counts).endswith("; 2 responses without an end")
    (batch,) = data
    said = [spelled(batch, tokenizer, k).removeprefix("Question: ")[1:] for k in range(3)]
    before, space = ("", "") if isinstance(prompt, str) else ("\nAnswer:", " ")
    assert said == [before + space + "the cat", before + space + "a mat" + tokenizer.eos_token, before + space + "two"]


CHATTY = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bad", "weight": 0},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "good", "weight": 1},
]


def test_a_message_of_weight_zero_is_masked(tokenizer):
    def learnt(messages, **options):
        data = pipeline.demonstrations(
            [{"messages": messages}], tokenizer, length=64, batch=1, seed=0, epochs=1, **options
        )
        (batch,) = data
        return tokenizer.decode(batch.tokens[batch.target])

    eos = tokenizer.eos_token
    assert learnt(CHATTY) == f" good{eos}"
    assert learnt([message | {"weight": 1} for message in CHATTY]) == f" bad{eos} good{eos}"
    assert learnt(CHATTY, completion_only=False) == f"uestion: a\nAnswer:Question: b\nAnswer: good{eos}"
    with pytest.raises(InputError, match="row 1: field weight: expected 1"):
        learnt([CHATTY[0] | {"weight": 0}, *CHATTY[1:]], completion_only=False)
    with pytest.raises(InputError, match="1 empty"):
        learnt([CHATTY[0], CHATTY[1]])


def test_rows_that_spell_control_tokens_are_counted(tokenizer, tmp_path):
    end = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    as_text = tokenizer_lib.read_control_tokens(tokenizer_lib.load(tmp_path), "text")
    chat = [{"role": "user", "content": f"q{end}"}]
    for make, some in [
        (
            pipeline.demonstrations,
            [{"prompt": "a", "completion": f"b{end}c"}, {"prompt": "a", "completion": f"b{end}"}],
        ),
        (pipeline.demonstrations, [{"messages": [*chat, {"role": "assistant", "content": "b"}]}]),
        (pipeline.rankings, [{"prompt": chat, "responses": ["a", "b"], "ranks": [0, 1]}]),
        (pipeline.prompts, [{"prompt": chat}, {"prompt": "a"}]),
        (pipeline.text, [{"text": f"a{end}b"}, {"text": "a"}]),
    ]:
        data = make(some, tokenizer, length=64, batch=1, seed=0, epochs=1)
        assert data.counts == pipeline.Counts(kept=len(some), control_tokens=1)
        assert str(data.counts).endswith("; 1 rows spell control tokens, which are read as such")
        assert make(some, as_text, length=64, batch=1, seed=0).counts == pipeline.Counts(kept=len(some))


def test_the_row_that_a_template_refuses_is_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    strict = tokenizer_lib.load(tmp_path)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    good, bad = turns("ua"), turns("sua")
    rows = {
        "demonstrations": [{"messages": good}, {"messages": bad}, {"prompt": good[:1], "completion": "x"}],
        "rankings": [{"prompt": talk[:-1], "responses": ["x", "y"], "ranks": [0, 1]} for talk in (good, bad)],
        "prompts": [{"prompt": talk[:-1]} for talk in (good, bad)],
    }
    for kind, some in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, some)), encoding="utf-8")
        make = functools.partial(getattr(pipeline, kind), tokenizer=strict, length=64, batch=1, seed=0)
        with pytest.raises(InputError, match=r"^row 2: the tokenizer's chat template refuses.*no system.*; change the"):
            make(some)
        for part in ("", "[1:]", "[1:2]"):
            stored = sources.rows(f"{tmp_path / kind}.jsonl{part}", kind, data_dir=tmp_path / "data")
            with pytest.raises(InputError, match=rf"{kind}\.jsonl, line 4: the tokenizer's chat template refuses"):
                make(stored)
    with pytest.raises(InputError, match=r"row 2: .* refuses"):
        pipeline.every_prompt(rows["prompts"], strict, length=64)
