"""The order of batches: by width and epoch, in parts for processes, and from a position that is restored."""

import functools
import itertools
import json

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import InputError
from tests.data.examples import KINDS, MAKE, leaves, same, says, segments


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
