"""Process rewards: loss and advantages by hand, one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, optim
from rlhf_jax.algorithms import process_reward as lib
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.types import Rollout, Steps
from tests import tiny

STEP = jnp.array([[True, False, True], [False, True, False]])
LABEL = jnp.array([[1, 0, -1], [0, 0, 0]])
OUTPUT = jnp.array([[0.3, 9.0, 0.7], [9.0, -1.2, 9.0]])


def softplus(x):
    return np.log1p(np.exp(x))


@pytest.mark.parametrize(
    ("neutral", "expected"),
    [
        ("right", (softplus(-0.3) + softplus(0.7) + softplus(1.2)) / 3),
        ("wrong", (softplus(-0.3) + softplus(0.7) + softplus(-1.2)) / 3),
        ("left_out", (softplus(-0.3) + softplus(0.7)) / 2),
    ],
)
def test_the_loss_by_hand(neutral, expected):
    right, learnt = lib.targets(LABEL, STEP, neutral)
    np.testing.assert_allclose(lib.loss(OUTPUT, right, learnt), expected, rtol=1e-6)
    np.testing.assert_allclose(lib.loss(OUTPUT, right, learnt, jnp.int32(4)), expected * learnt.sum() / 4, rtol=1e-6)
    grads = jax.grad(lambda x: lib.loss(x, right, learnt))(jnp.where(STEP, OUTPUT, jnp.inf))
    assert np.isfinite(grads).all() and not grads[~STEP].any()


def test_shares_by_hand():
    found = lib.shares(lib.counts(OUTPUT, *lib.targets(LABEL, STEP, "right")))
    assert {name: round(float(x), 4) for name, x in found.items()} == {
        "step/accuracy": 0.3333,  # of 0.3 right, 0.7 wrong, -1.2 right
        "step/right": 0.6667,
        "step/accuracy_right": 0.5,
        "step/accuracy_wrong": 0.0,
    }


@pytest.mark.slow
def test_a_step_is_the_same_on_one_device_and_eight():
    mask = jnp.array(tiny.ragged(1, 16, 10))
    rng = np.random.default_rng(0)
    step = np.asarray(mask) & (rng.random((16, 10)) < 0.4)
    label = np.where(step, rng.integers(-1, 2, (16, 10)), 0).astype(np.int32)
    batch = Steps(tokens=tiny.random_tokens(0, 16, 10), mask=np.asarray(mask), step=step, label=label)
    tx = optim.adamw(1e-3)
    train_step = functools.partial(
        lib.train_step, token_fn=models.bind(heads.ScalarModel(tiny.GPT)), tx=tx, microbatches=2
    )
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        layout = parallel.layout(devices=devices)
        run = layout.step(train_step)
        state, rows = layout.state(optim.init(tiny.scalar(), tx, jax.random.key(0))), layout.rows(batch)
        losses = []
        for _ in range(4):
            state, metrics = run(state, rows)
            losses.append(float(layout.get(metrics)["loss/step"]))
        assert losses[-1] < losses[0]
        results.append(jax.tree.map(np.asarray, layout.get((state.params, metrics))))
    tiny.assert_close(*results, atol=1e-4)


def test_rewards_of_tokens_add_up_by_step():
    reward = jnp.array([[0.5, 0.25, -1.0, 2.0, 7.0], [1.5, 0.0, 0.0, 0.0, 0.0]])
    over = jnp.array([[False, True, False, True, False], [True, False, False, False, False]])
    np.testing.assert_allclose(grpo.step_rewards(reward, over), [[0, 0.75, 0, 1, 0], [1.5, 0, 0, 0, 0]])


def test_advantages_of_steps_by_hand():
    over = jnp.array([[0, 1, 0, 1], [0, 0, 1, 0]], bool)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    reward = jnp.array([[9.0, 1.5, 9.0, 3.5], [9.0, 9.0, 2.5, 9.0]])
    found = grpo.step_advantages(reward, over, mask, 2, scale=False)  # of 1.5, 3.5, 2.5 the mean is 2.5
    np.testing.assert_allclose(found, [[0, 0, 1, 1], [0, 0, 0, 0]], atol=1e-6)
    found = grpo.step_advantages(reward.at[1, 2].set(1.0), over, mask, 2)  # mean 2, deviation sqrt(3.5 / 3)
    std = np.sqrt(3.5 / 3) + 1e-4
    np.testing.assert_allclose(found, np.array([[1, 1, 1.5, 1.5], [-1, -1, -1, 0]]) / std, rtol=1e-5)
    assert not grpo.step_advantages(jnp.full((2, 4), 0.7), over, mask, 2).any()


@pytest.mark.slow
def test_the_last_token_has_the_score_and_the_kl_is_of_its_step():
    mask = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
    rollout = Rollout(
        tokens=jnp.zeros((2, 4), jnp.int32),
        mask=jnp.ones((2, 4), bool),
        response_mask=mask,
        logp=jnp.array([[0.0, -1.0, -1.0], [0.0, 0.0, 0.0]]),
        logp_ref=jnp.array([[0.0, -3.0, -2.0], [0.0, 0.0, 0.0]]),
        ended=jnp.array([True, False]),
        index=jnp.arange(2),
        score=jnp.zeros(2),
        token_score=jnp.array([[-0.5, 0.0, -1.0], [-2.0, 0.0, 0.0]]),
        step=jnp.array([[1, 0, 1], [1, 0, 0]], bool),
    )
    cfg = grpo.Config(group=2, scale=False, kl_in="reward", kl_coef=0.5, unfinished_score=-4.0)
    # Steps: -0.5 and -1 - 0.5 (2 + 1); -2 and, at the last token, -4. Their mean is -2.25.
    found = grpo.process_advantages(rollout, cfg)
    np.testing.assert_allclose(found, [[1.5, -0.25, -0.25], [-1.5, -1.75, 0]], atol=1e-6)
    batch, metrics = grpo.experience(rollout, cfg)
    np.testing.assert_array_equal(batch.advantage, found)
    assert metrics["reward/score"] == (-1.5 - 6.0) / 2
