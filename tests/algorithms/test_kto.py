"""KTO: its terms by hand and by oracle, and a step on one device and in micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import kto, optim
from rlhf_jax.types import InputError, Thumbs
from tests import tiny
from tests.algorithms.test_dpo import POLICY, TX
from tests.oracles import Case


def test_by_hand():
    gain, good = jnp.array([2.0, -1.0]), jnp.array([True, False])
    found = kto.terms(gain, good, jnp.float32(1.0), kto.Config(beta=0.5, bad=3.0))
    np.testing.assert_allclose(found, [1 - 1 / (1 + np.exp(-0.5)), 3 * (1 - 1 / (1 + np.exp(-1.0)))], rtol=1e-6)
    assert kto.reference_point(jnp.float32(-2.0)) == 0
    with pytest.raises(InputError, match="leave nothing to learn"):
        kto.Config(good=0.0, bad=0.0)


@pytest.mark.parametrize("name", ["kto", "kto_reference_point_clamped"])
def test_oracle(name):
    case = Case(name)
    cfg = kto.Config(case["beta"], case["weight_desirable"], case["weight_undesirable"])
    point = kto.reference_point(jnp.mean(case["kl_policy_logp"] - case["kl_ref_logp"]))

    def loss(policy):
        terms = kto.terms(policy - case["ref_logp"], case["desirable"].astype(bool), point, cfg)
        return jnp.mean(terms), terms

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(case["policy_logp"])
    case.check(loss=value, example_loss=terms, z0=point, grad_policy_logp=gradient)


def batch(seed: int, rows: int = 8) -> Thumbs:
    """Prompts of 2 to 4 tokens with two responses each; the last row is empty."""
    rng = np.random.default_rng(seed)
    start = rng.integers(2, 5, rows).astype(np.int32)
    tokens = tiny.random_tokens(seed, rows, 2, 9)
    tokens[:, 1, :4] = np.where(np.arange(4) < start[:, None], tokens[:, 0, :4], tokens[:, 1, :4])
    mask = np.arange(9) < rng.integers(start[:, None] + 1, 10, (rows, 2))[..., None]
    mask[-1] = False
    return tiny.arrays(Thumbs(tokens=tokens, mask=mask, start=start, good=np.arange(rows) % 2 == 0))


@pytest.mark.slow
def test_a_step_is_the_mean_over_rows():
    rows, policy, reference = batch(1), tiny.policy(), tiny.policy(seed=3)
    step = functools.partial(kto.train_step, logprobs_fn=POLICY, tx=TX, cfg=kto.Config(bad=2.0))
    state = optim.init(policy, TX, jax.random.key(0))
    after, metrics = jax.jit(step)(state, rows, reference)
    gains = jax.jit(functools.partial(kto.gains, logprobs_fn=POLICY), static_argnums=3)
    own, other = (np.asarray(gains(policy, reference, rows, which))[:-1] for which in (0, 1))
    point, good = max(other.mean(), 0.0), np.asarray(rows.good)[:-1]
    value = 1 / (1 + np.exp(-0.1 * np.where(good, own - point, point - own)))
    np.testing.assert_allclose(metrics["loss/kto"], np.mean(np.where(good, 1.0, 2.0) * (1 - value)), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/reference"], point, atol=1e-5)
    np.testing.assert_allclose(metrics["reward/good"], 0.1 * own[good].mean(), atol=1e-5)
    parts, _ = jax.jit(functools.partial(step, microbatches=2))(state, rows, reference)
    tiny.assert_close(after.params, parts.params, atol=1e-5)
