import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import online_dpo
from tests import tiny
from tests.algorithms.test_grpo import POLICY, on_policy
from tests.algorithms.test_ppo import LOGPROBS

# Of four prompts: all differ; two are best; two are worst; all are equal.
SCORES = jnp.array([[0.5, -1.25, 2.0, 0.25], [1.5, 0.0, 1.5, -3.0], [-0.5, 0.75, -0.5, 0.0], [1.0, 1.0, 1.0, 1.0]])


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def test_ranks_and_extremes_by_hand():
    assert online_dpo.ranks(SCORES).tolist() == [[1, 3, 0, 2], [0, 2, 0, 3], [2, 0, 2, 1], [0, 0, 0, 0]]
    assert online_dpo.extremes(SCORES).tolist() == [[2, 1], [0, 3], [1, 0], [0, 0]]


def test_the_share_of_episodes_that_are_read():
    assert online_dpo.Config(group=8).learnt == 0.25 and online_dpo.Config(group=8, pairs="all").learnt == 1.0


def value_of(**settings):
    """The loss of a rollout with these scores, its metrics and its gradient, and the policy's log-ratios [4, 4]."""
    sampled, cfg = on_policy().replace(score=SCORES.reshape(-1)), online_dpo.Config(group=4, beta=0.3, **settings)
    batch, about = online_dpo.experience(sampled, cfg)
    changed = jax.tree.map(lambda x: x + 0.02 * jnp.sign(x), tiny.policy())
    loss = functools.partial(online_dpo.loss, policy_fn=POLICY, cfg=cfg)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)(
        {"policy": changed}, batch, None, online_dpo.totals(batch)
    )
    ratio = np.where(
        sampled.response_mask, LOGPROBS(changed, sampled.tokens, sampled.mask) - sampled.logp_ref, 0.0
    ).reshape(4, 4, -1)
    length = np.asarray(sampled.response_mask).reshape(4, 4, -1).sum(2)
    return value, metrics | about, grads, ratio.sum(2) / (length if cfg.per_token else 1)


@pytest.mark.slow
def test_the_best_against_the_worst_by_hand():
    value, metrics, _, gain = value_of()
    h = np.array([gain[0, 2] - gain[0, 1], gain[1, 0] - gain[1, 3], gain[2, 1] - gain[2, 0]])
    np.testing.assert_allclose(value, np.mean(-log_sigmoid(0.3 * h)), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/margin"], 0.3 * h.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/accuracy"], np.mean(h > 0), rtol=1e-6)
    assert metrics["reward/flat"] == 0.25 and metrics["policy/approx_kl"] > 0


@pytest.mark.slow
def test_all_pairs_by_hand():
    value, _, grads, gain = value_of(pairs="all", loss="ipo", per_token=True)
    pairs = [
        [(b, i, j) for i in range(4) for j in range(4) if SCORES[b, i] > SCORES[b, j]]
        for b in range(3)  # the last prompt has none
    ]
    assert [len(one) for one in pairs] == [6, 5, 5]
    by_prompt = [np.mean([(gain[b, i] - gain[b, j] - 0.5 / 0.3) ** 2 for b, i, j in one]) for one in pairs]
    np.testing.assert_allclose(value, np.mean(by_prompt), rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads)) and float(optax.tree.norm(grads)) > 0


@pytest.mark.slow
def test_equal_scores_teach_nothing():
    sampled, cfg = on_policy().replace(score=jnp.full(16, 0.3)), online_dpo.Config(group=4)
    batch, metrics = online_dpo.experience(sampled, cfg)
    loss = lambda p: online_dpo.loss(p, batch, None, online_dpo.totals(batch), policy_fn=POLICY, cfg=cfg)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))({"policy": tiny.policy()})
    assert metrics["reward/flat"] == 1.0 and value == 0 and not any(x.any() for x in jax.tree.leaves(grads))
