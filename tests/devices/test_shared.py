import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.devices import compute, shared
from rlhf_jax.types import Fork
from tests import tiny


@pytest.mark.parametrize(
    ("prompt", "answer", "group", "pays"),
    [
        (256, 32, 9, True),  # 544 columns for 2592
        (256, 32, 2, True),  # 320 for 576
        (31, 8, 9, False),  # a short prompt
        (32, 8, 9, True),
        (64, 32, 2, True),  # 128 for 192: exactly a third less
        (63, 32, 2, False),
        (256, 32, 1, False),
    ],
)
def test_where_it_pays(prompt, answer, group, pays):
    assert shared.worthwhile(prompt, answer, group) == pays == compute.Compute().shares(prompt, answer, group)


def test_it_can_be_chosen():
    always, never = compute.Compute(share_prompts=True), compute.Compute(share_prompts=False)
    assert always.shares(2, 99, 2) and not never.shares(256, 1, 9)
    assert not always.shares(1, 9, 2) and not always.shares(9, 9, 1)  # nothing to share


def test_rows_that_share():
    assert [shared.rows(count, 4) for count in (8, 6, 3)] == [4, 2, 1]


def test_a_fork_by_hand():
    """Two groups of two rows: a prompt of up to three columns, the last of which begins each branch."""
    tokens = jnp.array([[0, 5, 6, 7, 8], [0, 5, 6, 9, 0], [1, 2, 3, 4, 0], [1, 2, 3, 0, 0]])
    mask = tokens > 0
    joined, tree = shared.fork(tokens, mask, start=2, group=2)
    assert joined.tolist() == [[0, 5, 6, 7, 8, 6, 9, 0], [1, 2, 3, 4, 0, 3, 0, 0]]
    assert tree.reach.tolist() == [[0, 7, 3, 2, 1, 3, 2, 0], [8, 7, 3, 2, 0, 3, 0, 0]]
    assert tree.fork == Fork(prefix=2, branches=2)


def rows_that_share(seed: int, rows: int, group: int, prompt: int, answer: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of rows of which each group has the same prompt, ragged on both sides."""
    tokens = tiny.random_tokens(seed, rows, prompt + answer)
    tokens[:, :prompt] = np.repeat(tokens[::group, :prompt], group, axis=0)
    before = np.repeat(tiny.ragged(seed + 1, rows // group, prompt, left=True), group, axis=0)
    return tokens, np.concatenate([before, tiny.ragged(seed + 2, rows, answer)], axis=1)
