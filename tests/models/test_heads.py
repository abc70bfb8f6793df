import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.models import heads
from tests import tiny


def test_scalar_is_linear_in_the_hidden_state():
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    params = tiny.scalar()
    module = models.Transformer(tiny.GPT)
    hidden = jax.jit(models.bind(module, models.Transformer.hidden))(params["trunk"], tokens, mask)
    expected = hidden @ params["kernel"] + 0.25
    values = jax.jit(models.bind(heads.ScalarModel(tiny.GPT)))(params | {"bias": jnp.float32(0.25)}, tokens, mask)
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.slow
def test_the_critic_and_its_trunk():
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    policy, other = tiny.policy(tiny.LLAMA), tiny.policy(tiny.LLAMA, seed=1)  # the policy has an unembedding
    head = {"kernel": jnp.linspace(-1.0, 1.5, 16), "bias": jnp.float32(0.25)}
    params = {"policy": policy, "critic": head | {"trunk": heads.trunk(other)}}
    value = lambda critic, params: jax.jit(functools.partial(critic(tiny.LLAMA), start=2))(params, tokens, mask)
    scalar = jax.jit(functools.partial(models.bind(heads.ScalarModel(tiny.LLAMA)), columns=slice(2, 5)))
    np.testing.assert_array_equal(value(heads.critic, params), scalar(params["critic"], tokens, mask))
    shared = value(heads.shared_critic, {"policy": policy, "critic": head})
    np.testing.assert_array_equal(shared, scalar(head | {"trunk": heads.trunk(policy)}, tokens, mask))
    at_first = value(heads.shared_critic, {"policy": policy, "critic": heads.fresh(tiny.LLAMA)})
    np.testing.assert_array_equal(at_first, 0.0)


@pytest.mark.parametrize("unroll", [False, True])
def test_the_last_real_token(unroll):
    tokens, params = jnp.array(tiny.random_tokens(0, 3, 6)), tiny.scalar()
    mask = jnp.array([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4, [False] * 6])
    config = dataclasses.replace(tiny.GPT, compute=models.Compute(unroll=unroll))
    every = jax.jit(models.bind(heads.ScalarModel(config)))(params, tokens, mask)
    last = jax.jit(heads.score_fn(config))(params, tokens, mask)
    np.testing.assert_allclose(last, every[jnp.arange(3), jnp.array([3, 5, 0])], atol=1e-6)
