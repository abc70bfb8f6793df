import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs
from rlhf_jax.devices import parallel
from tests.oracles import cases


def test_token_logprobs_by_hand():
    logits = jnp.log(jnp.array([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))
    logp = logprobs.token_logprobs(logits, jnp.array([[2, 0]]))
    np.testing.assert_allclose(logp, np.log([[0.5, 0.6]]), rtol=1e-6)
    # Temperature 0.5 squares the probabilities: .25 / (.04 + .09 + .25).
    sharp = logprobs.token_logprobs(logits, jnp.array([[2, 0]]), temperature=0.5)
    np.testing.assert_allclose(sharp, np.log([[0.25 / 0.38, 0.36 / 0.46]]), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_token_logprobs_and_their_gradients_on_each_platform(monkeypatch, platform):
    """The gradient is grads (1 - p) / temperature at the token, -grads p / temperature elsewhere."""
    monkeypatch.setattr(parallel, "platform", lambda: platform)
    logits = jnp.log(jnp.array([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))
    read = lambda logits: logprobs.token_logprobs(logits, jnp.array([[2, 0]]), temperature=2.0)
    values, gradient = jax.vjp(read, 2.0 * logits)
    np.testing.assert_allclose(values, np.log([[0.5, 0.6]]), rtol=1e-6)
    (found,) = gradient(jnp.array([[3.0, -1.0]]))
    expected = [[[-0.6, -0.9, 1.5], [-0.4, 0.3, 0.1]]]
    np.testing.assert_allclose(found, 0.5 * np.array(expected), rtol=1e-5)


@cases("token_logprobs_tau_1.0", "token_logprobs_tau_0.7", "token_logprobs_extreme")
def test_token_logprobs_oracle(case):
    case.check(
        logprob=logprobs.token_logprobs(case["logits"], case["tokens"], case["tau"]),
        entropy=logprobs.entropy(case["logits"], case["tau"]),
    )


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.array([[[1.0, 2.0, 3.0]]], jnp.bfloat16)
    logp = logprobs.token_logprobs(logits, jnp.array([[1]]))
    assert logp.dtype == jnp.float32
    np.testing.assert_allclose(logp, [[-1.4076059]], rtol=1e-6)


def test_entropy_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]]))
    np.testing.assert_allclose(logprobs.entropy(logits), [[1.5 * np.log(2), np.log(3)]], rtol=1e-6)


def test_kl_estimators_by_hand():
    logp, ref = jnp.array([[-1.5, -0.25]]), jnp.array([[-1.0, -1.0]])
    np.testing.assert_allclose(logprobs.kl_estimate(logp, ref, "k1"), [[-0.5, 0.75]])
    np.testing.assert_allclose(logprobs.kl_estimate(logp, ref, "k2"), [[0.125, 0.28125]])
    k3 = [[np.exp(0.5) - 1.5, np.exp(-0.75) - 0.25]]
    np.testing.assert_allclose(logprobs.kl_estimate(logp, ref, "k3"), k3, rtol=1e-6)


@cases("kl_estimators")
def test_kl_estimators_oracle(case):
    mask = case["mask"]
    for kind in ("k1", "k2", "k3"):
        kl = logprobs.kl_estimate(case["logp"], case["logp_ref"], kind)
        case.check(**{kind: jnp.where(mask, kl, 0), f"mean_{kind}": logprobs.masked_mean(kl, mask)})


@cases("kl_full")
def test_kl_full_oracle(case):
    case.check(kl=logprobs.kl_full(case["logits_p"], case["logits_q"]))


def test_k1_and_k3_are_unbiased_for_the_full_kl():
    p, q = jax.random.normal(jax.random.key(0), (2, 1, 1, 5))
    tokens = jax.random.categorical(jax.random.key(1), p, shape=(200_000, 1))
    logp = logprobs.token_logprobs(jnp.broadcast_to(p, (200_000, 1, 5)), tokens)
    ref = logprobs.token_logprobs(jnp.broadcast_to(q, (200_000, 1, 5)), tokens)
    exact = float(logprobs.kl_full(p, q)[0, 0])
    assert abs(float(logprobs.kl_estimate(logp, ref, "k1").mean()) - exact) < 0.02
    assert abs(float(logprobs.kl_estimate(logp, ref, "k3").mean()) - exact) < 0.02


def test_response_mask_ends_with_the_first_eos():
    tokens = jnp.array([[5, 2, 7, 2], [2, 5, 5, 5], [5, 6, 7, 8]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    np.testing.assert_array_equal(logprobs.response_mask(tokens, eos_id=2), expected)


def test_masked_mean_ignores_what_padding_holds():
    x = jnp.array([[1.5, jnp.nan], [jnp.inf, -0.5]])
    mask = jnp.array([[True, False], [False, True]])
    assert float(logprobs.masked_mean(x, mask)) == 0.5
    assert float(logprobs.masked_mean(x, mask, jnp.array(4))) == 0.25
    gradient = jax.grad(lambda x: logprobs.masked_mean(x, mask))(x)
    np.testing.assert_array_equal(gradient, [[0.5, 0.0], [0.0, 0.5]])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 10, 99])
def test_columns_in_chunks(chunk):
    key = jax.random.key(0)
    features, tokens = jax.random.normal(key, (3, 10, 4)), jax.random.randint(key, (3, 10), 0, 6)
    table = jax.random.normal(jax.random.fold_in(key, 1), (4, 6))

    def total(table, chunk):
        read = lambda x, tokens: (logprobs.token_logprobs(x @ table, tokens), logprobs.entropy(x @ table))
        logp, entropy = logprobs.map_columns(read, chunk, features, tokens)
        return jnp.sum(logp @ jnp.arange(10.0)), (logp, entropy)

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(table, chunk)
    (_, whole), expected = jax.value_and_grad(total, has_aux=True)(table, 0)
    for one, other in zip((*found, gradient), (*whole, expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
