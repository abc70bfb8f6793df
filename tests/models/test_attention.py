"""The kernels against `attention.attend`, at every real token."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.models import attention, cache, layers
from rlhf_jax.types import Fork, InputError, Tree
from tests import tiny

SEGMENTS = {
    "padding on both sides": [[0] * 7 + [1] * 90 + [0] * 53, [1] * 150],
    "documents in a row": [[1] * 40 + [2] * 3 + [3] * 100 + [0] * 7, [1] * 128 + [2] * 22],
    "padding within": [[1, 0, 1] * 50, [0] * 149 + [1]],
}


def arrays(rows, columns, groups, shared, size, dtype):
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(0.0, 1.5, shape), dtype)
    per_head = rows, groups, columns, size
    return (
        draw(rows, columns, groups, shared, size),
        draw(*per_head),
        draw(*per_head),
        draw(rows, columns, groups, shared, size),
    )


def test_softmax_and_its_gradient_are_those_of_jax():
    rng = np.random.default_rng(0)
    scores, grads = (jnp.array(rng.normal(0.0, 4.0, (3, 2, 7)), jnp.float32) for _ in range(2))
    masked = jnp.finfo(jnp.float32).min
    scores = scores.at[0, 0, 3:].set(masked).at[1, 1].set(masked)
    found, expected = (jax.vjp(softmax, scores) for softmax in (attention.softmax, jax.nn.softmax))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1](grads)[0], expected[1](grads)[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("shared", "cap", "size"), [(1, None, 8), (2, 2.0, 6)])
def test_splash_is_plain_attention(segment, shared, cap, size):
    config = dataclasses.replace(tiny.LLAMA, query_size=7, attention_cap=cap)
    segment = jnp.array(segment)
    *inputs, cotangent = arrays(2, 150, 2, shared, size, jnp.float32)
    real = (segment > 0)[..., None, None, None]

    def plain(query, key, value):
        return attention.attend(query, key, value, layers.causal_mask(segment), config)

    def splash(query, key, value):
        return attention.splash(query, key, value, segment, 7**-0.5, cap, interpret=True)

    results = []
    for function in (plain, splash):
        mixed, pull = jax.vjp(lambda *x, f=function: jnp.where(real, f(*x), 0.0), *inputs)
        results.append((mixed, *pull(cotangent)))
    tiny.assert_close(results[1], results[0], atol=2e-5)


def forked(rows, fork, width):
    """The real tokens of rows, [B, S], and the tree that they are; a row without the first branch."""
    real = np.concatenate(
        [tiny.ragged(0, rows, fork.prefix, left=True)]
        + [tiny.ragged(n + 1, rows, width) for n in range(fork.branches)],
        axis=1,
    )
    real[0, fork.prefix : fork.prefix + width] = False
    columns = fork.prefix + fork.branches * width
    reach = np.append(columns - np.arange(fork.prefix), np.tile(width - np.arange(width), fork.branches))
    return jnp.array(real), Tree(reach=jnp.array(np.where(real, reach, 0)), fork=fork)


@pytest.mark.slow
def test_attention_in_a_fork_is_plain_attention():
    """Of all columns, and of the branches alone."""
    config = dataclasses.replace(tiny.LLAMA, query_size=7, attention_cap=2.0)
    real, tree = forked(2, Fork(5, 3), 4)
    mask, (*inputs, cotangent) = layers.ancestor_mask(tree), arrays(2, 17, 2, 2, 8, jnp.float32)
    for first in (0, 5):
        here = real[:, first:, None, None, None]
        plain = lambda q, k, v, n=first: attention.attend(q[:, n:], k, v, mask[:, n:], config)
        fork = lambda q, k, v, n=first: attention.attend_fork(q[:, n:], k, v, mask, tree.fork, config)
        results = []
        for function in (plain, fork):
            mixed, pull = jax.vjp(lambda *x, f=function, on=here: jnp.where(on, f(*x), 0.0), *inputs)
            results.append((mixed, *pull(cotangent[:, first:])))
        tiny.assert_close(results[1], results[0], atol=2e-5)


@pytest.mark.slow
def test_splash_takes_a_fork():
    """Of several blocks, some of them empty."""
    real, tree = forked(2, Fork(140, 4), 60)
    mask, (*inputs, cotangent) = layers.ancestor_mask(tree), arrays(2, 380, 2, 2, 8, jnp.float32)
    here = real[..., None, None, None]
    plain = lambda *x: attention.attend(*x, mask, dataclasses.replace(tiny.LLAMA, query_size=7))
    splash = lambda *x: attention.splash(*x, real, 7**-0.5, fork=tree.fork, interpret=True)
    results = []
    for function in (plain, splash):
        mixed, pull = jax.vjp(lambda *x, f=function: jnp.where(here, f(*x), 0.0), *inputs)
        results.append((mixed, *pull(cotangent)))
    tiny.assert_close(results[1], results[0], atol=2e-5)


def test_a_shared_prompt_has_the_kernel():
    flash = dataclasses.replace(tiny.LLAMA, compute=models.Compute(share_prompts=True, attention="flash"))
    rows = (jax.ShapeDtypeStruct((4, 13), dtype) for dtype in (jnp.int32, bool))
    policy = functools.partial(models.logprobs_fn(flash), start=5, group=2)
    program = str(jax.make_jaxpr(policy)(models.parameter_shapes(flash), *rows))
    assert "pallas_call" in program and "f32[2,19,16]" in program  # 5 + 2 x 7 columns


# On a GPU: JAX_PLATFORMS=cuda pytest tests/models/test_attention.py -k cudnn_is_plain
ON_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN computes on GPUs alone")


@pytest.mark.slow
@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(
    ("implementation", "dtype", "atol"),
    [("xla", jnp.float32, 2e-5), pytest.param("cudnn", jnp.bfloat16, 0.1, marks=ON_GPU)],
)
@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_is_plain_attention(segment, implementation, dtype, atol, window):
    """What cuDNN is asked for is, by XLA's own implementation on other devices."""
    config = dataclasses.replace(tiny.LLAMA, query_size=7)
    segment = jnp.array(segment)
    *inputs, cotangent = arrays(2, 150, 2, 2, 8, dtype)
    real = (segment > 0)[..., None, None, None]
    mask = layers.causal_mask(segment)
    if window is not None:
        at = jnp.arange(150)
        mask &= (at[:, None] - at[None] < window)[None]

    def plain(query, key, value):
        return attention.attend(query, key, value, mask, config)

    def cudnn(query, key, value):
        return attention.cudnn(query, key, value, mask, 7**-0.5, implementation)

    results = []
    for function in (plain, cudnn):
        mixed, pull = jax.vjp(lambda *x, f=function: jnp.where(real, f(*x), 0.0), *inputs)
        results.append((mixed, *pull(cotangent)))
    tiny.assert_close(results[1], results[0], atol=atol)
    assert all(bool(jnp.isfinite(x).all()) for x in results[1])


def traced(compute, columns, method="hidden", **settings):
    """The operations of a method of a model over so many columns."""
    config = dataclasses.replace(tiny.LLAMA, max_length=512, compute=compute, **settings)
    tokens, mask = (jax.ShapeDtypeStruct((2, columns), dtype) for dtype in (jnp.int32, bool))
    empty = jax.eval_shape(lambda: cache.Cache.empty(config, 2, 400))
    args = {
        "hidden": (tokens, mask),
        "prefill": (tokens, mask, empty),
        "decode": (jax.ShapeDtypeStruct((2,), jnp.int32), empty),
    }
    step = models.bind(models.Transformer(config), getattr(models.Transformer, method))
    return str(jax.make_jaxpr(step)(models.parameter_shapes(config), *args[method]))


def test_the_kernel_serves_where_it_is_asked_for():
    plain, flash = models.Compute(attention="plain"), models.Compute(attention="flash")
    assert "pallas_call" in traced(flash, 20)
    assert "pallas_call" in traced(flash, 20, "prefill")
    assert "pallas_call" not in traced(flash, 1, "decode")
    assert "pallas_call" not in traced(plain, 300)
    assert "pallas_call" not in traced(models.Compute(), 300)  # on a CPU


def test_auto_is_the_kernel_on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    auto = models.Compute()
    assert "pallas_call" in traced(auto, 300)
    assert "pallas_call" not in traced(auto, 100)
    assert "pallas_call" not in traced(auto, 300, window=5)
    with pytest.raises(InputError, match="window"):
        traced(models.Compute(attention="flash"), 300, window=5)


def test_what_serves_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    bfloat16 = functools.partial(models.Compute, dtype="bfloat16")
    kernel = lambda columns, compute, **settings: attention.kernel(
        dataclasses.replace(tiny.LLAMA, compute=compute, **{"head_dim": 64} | settings), columns, columns
    )
    for capability, serves in (("8.0", True), ("12.1", True), ("7.5", False), ("gfx942", False)):
        monkeypatch.setattr(jax, "devices", lambda c=capability: [types.SimpleNamespace(compute_capability=c)])
        assert kernel(300, bfloat16()) == ("cudnn" if serves else None)
        with contextlib.nullcontext() if serves else pytest.raises(InputError, match=r"capability 8\.0 or more"):
            assert kernel(300, bfloat16(attention="flash")) == "cudnn"
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert kernel(300, bfloat16(), window=5) == kernel(300, bfloat16(attention="flash"), window=5) == "cudnn"
    assert kernel(100, bfloat16()) is None
    assert kernel(100, bfloat16(attention="flash")) == "cudnn"
    assert kernel(300, bfloat16(attention="plain")) is None
    for compute, settings in (
        (models.Compute(), {}),
        (bfloat16(), {"attention_cap": 2.0}),
        (bfloat16(), {"head_dim": 12}),
        (bfloat16(), {"head_dim": 256}),
    ):
        assert kernel(300, compute, **settings) is None
        with pytest.raises(InputError, match="attention=flash takes bfloat16, at most 128 features"):
            kernel(300, dataclasses.replace(compute, attention="flash"), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("left", [False, True])
def test_a_model_with_cudnn_is_the_model(left, monkeypatch):
    monkeypatch.setattr(attention, "cudnn", functools.partial(attention.cudnn, implementation="xla"))
    config = dataclasses.replace(tiny.LLAMA, query_size=5, window=6, full_layers=(1,))
    tokens, mask = tiny.arrays((tiny.random_tokens(1, 2, 20), tiny.ragged(2, 2, 20, left=left)))
    logits = []
    for name in (None, "cudnn"):
        monkeypatch.setattr(attention, "kernel", lambda *_, name=name: name)
        logits.append(models.bind(models.Transformer(config))(tiny.policy(config), tokens, mask))
    np.testing.assert_allclose(*(x[mask] for x in logits), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_a_model_with_the_kernel_is_the_model(name, monkeypatch):
    monkeypatch.setattr(attention, "splash", functools.partial(attention.splash, interpret=True))
    config = dataclasses.replace(tiny.CONFIGS[name], query_size=5, attention_cap=0.7)
    tokens, mask = tiny.arrays((tiny.random_tokens(1, 2, 20), tiny.ragged(2, 2, 20, left=True)))
    logits = [
        models.bind(models.Transformer(dataclasses.replace(config, compute=compute)))(tiny.policy(config), tokens, mask)
        for compute in (models.Compute(attention="plain"), models.Compute(attention="flash"))
    ]
    np.testing.assert_allclose(*(x[mask] for x in logits), rtol=0, atol=2e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_over_a_mesh_each_device_has_its_rows_and_heads(name):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    *inputs, _ = arrays(4, 140, 2, 2, 8, jnp.float32)
    segment = jnp.asarray(tiny.ragged(4, 4, 140))
    kernel, last = {
        "splash": (functools.partial(attention.splash, scale=0.4, interpret=True), segment),
        "cudnn": (functools.partial(attention.cudnn, scale=0.4, implementation="xla"), layers.causal_mask(segment)),
    }[name]

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return kernel(*args)

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    placed = [jax.device_put(x, rows) for x in (*inputs, last)]
    compiled = jax.jit(spread).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), kernel(*inputs, last), rtol=0, atol=1e-5)
    assert "tensor" in str(compiled.output_shardings.spec)


@pytest.mark.slow
def test_trees_without_a_fork_have_no_splash_kernel(monkeypatch):
    """A TPU computes them plainly, even where the kernel is asked for; cuDNN takes their mask."""
    flash = dataclasses.replace(tiny.LLAMA, compute=models.Compute(attention="flash", dtype="bfloat16"), head_dim=8)
    monkeypatch.setattr(attention.parallel, "platform", lambda: "tpu")
    assert attention.kernel(flash, 256, 256) == "splash" and attention.kernel(flash, 256, 256, tree=True) is None
    monkeypatch.setattr(attention.parallel, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "compute_capability", lambda: 9.0)
    assert attention.kernel(flash, 256, 256, tree=True) == "cudnn"
