import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import heads, transformer
from tests import tiny


def test_scalar_is_linear_in_the_hidden_state():
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    params = tiny.scalar()
    module = transformer.Transformer(tiny.GPT)
    hidden, _ = jax.jit(functools.partial(transformer.bind(module), method="hidden"))(params["trunk"], tokens, mask)
    expected = hidden @ params["kernel"] + 0.25
    values = jax.jit(transformer.bind(heads.ScalarModel(tiny.GPT)))(params | {"bias": jnp.float32(0.25)}, tokens, mask)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_the_critic_and_its_trunk():
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    policy, other = tiny.policy(tiny.LLAMA), tiny.policy(tiny.LLAMA, seed=1)  # the policy has an unembedding
    head = {"kernel": jnp.linspace(-1.0, 1.5, 16), "bias": jnp.float32(0.25)}
    params = {"policy": policy, "critic": head | {"trunk": heads.trunk(other)}}
    value = lambda critic, params: jax.jit(critic(tiny.LLAMA))(params, tokens, mask)
    scalar = jax.jit(transformer.bind(heads.ScalarModel(tiny.LLAMA)))
    np.testing.assert_array_equal(value(heads.critic, params), scalar(params["critic"], tokens, mask))
    shared = value(heads.shared_critic, {"policy": policy, "critic": head})
    np.testing.assert_array_equal(shared, scalar(head | {"trunk": heads.trunk(policy)}, tokens, mask))
    at_first = value(heads.shared_critic, {"policy": policy, "critic": heads.fresh(tiny.LLAMA)})
    np.testing.assert_array_equal(at_first, 0.0)


def test_at_last_real_token():
    per_token = jnp.array([[0.5, -1.5, 2.5], [3.5, 4.5, -5.5]])
    mask = jnp.array([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(heads.at_last(per_token, mask), [-1.5, -5.5])
