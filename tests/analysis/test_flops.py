"""The count of a traced step against XLA's own, and against one by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.analysis import flops
from rlhf_jax.devices import parallel
from rlhf_jax.models import attention, experts
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import Tokens
from tests import tiny

ROWS, COLUMNS = 3, 20


def by_hand(config: models.Config) -> tuple[int, int, int]:
    """Of a forward pass: a layer, what its backward pass need not have again (the last product), the logits."""
    tokens, width, heads = ROWS * COLUMNS, config.d_model, config.n_heads * config.head_dim
    qkv = width * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    up = width * config.d_ff * (1 if config.mlp == "gelu" else 2)
    down = config.d_ff * width
    scores = 2 * COLUMNS * heads  # query . key and weights . value, for each token
    layer = 2 * tokens * (qkv + heads * width + up + down + scores)
    return layer, 2 * tokens * down, 2 * ROWS * (COLUMNS - 1) * width * config.vocab_size


def tuning(config):
    tx = optim.adamw(1e-3)
    state = jax.eval_shape(lambda p: optim.init(p, tx, jax.random.key(0)), models.parameter_shapes(config))
    of = lambda dtype: jax.ShapeDtypeStruct((ROWS, COLUMNS), dtype)
    batch = Tokens(tokens=of(jnp.int32), segment=of(jnp.int32), target=of(bool))
    return functools.partial(sft.train_step, logprobs_fn=models.logprobs_fn(config), tx=tx), state, batch


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3"])
def test_a_train_step_is_what_a_hand_counts(name, remat):
    config = dataclasses.replace(tiny.CONFIGS[name], n_layers=3, compute=models.Compute(remat=remat, unroll=False))
    layer, last, logits = by_hand(config)
    again = 3 * (layer - last) if remat == "full" else 0
    assert flops.count(*tuning(config)).total == 3 * (3 * layer + logits) + again


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3"])
def test_of_an_unrolled_last_layer_no_more_than_is_asked_for_counts(name):
    config = dataclasses.replace(tiny.CONFIGS[name], n_layers=3, compute=models.Compute(unroll=True))
    layer, _, logits = by_hand(config)
    qkv = 2 * ROWS * COLUMNS * config.d_model * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    unasked = (layer - qkv) / COLUMNS  # of the last column
    assert flops.count(*tuning(config)).total == 3 * (3 * layer + logits - unasked)


@pytest.mark.parametrize("name", ["gpt", "llama", "qwen3"])
def test_the_formula_is_what_a_hand_counts_of_a_causal_pass(name):
    config = dataclasses.replace(tiny.CONFIGS[name], n_layers=3)
    layer, _, logits = by_hand(config)
    width = config.n_heads * config.head_dim
    hidden = 2 * ROWS * COLUMNS * width * (COLUMNS - 1)  # of a layer: scores of later columns
    whole = 3 * (layer - hidden)
    assert flops.forward(config, ROWS, COLUMNS, COLUMNS, logits=False) == whole
    qkv = 2 * ROWS * COLUMNS * config.d_model * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    last = (layer - qkv) / COLUMNS  # of the last column, which sees all
    assert flops.forward(config, ROWS, COLUMNS, 1, logits=False) == whole - (layer - hidden) + qkv + last
    # The first column, which alone is not read here, sees itself.
    first = last - 2 * ROWS * 2 * width * (COLUMNS - 1)
    assert flops.forward(config, ROWS, COLUMNS, COLUMNS - 1) == whole - first + logits


def test_the_peak_is_of_all_devices(monkeypatch):
    reached = flops.peak("float32")
    assert 1e9 < reached < 1e14 and flops.peak(jnp.float32) == reached  # measured once
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 2e12)
    assert flops.peak("bfloat16") == 8 * 2e12
    assert flops.peak("float32") == reached


def test_xla_counts_little_more():
    config = dataclasses.replace(tiny.LLAMA, n_layers=1)  # of a loop XLA counts one turn
    step, *args = tuning(config)
    theirs = jax.jit(step).lower(*args).compile().cost_analysis()["flops"]
    ours = flops.count(step, *args).total
    assert ours < theirs < 1.35 * ours  # it has softmax, norms and the optimiser, which count for much in a small model


def test_steps_spread_over_devices_count_for_all_of_them():
    def step(x, axis):
        return parallel.psum(x @ x.T, axis)

    assert flops.count(parallel.pmap(step), jnp.zeros((8, 5, 3))).total == 8 * 2 * 5 * 3 * 5


def test_sampling_counts_its_longest_run():
    config = dataclasses.replace(tiny.GPT, n_layers=1)
    tokens = jnp.zeros((2, 4), jnp.int32)
    count = lambda new: flops.count(
        lambda params: sampling.generate(
            models.Transformer(config),
            params,
            tokens,
            tokens == 0,
            jax.random.key(0),
            sampling.Config(max_new_tokens=new, eos_id=0),
        ),
        models.parameter_shapes(config),
    )
    width, cache = config.d_model, 4 + 9
    per_token = 2 * 2 * (12 * width**2 + 2 * cache * width + width * config.vocab_size)
    assert count(9).total - count(1).total == pytest.approx(8 * per_token, rel=0.05)  # prompts see fewer columns


@pytest.mark.parametrize(
    ("dtype", "precision", "passes"), [("float32", "highest", 6), ("float32", None, 1), ("bfloat16", "highest", 1)]
)
def test_passes_over_the_matrix_unit(dtype, precision, passes):
    x = jax.ShapeDtypeStruct((4, 4), dtype)
    found = flops.count(lambda x: jnp.matmul(x, x, precision=precision), x)
    assert (found.total, found.passes) == (128, passes * 128)


def test_a_kernel_counts_as_what_it_computes():
    shape = jax.ShapeDtypeStruct((2, 256, 3, 2, 8), jnp.float32)
    per_head = jax.ShapeDtypeStruct((2, 3, 256, 8), jnp.float32)
    segment = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    kernel = functools.partial(attention.splash, scale=1.0)
    assert flops.count(kernel, shape, per_head, per_head, segment).total == 2 * 2 * (2 * 3 * 2) * 256 * 256 * 8


def test_of_what_depends_on_the_platform_a_tpus_counts():
    x = jnp.ones((8, 8))
    once, twice = (lambda x: x @ x), (lambda x: x @ x @ x)
    product = flops.count(once, x).total
    other = lambda x: jax.lax.platform_dependent(x, cpu=twice, default=once)
    own = lambda x: jax.lax.platform_dependent(x, cpu=once, tpu=twice, default=once)
    assert flops.count(other, x).total == product
    assert flops.count(own, x).total == 2 * product


def mixture(**changes):
    return dataclasses.replace(tiny.CONFIGS["mixtral"], n_layers=3, **changes)


@pytest.mark.slow
def test_of_experts_the_active_ones_count(monkeypatch):
    """Two of four for each token: as an MLP of twice the width, and a router."""
    monkeypatch.setattr(experts, "compute_all", experts.compute_sorted)
    config = mixture(compute=models.Compute(unroll=False))
    twice = dataclasses.replace(config, d_ff=2 * config.d_ff, experts=None)
    tokens = ROWS * COLUMNS
    router = 3 * 2 * tokens * config.d_model * 4
    combining = 3 * 2 * tokens * 2 * config.d_model  # the weighted sum of two results
    one = flops.count(*tuning(config)).total
    assert one == flops.count(*tuning(twice)).total + 3 * (router + combining)
    assert flops.forward(config, ROWS, COLUMNS, COLUMNS) == flops.forward(twice, ROWS, COLUMNS, COLUMNS) + router
    place = parallel.layout(parallel.Config(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    spread = place.step(tuning(config)[0])
    state, batch = tuning(config)[1:]
    assert flops.count(spread, state, batch).total < 1.05 * one
