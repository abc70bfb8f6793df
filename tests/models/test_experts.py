import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.models import experts, layers, lora
from rlhf_jax.types import InputError
from tests import tiny

MIXTRAL = tiny.CONFIGS["mixtral"]
TOKENS, ACTIVE, COUNT, WIDTH, HIDDEN = 7, 2, 4, 3, 5


def test_the_likeliest_experts_and_their_weights():
    probability = jnp.array([[0.1, 0.4, 0.2, 0.3], [0.5, 0.05, 0.2, 0.25]])
    weight, chosen = experts.route(probability, 2, normalized=True)
    np.testing.assert_array_equal(chosen, [[1, 3], [0, 3]])
    np.testing.assert_allclose(weight, [[4 / 7, 3 / 7], [2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(experts.route(probability, 2, normalized=False)[0], [[0.4, 0.3], [0.5, 0.25]])


def test_the_balance_loss_by_hand():
    probability = jnp.array([[[0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.0, 0.0, 1.0]], [[0.2, 0.3, 0.5]] * 3])
    chosen = jax.lax.top_k(probability, 2)[1]
    mask = jnp.array([[True, True, False], [True, False, True]])
    # f = (1/2, 1/4, 1/4) and P = (0.6, 0.15, 0.25); then f = (0, 1/2, 1/2) and P = (0.2, 0.3, 0.5)
    rows = [3 * (0.3 + 0.0375 + 0.0625), 3 * 0.4]
    np.testing.assert_allclose(experts.balance_loss(probability, chosen, mask), np.mean(rows), rtol=1e-6)
    even = jnp.full((1, 3, 3), 1 / 3)
    choices = jnp.array([[[0, 1], [1, 2], [2, 0]]])
    np.testing.assert_allclose(experts.balance_loss(even, choices, jnp.ones((1, 3), bool)), 1.0, rtol=1e-6)
    assert experts.balance_loss(probability[:1], chosen[:1], jnp.zeros((1, 3), bool)) == 0


def test_a_loss_that_only_the_gradient_sees():
    def value(x, scale):
        return jnp.sum(experts.with_loss(3 * x, scale * jnp.sum(x**2)))

    x, scale = jnp.array([0.5, -1.5]), jnp.float32(2.0)
    assert value(x, scale) == -3.0
    by_x, by_scale = jax.jit(jax.grad(value, argnums=(0, 1)))(x, scale)
    np.testing.assert_allclose(by_x, [3 + 2.0, 3 - 6.0])
    np.testing.assert_allclose(by_scale, 2.5)


def arguments(adapted: bool = False):
    """Tokens, weights, choices of which one expert gets none and one token has one alone, and the kernels."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.array(rng.normal(0, 0.5, shape), jnp.float32)
    chosen = jnp.array([[0, 1], [1, 3], [3, 4], [0, 3], [4, 4], [1, 0], [3, 1]])  # 4 is none, and 2 idles
    up = {"kernel": normal(COUNT, WIDTH, 2, HIDDEN)}
    down = {"kernel": normal(COUNT, HIDDEN, WIDTH)}
    if adapted:
        up |= {"kernel_a": normal(COUNT, WIDTH, 2), "kernel_b": normal(COUNT, 2, 2 * HIDDEN)}
        down |= {"kernel_a": normal(COUNT, HIDDEN, 2), "kernel_b": normal(COUNT, 2, WIDTH)}
    return normal(TOKENS, WIDTH), jnp.abs(normal(TOKENS, ACTIVE)), chosen, up, down


def one_by_one(x, weight, chosen, up, down):
    """Each token through each of its experts."""

    def whole(bank):
        kernel = bank["kernel"].reshape(*bank["kernel"].shape[:2], -1)
        return kernel + (bank["kernel_a"] @ bank["kernel_b"] if "kernel_a" in bank else 0.0)

    rows = []
    for n in range(TOKENS):
        row = jnp.zeros(WIDTH)
        for k in range(ACTIVE):
            if (e := int(np.asarray(chosen)[n, k])) < COUNT:
                gate, value = jnp.split(x[n] @ whole(up)[e], 2)
                row = row + weight[n, k] * (jax.nn.silu(gate) * value @ whole(down)[e])
        rows.append(row)
    return jnp.stack(rows)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("compute", [experts.compute_sorted, experts.compute_all])
def test_experts_compute_what_each_token_through_its_own_would(compute, adapted):
    x, weight, chosen, up, down = arguments(adapted)
    compute = functools.partial(compute, activate=layers.activation(MIXTRAL))
    weigh = jnp.array(np.random.default_rng(1).normal(size=(TOKENS, WIDTH)), jnp.float32)
    value = lambda compute, x, weight, up, down: jnp.sum(compute(x, weight, chosen, up, down) * weigh)
    both = lambda compute: jax.jit(jax.value_and_grad(functools.partial(value, compute), argnums=(0, 1, 2, 3)))
    found, expected = (both(by)(x, weight, up, down) for by in (compute, one_by_one))
    tiny.assert_close(found, expected, atol=1e-5)
    assert not np.any(found[1][2]["kernel"][2])  # that of the idle expert


def test_rows_of_no_expert_reach_nothing(monkeypatch):
    """Behind the last group a product may leave anything, and so may its gradient."""
    product = jax.lax.ragged_dot

    def littered(x, sizes):
        return jnp.where(jnp.arange(len(x))[:, None] < jnp.sum(sizes), x, jnp.nan)

    @jax.custom_vjp
    def littering(x, kernel, sizes):
        return littered(product(x, kernel, sizes), sizes)

    def forwards(x, kernel, sizes):
        return littering(x, kernel, sizes), (x, kernel, sizes)

    def backwards(saved, gradient):
        x, kernel, sizes = saved
        by_x, by_kernel = jax.vjp(lambda x, kernel: product(x, kernel, sizes), x, kernel)[1](gradient)
        return littered(by_x, sizes), by_kernel, None

    littering.defvjp(forwards, backwards)
    x, weight, chosen, up, down = arguments()
    value = lambda x, weight, up, down: jnp.sum(
        experts.compute_sorted(x, weight, chosen, up, down, layers.activation(MIXTRAL))
    )
    clean = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))(x, weight, up, down)
    monkeypatch.setattr(jax.lax, "ragged_dot", littering)
    found = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)))(x, weight, up, down)
    tiny.assert_close(found, clean, atol=1e-6)


ROWS, COLUMNS = 8, 9
TEXT = tiny.arrays((tiny.random_tokens(0, ROWS, COLUMNS), tiny.ragged(0, ROWS, COLUMNS)))


def on_sorted(monkeypatch):
    monkeypatch.setattr(experts, "compute_all", experts.compute_sorted)


@pytest.mark.slow
def test_a_mesh_whose_devices_have_some_experts_each_says_and_learns_the_same(monkeypatch):
    config = tiny.MORE["qwen3_moe"]
    logprobs_fn = models.logprobs_fn(config)

    def read(params, rows, axis=None):
        value = lambda params: (jnp.sum((logp := logprobs_fn(params, *rows)[0]) ** 2), logp)
        return jax.grad(value, has_aux=True)(params)

    grads, logp = jax.jit(read)(tiny.policy(config), TEXT)
    on_sorted(monkeypatch)
    place = parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))
    params = place.state(tiny.policy(config))
    held = params["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert held.addressable_data(0).shape == (2, config.experts.count // 2, 8, 2, 12)
    spread_grads, spread = place.step(lambda params, rows, axis: read(params, rows))(params, place.rows(TEXT))
    np.testing.assert_allclose(spread, logp, atol=1e-5)
    tiny.assert_close(spread_grads, grads, atol=1e-4)


def test_experts_that_do_not_divide_are_on_every_device():
    place = parallel.layout(parallel.Config(fsdp=2, tensor=4))
    config = tiny.MORE["qwen3_moe"]  # of six experts
    read = lambda params, rows, axis=None: models.logprobs_fn(config)(params, *rows)[0]
    spread = place.step(read)(place.state(tiny.policy(config)), place.rows(TEXT))
    np.testing.assert_allclose(spread, jax.jit(read)(tiny.policy(config), TEXT), atol=1e-5)


@pytest.mark.slow
def test_adapters_of_experts_begin_as_nothing_and_merge():
    cfg = lora.Config(rank=3, alpha=4.5)
    trained, base = lora.split(tiny.policy(MIXTRAL), cfg, jax.random.key(1))
    up = trained["blocks"]["mlp"]["experts"]["up"]
    assert up["kernel_a"].shape == (2, 4, 16, 3) and up["kernel_b"].shape == (2, 4, 3, 24)
    assert "router" not in trained["blocks"]["mlp"]
    apply = jax.jit(models.bind(models.Transformer(MIXTRAL)))
    np.testing.assert_allclose(
        apply(lora.attach(base, trained, cfg), *TEXT), apply(tiny.policy(MIXTRAL), *TEXT), atol=1e-5
    )
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    merged = lora.merge(base, trained, cfg)
    np.testing.assert_allclose(apply(lora.attach(base, trained, cfg), *TEXT), apply(merged, *TEXT), atol=2e-4)


def test_a_token_has_no_more_experts_than_there_are():
    with pytest.raises(InputError, match="active=3 experts a token: expected at most count=2"):
        models.Experts(count=2, active=3)
    with pytest.raises(InputError, match="bias=all: experts have no biases, expected one of attention, qkv, none"):
        dataclasses.replace(tiny.GPT, experts=models.Experts(count=3, active=1))


# Model directories; tests/models/test_published.py has those that are published ---------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": 3}, r"tensors that its config.json does not ask for \(.*experts.3.w1.weight"),
        ({"num_local_experts": 5}, r"no tensor 'model.layers.0.block_sparse_moe.experts.4.w\d.weight'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: expected at most the number of experts, 4"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0: expected a whole number from 1 to 2\^31 - 1"),
        (
            {"intermediate_size": 11},
            r"experts.0.w\d.weight \[.*\] does not fit config.json, which asks for \[.*11.*\]",
        ),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported: expected 0.0"),
    ],
    ids=str,
)
def test_a_config_that_its_tensors_do_not_fit_is_refused_by_name(change, said, tmp_path):
    models.save(models.Model(MIXTRAL, tiny.policy(MIXTRAL), None, lambda: None), tiny.policy(MIXTRAL), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said):
        models.load(tmp_path / "m")


def test_a_router_of_another_size_is_refused_by_name(tmp_path):
    models.save(models.Model(MIXTRAL, tiny.policy(MIXTRAL), None, lambda: None), tiny.policy(MIXTRAL), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {name: np.zeros((5, 16), np.float32)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} \[5, 16\] does not fit config.json, which asks for \[4, 16\]"):
        models.load(tmp_path / "m")


def test_layers_without_experts_among_others_are_refused_by_name(tmp_path):
    config = tiny.MORE["qwen3_moe"]
    models.save(models.Model(config, tiny.policy(config), None, lambda: None), tiny.policy(config), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    for change in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        written = json.loads(file.read_text())
        file.write_text(json.dumps(written | change))
        ((name, value),) = change.items()
        with pytest.raises(InputError) as error:
            models.load(tmp_path / "m")
        assert f"{name}={value} is not supported: expected " in str(error.value)
        file.write_text(json.dumps(written))
