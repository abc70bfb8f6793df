"""The kernels against `transformer.attend`, at every real token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import attention, transformer
from rlhf_jax.types import InputError
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


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize(("shared", "cap", "size"), [(1, None, 8), (2, 2.0, 6)])
def test_flash_is_plain_attention(segment, shared, cap, size):
    config = dataclasses.replace(tiny.LLAMA, query_size=7, attention_cap=cap)
    segment = jnp.array(segment)
    *inputs, cotangent = arrays(2, 150, 2, shared, size, jnp.float32)
    real = (segment > 0)[..., None, None, None]

    def plain(query, key, value):
        return transformer.attend(query, key, value, transformer.causal(segment), config)

    def flash(query, key, value):
        return attention.flash(query, key, value, segment, 7**-0.5, cap, interpret=True)

    results = []
    for function in (plain, flash):
        mixed, pull = jax.vjp(lambda *x, f=function: jnp.where(real, f(*x), 0.0), *inputs)
        results.append((mixed, *pull(cotangent)))
    tiny.assert_close(results[1], results[0], atol=2e-5)


def traced(compute, columns, cache=False, **settings):
    """The names of what a model computes over so many columns."""
    config = dataclasses.replace(tiny.LLAMA, max_length=512, compute=compute, **settings)
    apply_fn = transformer.bind(transformer.Transformer(config))
    tokens = jax.ShapeDtypeStruct((2, columns), jnp.int32)
    held = jax.eval_shape(lambda: transformer.Cache.empty(config, 2, 400)) if cache else None
    step = lambda params, tokens, cache: apply_fn(params, tokens, tokens, None, cache, method="hidden")
    return str(jax.make_jaxpr(step)(transformer.parameter_shapes(config), tokens, held))


def test_the_kernel_serves_where_it_is_asked_for():
    plain, flash = transformer.Compute(attention="plain"), transformer.Compute(attention="flash")
    assert "pallas_call" in traced(flash, 20)
    assert "pallas_call" in traced(flash, 20, cache=True)  # reading a prompt
    assert "pallas_call" not in traced(flash, 1, cache=True)
    assert "pallas_call" not in traced(plain, 300)
    assert "pallas_call" not in traced(transformer.Compute(), 300)  # on a CPU


def test_auto_is_the_kernel_on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    auto = transformer.Compute()
    assert "pallas_call" in traced(auto, 300)
    assert "pallas_call" not in traced(auto, 100)
    assert "pallas_call" not in traced(auto, 300, window=5)
    with pytest.raises(InputError, match="window"):
        traced(transformer.Compute(attention="flash"), 300, window=5)


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_a_model_with_the_kernel_is_the_model(name, monkeypatch):
    monkeypatch.setattr(attention, "flash", functools.partial(attention.flash, interpret=True))
    config = dataclasses.replace(tiny.CONFIGS[name], query_size=5, attention_cap=0.7)
    tokens, mask = tiny.arrays((tiny.random_tokens(1, 2, 20), tiny.ragged(2, 2, 20, left=True)))
    logits = [
        transformer.bind(transformer.Transformer(dataclasses.replace(config, compute=compute)))(
            tiny.policy(config), tokens, mask
        )
        for compute in (transformer.Compute(attention="plain"), transformer.Compute(attention="flash"))
    ]
    np.testing.assert_allclose(*(x[mask] for x in logits), rtol=0, atol=2e-5)


def test_over_a_mesh_each_device_has_its_rows_and_heads():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
    *inputs, _ = arrays(4, 140, 2, 2, 8, jnp.float32)
    segment = jnp.asarray(tiny.ragged(4, 4, 140))
    kernel = functools.partial(attention.flash, scale=0.4, interpret=True)

    def spread(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return kernel(*args)

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    placed = [jax.device_put(x, rows) for x in (*inputs, segment)]
    compiled = jax.jit(spread).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), kernel(*inputs, segment), rtol=0, atol=1e-5)
    assert "tensor" in str(compiled.output_shardings.spec)
