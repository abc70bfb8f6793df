import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import optim
from tests.oracles import cases


@cases("lr_cosine_warmup", "lr_cosine_no_warmup")
def test_cosine_oracle(case):
    schedule = optim.cosine(case["peak"], case["total"], case["warmup"], case["final_fraction"])
    case.check(lr=[float(schedule(int(step))) for step in case["step"]])


def test_cosine_by_hand():
    schedule = optim.cosine(2.0, total=12, warmup=4, final_fraction=0.1)
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 4, 8, 12, 99)], [0.0, 0.5, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.slow
def test_adafactor_by_hand():
    """A gradient of rank one is known by its row and its column: the first step is its sign, whatever its scale."""
    rng = np.random.default_rng(0)
    row, column = rng.normal(size=(2, 128)).astype(np.float32)
    params = {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(3)}
    grads = {"kernel": jnp.array(np.outer(row, 1e3 * column)), "bias": jnp.array([1e-3, -2.0, 5.0])}
    tx = optim.adafactor(0.1, weight_decay=0.5)
    state = optim.apply_gradients(optim.init(params, tx, jax.random.key(0)), grads, tx)
    np.testing.assert_allclose(state.params["kernel"], -0.1 * np.sign(grads["kernel"]), rtol=1e-3)
    np.testing.assert_allclose(state.params["bias"], [-0.1, 0.1, -0.1], rtol=1e-3)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 300  # two vectors, those of the bias, counters
    again = optim.apply_gradients(state, jax.tree.map(jnp.zeros_like, grads), tx)
    np.testing.assert_allclose(again.params["kernel"], 0.95 * state.params["kernel"], rtol=1e-3)  # decays
    np.testing.assert_allclose(again.params["bias"], state.params["bias"])
    spared = optim.adafactor(0.1, skip_bad=True)
    bad = optim.apply_gradients(
        optim.init(params, spared, jax.random.key(0)), {**grads, "bias": jnp.full(3, jnp.nan)}, spared
    )
    np.testing.assert_array_equal(bad.params["kernel"], params["kernel"])


def test_weight_decay_spares_norms_and_biases():
    params = {"kernel": jnp.ones(3), "embedding": jnp.ones(3), "bias": jnp.ones(3), "norm": {"scale": jnp.ones(3)}}
    tx = optim.adamw(0.1, weight_decay=0.5)
    state = optim.init(params, tx, jax.random.key(0))
    state = jax.jit(optim.apply_gradients, static_argnums=2)(state, jax.tree.map(jnp.zeros_like, params), tx)
    assert int(state.step) == 1
    np.testing.assert_allclose(state.params["kernel"], 0.95)
    np.testing.assert_allclose(state.params["embedding"], 0.95)
    np.testing.assert_allclose(state.params["bias"], 1.0)
    np.testing.assert_allclose(state.params["norm"]["scale"], 1.0)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    tx = optim.adamw(1.0, optim.Adam(clip_norm=0.5, eps=1.0))  # so large an eps that the update grows with the gradient
    state = optim.apply_gradients(optim.init(params, tx, jax.random.key(0)), grads, tx)
    np.testing.assert_allclose(state.params["b"], -0.4 / 1.4, rtol=1e-5)


def test_schedules_by_hand():
    at = lambda kind, **sizes: [float(optim.schedule(kind, 2.0, 12, **sizes)(step)) for step in (0, 1, 4, 8, 12, 99)]
    np.testing.assert_allclose(at("cosine", warmup=4), [0.0, 0.5, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(at("linear", warmup=4), [0.0, 0.5, 2.0, 1.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(at("linear"), [2.0, 11 / 6, 4 / 3, 2 / 3, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(at("constant", warmup=4), [0.0, 0.5, 2.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(at("constant"), [2.0] * 6, rtol=1e-6)


@pytest.mark.parametrize("tensorflow", [False, True])
def test_adam_against_its_formula(tensorflow):
    # Gradients so small that eps matters, and with it where it is added.
    adam = optim.Adam(b1=0.8, b2=0.9, eps=1e-2, tensorflow=tensorflow, clip_norm=None)
    tx = optim.adamw(0.5, adam)
    state = optim.init({"a": jnp.zeros(2)}, tx, jax.random.key(0))
    x, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for t, grad in enumerate(np.array([[0.02, -0.01], [0.03, 0.0], [-0.01, 0.05]]), start=1):
        state = optim.apply_gradients(state, {"a": jnp.array(grad, jnp.float32)}, tx)
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        if tensorflow:
            x = x - 0.5 * np.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 1e-2)
        else:
            x = x - 0.5 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-2)
        np.testing.assert_allclose(state.params["a"], x, rtol=1e-5)


def test_an_update_that_is_not_finite_never_was():
    params = {"kernel": jnp.array([1.0, -2.5])}
    good, bad = {"kernel": jnp.array([0.5, 0.25])}, {"kernel": jnp.array([0.5, jnp.nan])}
    tx = optim.adamw(optim.cosine(0.1, total=9), weight_decay=0.5, skip_bad=True)
    step = jax.jit(optim.apply_gradients, static_argnums=2)
    state = expected = optim.init(params, tx, jax.random.key(0))
    for grads in (good, bad, bad, {"kernel": jnp.array([jnp.inf, 0.0])}, good):
        state = step(state, grads, tx)
        if grads is good:
            expected = step(expected, grads, tx)
    assert (int(state.step), int(expected.step)) == (5, 2)
    np.testing.assert_array_equal(state.params["kernel"], expected.params["kernel"])
    assert int(state.opt_state.total_notfinite) == 3  # which a checkpoint keeps
    spoilt = optim.adamw(0.1)
    assert jnp.isnan(step(optim.init(params, spoilt, jax.random.key(0)), bad, spoilt).params["kernel"]).any()
