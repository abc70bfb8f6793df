"""Where steps end, by hand; rows of steps as batches; the sums of the world."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import pipeline, steps
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.data.world import World
from rlhf_jax.data.world import steps as sums

A, LINE, DOT, EOS = range(4)  # "a", a new line, ".\n", EOS
MARKS = steps.Marks(np.array([False, True, True, False]), np.array([False, True, False, True]))


def test_where_steps_end_by_hand():
    rows = [
        ([A, A, LINE, A, LINE, EOS], [True] * 6, [(2, 1), (4, 3)]),  # a blank line before EOS is no step
        ([A, DOT, A, EOS, A, A], [True] * 4 + [False] * 2, [(1, 1), (3, 2)]),  # padding does not count
        ([A, A, A, A, A, A], [True] * 6, [(5, 5)]),  # cut
        ([LINE, LINE, A, A, EOS, EOS], [True] * 5 + [False], [(4, 3)]),
        ([A, A, DOT, LINE, A, LINE], [True] * 6, [(2, 2), (5, 4)]),
        ([EOS, A, A, A, A, A], [True] + [False] * 5, []),
    ]
    tokens, mask = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    for find in (steps.find, jax.jit(lambda *x: steps.find(*x, MARKS))):
        over, read = find(tokens, mask, MARKS) if find is steps.find else find(jnp.array(tokens), jnp.array(mask))
        found = [[(c, int(read[b, c])) for c in range(6) if over[b, c]] for b in range(len(rows))]
        assert found == [row[2] for row in rows]


def test_rows_of_steps_are_read_at_their_last_tokens(tmp_path):
    tok = lib.train(["Add.\nThen add again.\nIt is 4."] * 9, 300, tmp_path)
    rows = [
        {"prompt": "2 plus 2?", "steps": ["Add.", "Then add\n again. ", "It is 4."], "labels": [1, 0, -1]},
        {"prompt": [{"role": "user", "content": "2?"}], "steps": ["It is 4."], "labels": [1]},
        {"prompt": "2?", "steps": ["add " * 90], "labels": [1]},
    ]
    batches = pipeline.steps(rows, tok, length=60, batch=2, seed=0, epochs=1)
    assert batches.counts.kept == 2 and batches.counts.too_long == 1
    (batch,) = batches
    for tokens, step, label, mask in zip(batch.tokens, batch.step, batch.label, batch.mask, strict=True):
        columns = np.flatnonzero(step)
        texts = [tok.decode(tokens[:column]) + "|" + tok.decode(tokens[column : column + 1]) for column in columns]
        assert mask[columns].all() and not label[~step].any()
        if len(columns) == 3:
            assert label[columns].tolist() == [1, 0, -1]
            assert [text.replace("|", "").rpartition("?")[2] for text in texts] == [
                "Add.",
                "Add.\nThen add again.",
                "Add.\nThen add again.\nIt is 4.",
            ]
        else:
            assert label[columns].tolist() == [1] and texts[0].replace("|", "").endswith("It is 4.")


def test_sums_in_steps():
    assert sums.solution(3, 2) == ["4", "5", "It is 5."] and sums.solution(4, 0) == ["It is 4."]
    assert sums.labels(3, 2, ["4", "6", "It is 5."]) == [1, -1, -1]
    assert sums.labels(3, 2, ["4", "5", "6", "It is 6."]) == [1, 1, -1, -1]
    world = World.generate(0)
    rows = [*sums.rows(world, 400, seed=0)]
    assert rows == [*sums.rows(world, 400, seed=0)] != [*sums.rows(world, 400, seed=1)]
    right = [sums.is_right(*row["sum"], row["steps"]) for row in rows]
    assert 0.4 < np.mean(right) < 0.6
    assert all((min(row["labels"]) > 0) == fine for row, fine in zip(rows, right, strict=True))
    asked = {tuple(row["sum"]) for row in rows}
    assert not asked & {tuple(row["sum"]) for row in sums.rows(world, 400, seed=0, held_out=True)}
    assert len(asked) == len(sums.pairs(world)) == 59
