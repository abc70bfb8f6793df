"""Gradients of the maths against finite differences, in float64."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import logprobs
from rlhf_jax.algorithms import advantages, dpo, ppo, reward, sft

RNG = np.random.default_rng(0)
B, T, V, K = 3, 5, 7, 4
MASK = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
BEST = np.array([0, 3, 1], np.int32)
RANK = np.array([[0, 1, 2, 1], [1, 1, 0, -1], [-1, 2, 0, 1]], np.int32)
LOGITS, LOGITS_REF = RNG.normal(0, 2, (2, B, T, V))
# Far from the kinks of clip and max, where a derivative is one-sided.
LOGP_OLD = RNG.normal(-2, 0.5, (B, T))
LOGP = LOGP_OLD + RNG.choice([-0.5, -0.1, 0.1, 0.5], (B, T))
ADVANTAGE, REWARD, VALUE_OLD = RNG.normal(0, 1, (3, B, T))
VALUE = VALUE_OLD + RNG.choice([-0.5, -0.1, 0.1, 0.5], (B, T))
SCORE = RNG.normal(0, 1, (B, K))
PAIRS = RNG.normal(-9, 2, (4, 6))
WEIGHT = RNG.normal(0, 1, (B, T))  # makes a scalar of an array without any symmetry

A = jnp.asarray  # called under float64
FUNCTIONS = {
    "token_logprobs": (lambda x: logprobs.token_logprobs(x, A(TOKENS), 0.7), LOGITS),
    "entropy": (lambda x: logprobs.entropy(x, 0.7), LOGITS),
    "kl_full": (logprobs.kl_full, LOGITS, LOGITS_REF),
    "kl_k1": (lambda x, y: logprobs.kl_estimate(x, y, "k1"), LOGP, LOGP_OLD),
    "kl_k2": (lambda x, y: logprobs.kl_estimate(x, y, "k2"), LOGP, LOGP_OLD),
    "kl_k3": (lambda x, y: logprobs.kl_estimate(x, y, "k3"), LOGP, LOGP_OLD),
    "token_rewards": (lambda s, kl: advantages.token_rewards(s, kl, A(MASK), 0.3), SCORE[:, 0], LOGP - LOGP_OLD),
    "gae": (lambda r, v: advantages.gae(r, v, A(MASK), 0.9, 0.95)[0], REWARD, VALUE),
    "gae_target": (lambda r, v: advantages.gae(r, v, A(MASK), 0.9, 0.95)[1], REWARD, VALUE),
    "whiten": (lambda x: advantages.whiten(x, A(MASK)), REWARD),
    "whiten_bessel": (lambda x: advantages.whiten(x, A(MASK), shift_mean=False, ddof=1), REWARD),
    "group_normalize": (lambda x: advantages.group_normalize(x), REWARD),
    "leave_one_out": (advantages.leave_one_out, REWARD),
    "next_token_loss": (lambda x: sft.next_token_loss(x, A(TOKENS), A(MASK)), LOGITS),
    "bradley_terry_loss": (lambda s: reward.bradley_terry_loss(s, A(RANK), None, 0.2, 0.1), SCORE),
    "choice_loss": (lambda s: reward.choice_loss(s, A(BEST)), SCORE),
    "ranked_choice_loss": (lambda s: reward.ranked_choice_loss(s, A(RANK)), SCORE),
    "centring_loss": (lambda s: reward.centring_loss(s, A(RANK)), SCORE),
    "policy_loss": (lambda x, a: ppo.policy_loss(x, A(LOGP_OLD), a, A(MASK), 0.2)[0], LOGP, ADVANTAGE),
    "policy_loss_dual": (lambda x: ppo.policy_loss(x, A(LOGP_OLD), A(ADVANTAGE), A(MASK), 0.2, 1.3)[0], LOGP),
    "penalty_policy_loss": (lambda x: ppo.penalty_policy_loss(x, A(LOGP_OLD), A(ADVANTAGE), A(MASK), 0.4)[0], LOGP),
    "value_loss": (lambda v: ppo.value_loss(v, A(VALUE_OLD), A(REWARD), A(MASK), 0.2)[0], VALUE),
    "dpo": (lambda c, r: dpo.loss(c, r, A(PAIRS[2]), A(PAIRS[3]), 0.3, 0.1), PAIRS[0], PAIRS[1]),
    "ipo": (lambda c, r: dpo.ipo_loss(c, r, A(PAIRS[2]), A(PAIRS[3]), 0.3), PAIRS[0], PAIRS[1]),
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name):
    function, *args = FUNCTIONS[name]
    given = [jnp.asarray(x) for x in args]
    assert all(x.dtype == jnp.float64 for x in given) and function(*given).dtype == jnp.float64

    def scalar(*args):
        value = function(*args)
        return value if value.ndim == 0 else jnp.sum(jnp.asarray(WEIGHT[: value.shape[0], : value.shape[1]]) * value)

    check_grads(jax.jit(scalar), given, order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)
    grads = jax.jit(jax.grad(scalar, tuple(range(len(given)))))(*given)
    assert any(jnp.any(grad != 0) for grad in grads)
