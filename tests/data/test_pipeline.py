"""Tests of rlhf_jax.data.pipeline: what stands in the batches, in which order, and how a position is restored."""

import functools
import itertools
import json

import numpy as np
import pytest

from rlhf_jax.data import pipeline, shards, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError, Prompts, Rankings, Tokens

WORDS = "the cat sat on a mat and ate two fish while nobody was looking at it".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_lib.train([" ".join(WORDS)] * 3, 300, tmp_path_factory.mktemp("tokenizer"))


def says(n, words):
    """Some words that no other row says."""
    return f"{n}: " + " ".join(WORDS[(n + k) % len(WORDS)] for k in range(words))


TEXTS = [{"text": says(n, 1 + n % 13)} for n in range(40)]
DEMONSTRATIONS = [{"prompt": says(n, 1 + n % 3), "completion": says(100 + n, 1 + n % 5)} for n in range(20)] + [
    {"messages": [{"role": "user", "content": says(n, 2)}, {"role": "assistant", "content": says(100 + n, n % 4 + 1)}]}
    for n in range(20, 40)
]
RANKINGS = [
    {
        "prompt": says(n, 2),
        "responses": [says(100 * n + k, 1 + k) for k in range(2 + n % 3)],
        "ranks": [(n + k) % 3 for k in range(2 + n % 3)],
    }
    for n in range(13)
]
PROMPTS = [{"prompt": says(n, 1 + n % 5)} for n in range(13)]
MAKE = {
    "text": lambda tokenizer, **o: pipeline.text(TEXTS, tokenizer, **{"length": 24, "batch": 4, "seed": 3, **o}),
    "demonstrations": lambda tokenizer, **o: pipeline.demonstrations(
        DEMONSTRATIONS, tokenizer, **{"length": 64, "batch": 4, "seed": 3, **o}
    ),
    "rankings": lambda tokenizer, **o: pipeline.rankings(
        RANKINGS, tokenizer, **{"length": 64, "batch": 4, "seed": 3, **o}
    ),
    "prompts": lambda tokenizer, **o: pipeline.prompts(
        PROMPTS, tokenizer, **{"length": 32, "batch": 4, "seed": 3, **o}
    ),
    "prompts of several widths": lambda tokenizer, **o: pipeline.prompts(
        PROMPTS, tokenizer, **{"length": 32, "widths": 4, "batch": 4, "seed": 3, **o}
    ),
}
KINDS = pytest.mark.parametrize("kind", MAKE)


def leaves(batch):
    named = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: x for name, x in named.items() if isinstance(x, np.ndarray)}


def same(one, other):
    return all(np.array_equal(x, leaves(other)[name]) for name, x in leaves(one).items())


def segments(batches):
    """(ids, targets) of each segment."""
    for batch in batches:
        for tokens, segment, target in zip(batch.tokens, batch.segment, batch.target, strict=True):
            assert (np.diff(segment[segment > 0]) >= 0).all() and not target[segment == 0].any()
            for number in range(1, segment.max() + 1):
                assert (segment == number).any()
                yield tokens[segment == number].tolist(), target[segment == number].tolist()


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


def turns(roles, words=2):
    """Messages by the first letters of their roles, each of as many words."""
    role = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": role[letter], "content": says(n, words)} for n, letter in enumerate(roles)]


def prompt_length(tokenizer, messages):
    return len(tokenizer_lib.render_prompt(tokenizer, messages))


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


@pytest.mark.parametrize("epochs", [1, 3, None])
def test_prompts_of_like_length_share_a_width(tokenizer, epochs):
    rows = [{"prompt": says(n, 1 + n % 12)} for n in range(90)]
    sizes = [len(tokenizer_lib.render_prompt(tokenizer, row["prompt"])) for row in rows]
    read = functools.partial(pipeline.prompts, rows, tokenizer, length=25, batch=4, seed=3, epochs=epochs)
    count = 50 if epochs is None else -(-90 * epochs // 4)
    batches = list(itertools.islice(read(widths=5), count))
    assert len(batches) == count
    for batch in batches:
        assert batch.tokens.shape == batch.mask.shape == (4, 5 * -(-batch.mask.sum(axis=1).max() // 5))
        for row, index in zip(batch.tokens, batch.index, strict=True):
            assert index < 0 or row[-sizes[index] :].tolist() == tokenizer_lib.render_prompt(
                tokenizer, rows[index]["prompt"]
            )
    said = np.concatenate([batch.index for batch in batches])
    if epochs is not None:
        assert (np.bincount(said[said >= 0], minlength=90) == epochs).all()  # each row once an epoch
    columns = lambda batches: sum(batch.tokens.shape[1] for batch in batches)
    assert columns(batches) < 0.75 * columns(itertools.islice(read(), count))
    widths = [batch.tokens.shape[1] for batch in batches[:8]]
    assert len(set(widths)) > 2 and widths != sorted(widths)


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 12, 20])
def test_prompts_of_several_widths_meet_themselves_no_sooner(tokenizer, count):
    """Few prompts do not come together in a batch of theirs, epoch after epoch."""
    rows = [{"prompt": says(n, 1 + n % 7)} for n in range(count)]
    read = functools.partial(pipeline.prompts, rows, tokenizer, length=25, batch=4, widths=5)
    batches = [batch.index for batch in itertools.islice(read(seed=3), 4 * count)]
    assert all(len(set(batch.tolist())) == 4 for batch in batches)
    other = [batch.index for batch in itertools.islice(read(seed=4), 4 * count)]
    assert any((x != y).any() for x, y in zip(batches, other, strict=True))


def test_a_prompt_of_text_is_never_shortened(tokenizer):
    rows = [{"prompt": says(0, 9)}, {"prompt": "a"}]
    _, counts = pipeline.every_prompt(rows, tokenizer, length=prompt_length(tokenizer, rows[0]["prompt"]) - 1)
    assert counts == pipeline.Counts(kept=1, too_long=1)


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


def test_last_batch_is_filled_up(tokenizer):
    batches = list(MAKE["prompts"](tokenizer, epochs=1))
    assert [batch.index.shape for batch in batches] == [(4,)] * 4
    assert sorted(np.concatenate([batch.index for batch in batches]).tolist()) == [-1] * 3 + list(range(13))
    assert all(batch.mask.any(axis=1).all() for batch in batches)
    last = list(MAKE["rankings"](tokenizer, epochs=1))[-1]
    empty = (last.rank == -1).all(axis=1)
    assert empty.sum() == 3 and not last.mask[empty].any()
    data = MAKE["text"](tokenizer, epochs=1)
    last = list(data)[-1]
    assert data.rows % 4 and (last.segment == 0).all(axis=1).sum() == 4 - data.rows % 4


def test_each_epoch_has_each_row_once_in_another_order(tokenizer):
    stream = np.concatenate([batch.index for batch in itertools.islice(MAKE["prompts"](tokenizer), 26)])
    epochs = stream.reshape(8, 13).tolist()
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8
    other = np.concatenate([batch.index for batch in itertools.islice(MAKE["prompts"](tokenizer, seed=4), 26)])
    assert not {tuple(epoch) for epoch in other.reshape(8, 13).tolist()} & set(map(tuple, epochs))


@KINDS
def test_same_seed_same_batches(tokenizer, kind):
    one, two, other = (itertools.islice(MAKE[kind](tokenizer, seed=seed), 5) for seed in (5, 5, 6))
    different = 0
    for x, y, z in zip(one, two, other, strict=True):
        assert same(x, y)
        different += not same(x, z)
    assert different


@pytest.mark.slow
@KINDS
def test_position_is_restored_exactly(tokenizer, kind):
    data = MAKE[kind](tokenizer, epochs=3)
    expected = list(data)
    per_epoch = data.rows // 4
    for stop in (0, 1, per_epoch, per_epoch + 1, data.steps - 1, data.steps):
        iterator = iter(data)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        restored = iter(MAKE[kind](tokenizer, epochs=3))
        next(restored)  # a position of its own, to be left
        restored.set_state(state)
        rest = list(restored)
        assert len(rest) == len(expected) - stop
        assert all(itertools.starmap(same, zip(rest, expected[stop:], strict=True)))


@KINDS
def test_processes_hold_the_parts_of_each_batch(tokenizer, kind):
    whole = list(MAKE[kind](tokenizer, epochs=2))
    parts = [list(MAKE[kind](tokenizer, epochs=2).part(p, 2)) for p in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        for name, x in leaves(batch).items():
            assert np.array_equal(x, np.concatenate([leaves(left)[name], leaves(right)[name]]))
    with pytest.raises(InputError, match="a batch of 4 does not divide over 3 processes"):
        MAKE[kind](tokenizer).part(0, 3)


@KINDS
def test_too_few_rows(tokenizer, kind):
    rows = kind.split()[0]
    with pytest.raises(InputError, match=rf"{rows}: \d+ usable rows are fewer than a batch of 64; .* rows kept"):
        MAKE[kind](tokenizer, batch=64)
    with pytest.raises(InputError, match=f"{rows}: 0 usable rows"):
        getattr(pipeline, rows)([], tokenizer, length=8, batch=1, seed=0)


@pytest.mark.parametrize("kind", ["text", "demonstrations"])
def test_held_out_rows_come_in_order_however_few(tokenizer, kind):
    evaluated = MAKE[kind](tokenizer, seed=None, batch=4, epochs=1)
    assert list(evaluated._numbers()[0]) == [0, 1, 2, 3]
    few = MAKE[kind](tokenizer, seed=None, batch=64, epochs=1)
    (batch,) = few
    assert list(segments([batch])) == list(segments(evaluated)) and not batch.segment[few.rows :].any()
    assert same(pipeline.stack(few), pipeline.take(iter(few), 1))
    with pytest.raises(InputError, match=f"held-out {kind}: none can be used; 0 rows kept .*, 1 refused"):
        row = {"text": ""} if kind == "text" else {"prompt": "", "completion": "a"}
        getattr(pipeline, kind)([row], tokenizer, length=8, batch=1, seed=None, epochs=1)


def test_packing_fits_and_leaves_out_nothing():
    lengths = np.random.default_rng(0).integers(1, 17, 500).tolist()
    rows = shards.pack(lengths, 32)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    used = [sum(lengths[n] for n in row) for row in rows]
    assert max(used) <= 32 and sum(used) > 0.98 * 32 * len(rows)
    assert shards.pack([7, 5, 3, 1], 8) == [[0, 3], [1, 2]]
    assert shards.pack([], 8) == []


# -- what is refused, masked and counted -------------------------------------------------------------------------------


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
