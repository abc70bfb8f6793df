"""Divergences of a teacher and a student: by hand, by oracle, and in a step that brings the two together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import distillation, optim
from tests import tiny
from tests.algorithms.test_ppo import EPISODES
from tests.oracles import Case


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("gkd_forward_kl", "forward"),
        ("gkd_reverse_kl", "reverse"),
        ("gkd_jsd_half", "jsd"),
        ("gkd_jsd_skewed", "jsd"),
    ],
)
def test_divergences_are_the_oracles(name, divergence):
    case = Case(name)
    cfg = distillation.Config(divergence, temperature=case["tau"])
    if divergence == "jsd":
        cfg = dataclasses.replace(cfg, beta=case["beta"])
    teacher, mask = case["teacher_logits"], case["mask"]
    loss, gradient = jax.value_and_grad(distillation.loss)(case["student_logits"], teacher, mask, cfg)
    tokens = jnp.where(mask, distillation.token_divergence(teacher, case["student_logits"], cfg), 0.0)
    case.check(loss=loss, token_divergence=tokens, grad_student_logits=gradient)


def test_divergences_by_hand():
    p, q = jnp.array([0.5, 0.5]), jnp.array([0.9, 0.1])
    logits = jnp.log(p)[None, None], jnp.log(q)[None, None]
    found = lambda kind, beta=0.5: float(distillation.token_divergence(*logits, distillation.Config(kind, beta))[0, 0])
    np.testing.assert_allclose(found("forward"), 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rtol=1e-5)
    np.testing.assert_allclose(found("reverse"), 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5), rtol=1e-5)
    m = 0.25 * p + 0.75 * q
    mixed = 0.25 * np.sum(p * np.log(p / m)) + 0.75 * np.sum(q * np.log(q / m))
    np.testing.assert_allclose(found("jsd", 0.25), mixed, rtol=1e-5)


@pytest.mark.slow
def test_a_student_comes_to_its_teacher():
    network, teacher = models.logits_fn(tiny.GPT), tiny.policy(seed=3)
    tx = optim.adamw(3e-2)
    step = jax.jit(
        functools.partial(
            distillation.train_step, student_fn=network, teacher_fn=network, tx=tx, cfg=distillation.Config()
        )
    )
    state, losses = optim.init(tiny.policy(), tx, jax.random.key(0)), []
    for _ in range(20):
        state, metrics = step(state, EPISODES, teacher)
        losses.append(float(metrics["loss/distillation"]))
    assert losses[-1] < 0.2 * losses[0]
    _, metrics = step(optim.init(teacher, tx, jax.random.key(0)), EPISODES, teacher)
    assert abs(metrics["loss/distillation"]) < 1e-6 and metrics["grad_norm"] < 1e-4
