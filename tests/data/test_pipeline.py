"""Tests of rlhf_jax.data.pipeline: what stands in the batches of each kind of rows."""

import functools

import numpy as np
import pytest

from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError, Prompts, Rankings, Tokens
from tests.data.examples import DEMONSTRATIONS, MAKE, TEXTS, WORDS, same, segments


def test_text_packs_each_document_once_and_whole(tokenizer):
    long = " ".join(WORDS * 3)
    data = pipeline.text([*TEXTS, {"text": ""}, {"text": long}], tokenizer, length=32, batch=2, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=41, empty=1)
    batches = list(data)
    assert len(batches) == data.steps
    for batch in batches:
        assert isinstance(batch, Tokens)
        assert batch.tokens.shape == batch.segment.shape == batch.target.shape == (2, 32)
        assert (batch.tokens.dtype, batch.segment.dtype, batch.target.dtype) == (np.int32, np.int32, bool)
    found = list(segments(batches))
    assert all(target == [False] + [True] * (len(ids) - 1) for ids, target in found)
    end = [tokenizer.eos_token_id]
    whole = tokenizer(long)["input_ids"] + end
    expected = [tokenizer(row["text"])["input_ids"] + end for row in TEXTS]
    expected += [whole[at : at + 32] for at in range(0, len(whole), 32)]
    assert sorted(ids for ids, _ in found) == sorted(expected)


def text_of(rows, tokenizer):
    return list(pipeline.text(rows, tokenizer, length=24, batch=4, seed=3, epochs=1))


def test_documents_are_tokenised_once(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("\n\n".join(row["text"] for row in TEXTS))
    rows = sources.rows(str(tmp_path / "some.txt"), "text", data_dir=tmp_path / "data")
    part = sources.rows(str(tmp_path / "some.txt[:50%]"), "text", data_dir=tmp_path / "data")
    expected, expected_part = text_of(TEXTS, tokenizer), text_of(TEXTS[:20], tokenizer)
    other = tokenizer_lib.train(["dog"] * 3, 258, tmp_path / "tokenizer")
    expected_other = text_of(TEXTS, other)
    assert all(map(same, text_of(rows, tokenizer), expected))
    assert all(map(same, text_of(part, tokenizer), expected_part))  # a slice has its own
    assert all(map(same, text_of(rows, other), expected_other))  # as has another tokenizer
    monkeypatch.setattr(tokenizer_lib, "encode", None)
    for again, first in ((rows, expected), (part, expected_part)):
        assert all(map(same, text_of(again, tokenizer), first))
    assert all(map(same, text_of(rows, other), expected_other))


def test_documents_are_read_where_nothing_can_be_kept(tokenizer, tmp_path):
    (tmp_path / "some.txt").write_text("\n\n".join(row["text"] for row in TEXTS))
    rows = sources.rows(str(tmp_path / "some.txt"), "text", data_dir=tmp_path / "data")
    rows.folder = tmp_path / "some.txt" / "no folder"
    assert all(map(same, text_of(rows, tokenizer), text_of(TEXTS, tokenizer)))


def test_text_is_packed_densely(tokenizer):
    batches = list(pipeline.text(TEXTS * 20, tokenizer, length=64, batch=1, seed=0, epochs=1))
    assert np.mean([batch.segment > 0 for batch in batches]) > 0.97


@pytest.mark.parametrize("pack", [True, False])
def test_demonstrations_learn_the_completion_alone(tokenizer, pack):
    data = MAKE["demonstrations"](tokenizer, epochs=1, pack=pack)
    assert data.counts == pipeline.Counts(kept=40)
    assert data.rows == 40 if not pack else data.rows < 30
    expected = []
    for row in DEMONSTRATIONS:
        prompt = row["prompt"] if "prompt" in row else row["messages"][:1]
        completion = row["completion"] if "prompt" in row else row["messages"][1]["content"]
        start = tokenizer_lib.render_prompt(tokenizer, prompt)
        end = tokenizer_lib.render_completion(tokenizer, prompt, completion)
        expected.append((start + end, [False] * len(start) + [True] * len(end)))
    assert sorted(segments(data)) == sorted(expected)


def test_demonstrations_can_learn_all_tokens(tokenizer):
    data = MAKE["demonstrations"](tokenizer, epochs=1, completion_only=False)
    found = list(segments(data))
    assert len(found) == 40 and all(target == [False] + [True] * (len(ids) - 1) for ids, target in found)


def test_rankings(tokenizer):
    rows = [
        {"prompt": "a", "responses": ["b", "c d", ""], "ranks": [2, 0, 2]},
        {"prompt": "a b", "responses": [" ".join(WORDS), "x", "y", "z"], "ranks": [0, 1, 2, 3]},
        {"prompt": "", "responses": ["b", "c"], "ranks": [0, 1]},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["b", "c"], "ranks": [1, 0]},
    ]
    length = len(tokenizer_lib.render_prompt(tokenizer, rows[3]["prompt"])) + 3
    data = pipeline.rankings(rows, tokenizer, length=length, batch=2, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=2, empty=1, too_long=1)
    (batch,) = data
    assert isinstance(batch, Rankings)
    assert batch.tokens.shape == batch.mask.shape == (2, 4, length)
    assert (batch.tokens.dtype, batch.mask.dtype, batch.rank.dtype) == (np.int32, bool, np.int32)
    order = np.argsort(batch.rank[:, 0])  # the fourth row has rank 1 first, the first 2
    assert batch.rank[order].tolist() == [[1, 0, -1, -1], [2, 0, 2, -1]]
    for b, row in zip(order, (rows[3], rows[0]), strict=True):
        start = tokenizer_lib.render_prompt(tokenizer, row["prompt"])
        for k in range(4):
            n = int(batch.mask[b, k].sum())
            expected = []
            if k < len(row["responses"]):
                expected = start + tokenizer_lib.render_completion(tokenizer, row["prompt"], row["responses"][k])
            assert batch.tokens[b, k, :n].tolist() == expected and not batch.mask[b, k, n:].any()
    assert next(iter(MAKE["rankings"](tokenizer))).rank.shape == (4, 4)  # the most that the source has


def test_rankings_whose_prompts_are_read_once(tokenizer):
    """All responses begin in one column, behind prompts that are padded on the left to the longest."""
    rows = [
        {"prompt": "a b c", "responses": ["b", "c d"], "ranks": [1, 0]},
        {"prompt": "a", "responses": ["b", "c d e", ""], "ranks": [2, 0, 1]},
    ]
    asked = []
    read = functools.partial(pipeline.rankings, rows, tokenizer, length=99, batch=2, seed=None, epochs=1)
    (plain,) = read()
    (batch,) = read(shares=lambda *sizes: asked.append(sizes) or True)
    prompts = [tokenizer_lib.render_prompt(tokenizer, row["prompt"]) for row in rows]
    answers = [[tokenizer_lib.render_completion(tokenizer, row["prompt"], x) for x in row["responses"]] for row in rows]
    prefix, answer = max(map(len, prompts)), max(len(x) for row in answers for x in row)
    assert asked == [(prefix, answer, 3)]
    assert batch.prefix == prefix and batch.start.tolist() == [prefix] * 2
    assert batch.tokens.shape == batch.mask.shape == (2, 3, prefix + answer)
    assert plain.prefix == 0 and plain.start.tolist() == [len(x) for x in prompts]
    for b, k in np.ndindex(2, 3):
        assert batch.tokens[b, k][batch.mask[b, k]].tolist() == plain.tokens[b, k][plain.mask[b, k]].tolist()
        if k < len(answers[b]):
            assert batch.tokens[b, k, prefix:][batch.mask[b, k, prefix:]].tolist() == answers[b][k]
    np.testing.assert_array_equal(batch.rank, plain.rank)
    (other,) = read(shares=lambda *sizes: False)
    np.testing.assert_array_equal(other.tokens, plain.tokens)


def test_thumbs(tokenizer):
    """The last row is too long, and so the second one's other response is the first one's."""
    rows = [
        {"prompt": "a b", "completion": " c", "label": True},
        {"prompt": "d", "completion": " e f", "label": False},
        {"prompt": "d", "completion": " e f" * 20, "label": False},
    ]
    batches = pipeline.thumbs(rows, tokenizer, length=12, batch=2, seed=0, epochs=1)
    (batch,) = batches
    assert (batches.counts.kept, batches.counts.too_long) == (2, 1)
    first = int(np.argmax(batch.good))
    prompts = [tokenizer_lib.render_prompt(tokenizer, row["prompt"]) for row in rows[:2]]
    ends = [tokenizer_lib.render_completion(tokenizer, row["prompt"], row["completion"]) for row in rows[:2]]
    for b, n in ((first, 0), (1 - first, 1)):
        assert batch.start[b] == len(prompts[n])
        for which, other in enumerate((n, 1 - n)):
            ids = [*prompts[n], *ends[other]]
            assert batch.tokens[b, which, batch.mask[b, which]].tolist() == ids
            assert batch.mask[b, which].sum() == len(ids)


def test_prompts(tokenizer):
    rows = [{"prompt": ""}, {"prompt": "a b"}, {"prompt": "the cat sat on a mat and ate two fish"}, {"prompt": "c"}]
    length = len(tokenizer_lib.render_prompt(tokenizer, "a b")) + 1
    data = pipeline.prompts(rows, tokenizer, length=length, batch=2, seed=0, epochs=1)
    assert data.counts == pipeline.Counts(kept=2, empty=1, too_long=1)
    (batch,) = data
    assert isinstance(batch, Prompts)
    assert (batch.tokens.dtype, batch.mask.dtype, batch.index.dtype) == (np.int32, bool, np.int32)
    assert sorted(batch.index.tolist()) == [1, 3]
    for tokens, mask, index in zip(batch.tokens, batch.mask, batch.index, strict=True):
        ids = tokenizer_lib.render_prompt(tokenizer, rows[index]["prompt"])
        assert tokens[length - len(ids) :].tolist() == ids
        assert mask.tolist() == [False] * (length - len(ids)) + [True] * len(ids)


def test_rankings_by_a_virtue(tokenizer):
    rate = lambda **ratings: {"helpful": 4} | ratings
    rows = [
        {
            "prompt": "a",
            "responses": ["b", "c", "d"],
            "ranks": [0, 1, 2],
            "ratings": [rate(harmless=3), rate(harmless=7), rate(harmless=4)],
        },
        {"prompt": "a", "responses": list("bcde"), "ranks": [0, 1, 2, 3], "ratings": [rate(harmless=5)] * 4},
    ]
    data = pipeline.rankings(rows, tokenizer, length=9, batch=1, seed=0, epochs=1, virtue="harmless")
    assert data.counts == pipeline.Counts(kept=1, tied=1)  # equal ratings order nothing
    (batch,) = data
    assert batch.rank.tolist() == [[4, 0, 3, -1]]
    assert batch.harmful.tolist() == [[True, False, False, False]]
    (plain,) = pipeline.rankings(rows[:1], tokenizer, length=9, batch=1, seed=0, epochs=1)
    assert plain.harmful is None and plain.rank.tolist() == [[0, 1, 2]]
    for lacking in ({"ratings": [rate(), rate(harmless=2)]}, {}):
        bad = {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]} | lacking
        with pytest.raises(InputError, match=r"^row 2, field ratings: expected a rating of harmless for each response"):
            pipeline.rankings([rows[0], bad], tokenizer, length=9, batch=1, seed=0, virtue="harmless")
