import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs
from rlhf_jax.algorithms import advantages
from rlhf_jax.logprobs import response_mask
from tests.oracles import cases

MASK = jnp.array([[True, True, False], [False, True, True], [False, False, False]])


def test_last_index():
    np.testing.assert_array_equal(logprobs.last_index(MASK), [1, 2, -1])


def test_token_rewards_by_hand():
    kl = jnp.array([[0.5, -0.25, 9.0], [9.0, 1.5, 0.5], [9.0, 9.0, 9.0]])
    reward = advantages.token_rewards(jnp.array([0.75, -1.25, 3.0]), kl, MASK, 0.2)
    np.testing.assert_allclose(reward, [[-0.1, 0.8, 0.0], [0.0, -0.3, -1.35], [0.0, 0.0, 0.0]], rtol=1e-6)


def test_a_score_lands_where_it_is_told_to():
    kl, later = jnp.full((3, 3), 0.5), jnp.array([[False, False, True], [True, False, False], [False, False, False]])
    reward = advantages.token_rewards(jnp.array([0.75, -1.25, 3.0]), kl, MASK, 0.2, later)
    np.testing.assert_allclose(reward, [[-0.1, -0.1, 0.75], [-1.25, -0.1, -0.1], [0.0, 0.0, 0.0]], rtol=1e-6)


@cases("token_reward_mask", "token_reward_eos", "token_reward_eos_pad_is_eos")
def test_token_rewards_oracle(case):
    mask = case["mask"] if "mask" in case else response_mask(case["tokens"], case["eos_id"])
    kl = case["logp"] - case["logp_ref"]
    reward = advantages.token_rewards(case["score"], kl, mask, case["beta"])
    case.check(reward=reward, last_index=logprobs.last_index(mask), kl=jnp.where(mask, kl, 0))


def test_gae_by_hand():
    reward = jnp.array([[0.5, -1.5, 7.0]])
    value = jnp.array([[0.25, 0.75, 7.0]])
    advantage, target = advantages.gae(reward, value, MASK[:1], gamma=0.5, lam=0.5)
    # delta = [.5 + .5 * .75 - .25, -1.5 - .75] = [.625, -2.25]; A_0 = .625 + .25 * -2.25.
    np.testing.assert_allclose(advantage, [[0.0625, -2.25, 0.0]])
    np.testing.assert_allclose(target, [[0.3125, -1.5, 0.0]])


@cases("gae_gamma_1.0_lambda_0.95", "gae_gamma_1.0_lambda_1.0", "gae_gamma_0.9_lambda_0.95")
def test_gae_oracle(case):
    advantage, target = advantages.gae(case["reward"], case["value"], case["mask"], case["gamma"], case["lam"])
    case.check(advantage=advantage, **{"return": target})


def test_rows_of_different_lengths_have_their_own_lambda():
    np.testing.assert_allclose(advantages.length_adaptive(MASK, 0.75), [1 / 3, 1 / 3, 0.0], rtol=1e-6)
    assert advantages.length_adaptive(MASK, 0.25).tolist() == [0.0, 0.0, 0.0]  # 1 - 1 / .5 is negative
    reward = jnp.array([[0.5, -1.5, 7.0], [7.0, 0.5, -1.5]])
    value = jnp.array([[0.25, 0.75, 7.0], [7.0, 0.25, 0.75]])
    both, _ = advantages.gae(reward, value, MASK[:2], 0.5, jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(both, [[0.0625, -2.25, 0.0], [0.0, 0.625, -2.25]])


def test_gae_of_a_padded_row_is_that_of_the_slice():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 1, 7)).astype(np.float32)
    mask = np.zeros((1, 7), bool)
    mask[:, 2:6] = True
    padded = advantages.gae(jnp.array(reward), jnp.array(value), jnp.array(mask), 0.9, 0.8)
    alone = advantages.gae(jnp.array(reward[:, 2:6]), jnp.array(value[:, 2:6]), jnp.ones((1, 4), bool), 0.9, 0.8)
    np.testing.assert_allclose(padded[0][:, 2:6], alone[0], rtol=1e-6)
    np.testing.assert_allclose(padded[1][:, 2:6], alone[1], rtol=1e-6)


def test_whiten_by_hand():
    x = jnp.array([[1.0, 2.5, 9.0], [9.0, -0.5, 4.0], [9.0, 9.0, 9.0]])
    mean, std = 1.75, np.sqrt(2.8125)
    expected = np.where(MASK, (np.asarray(x) - mean) / std, 0)
    np.testing.assert_allclose(advantages.whiten(x, MASK), expected, rtol=1e-6)
    bessel = np.where(MASK, (np.asarray(x) - mean) / np.sqrt(2.8125 * 4 / 3), 0)
    np.testing.assert_allclose(advantages.whiten(x, MASK, ddof=1), bessel, rtol=1e-6)
    kept = np.where(MASK, (np.asarray(x) - mean) / std + mean, 0)
    np.testing.assert_allclose(advantages.whiten(x, MASK, shift_mean=False), kept, rtol=1e-6)


@cases(
    *[f"whiten_{kind}{mean}" for kind in ("", "small_variance_", "single_valid_") for mean in ("shift", "keep_mean")]
)
def test_whiten_oracle(case):
    case.check(whitened=advantages.whiten(case["x"], case["mask"], case["shift_mean"]))


def test_group_baselines_by_hand():
    reward = jnp.array([[0.5, -1.5, 1.0]])
    np.testing.assert_allclose(advantages.leave_one_out(reward), [[0.75, -2.25, 1.5]], rtol=1e-6)
    std = np.std([0.5, -1.5, 1.0])
    np.testing.assert_allclose(
        advantages.group_normalize(reward), [np.array([0.5, -1.5, 1.0]) / (std + 1e-4)], rtol=1e-5
    )


@cases("grpo_advantage_population_std", "grpo_advantage_sample_std")
def test_group_normalize_oracle(case):
    case.check(advantage=advantages.group_normalize(case["reward"], case["ddof"]))


@cases("rloo_advantage")
def test_leave_one_out_oracle(case):
    case.check(advantage=advantages.leave_one_out(case["reward"]))


def test_leave_one_out_needs_two():
    with pytest.raises(ValueError, match="at least two"):
        advantages.leave_one_out(jnp.ones((3, 1)))


# Scores and group sizes for which the mean of equal scores may be off by a rounding error.
EQUAL = [(12345.678, 6), (100.1, 12), (1.0, 12), (-3.3e7, 7), (1e-30, 5), (0.0, 3)]


@pytest.mark.parametrize(("score", "group"), EQUAL)
def test_a_group_of_equal_scores_gives_exactly_no_advantage(score, group):
    reward = jnp.full((2, group), score, jnp.float32)
    for advantage in (advantages.subtract_mean, advantages.group_normalize, advantages.leave_one_out):
        np.testing.assert_array_equal(jax.jit(advantage)(reward), np.zeros((2, group)))
    mixed = reward.at[1, 0].add(2.0 * abs(score) + 1.0)  # the other group still learns
    assert np.all(np.asarray(advantages.group_normalize(mixed)[1]) != 0)
    np.testing.assert_array_equal(advantages.group_normalize(mixed)[0], np.zeros(group))


@pytest.mark.parametrize(("score", "group"), EQUAL)
def test_whitening_equal_values_blows_up_no_rounding_error(score, group):
    mask = jnp.arange(group)[None] < jnp.array([[group], [group - 1]])
    x = jnp.where(mask, jnp.float32(score), 7.0)  # what padding holds does not count
    np.testing.assert_array_equal(jax.jit(advantages.whiten)(x, mask), np.zeros((2, group)))
    kept = jax.jit(lambda x, mask: advantages.whiten(x, mask, shift_mean=False))(x, mask)
    np.testing.assert_allclose(kept, np.where(mask, x, 0.0), rtol=1e-6)
