import itertools

import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import best_of_n
from rlhf_jax.types import Prompts, Rollout
from tests.oracles import cases


@cases("best_of_n_kl")
def test_kl_oracle(case):
    case.check(kl=[best_of_n.kl(int(n)) for n in case["n"]])


def test_the_best_of_each_group_is_kept_whole():
    prompts = Prompts(tokens=np.array([[5, 6], [7, 8]]), mask=np.ones((2, 2), bool), index=np.array([3, 9]))
    repeated = best_of_n.repeat(prompts, 3)
    np.testing.assert_array_equal(repeated.index, [3, 3, 3, 9, 9, 9])
    np.testing.assert_array_equal(repeated.tokens[2:4], [[5, 6], [7, 8]])
    row = np.arange(6)
    episodes = Rollout(
        tokens=row[:, None],
        mask=row[:, None],
        response_mask=row[:, None],
        logp=row[:, None],
        logp_ref=row[:, None],
        ended=np.array([1, 1, 1, 1, 1, 0], bool),
        index=repeated.index,
        score=np.array([0.5, 2.0, 2.0, -1.0, -3.0, -0.5]),
    )
    best = best_of_n.select(episodes, 3)
    # The last one has the highest score of its group, and no end.
    np.testing.assert_array_equal(best.tokens[:, 0], [1, 3])
    np.testing.assert_array_equal(best.index, [3, 9])
    assert best.value is None
    nobody = best_of_n.select(episodes.replace(ended=np.zeros(6, bool)), 3)
    np.testing.assert_array_equal(nobody.tokens[:, 0], [1, 5])


def test_one_of_one_is_itself():
    assert best_of_n.kl(1) == 0
    assert jnp.isclose(best_of_n.kl(4), np.log(4) - 0.75)


def test_the_expected_best_is_that_of_all_draws():
    rng = np.random.default_rng(0)
    score, value = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        draws = [list(draw) for draw in itertools.combinations(range(6), n)]
        best = [[value[p, draw][np.argmax(score[p, draw])] for draw in draws] for p in range(3)]
        np.testing.assert_allclose(best_of_n.expected(score, value, n), np.mean(best))
