import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.models import attention
from rlhf_jax.models.cache import Cache, Int8
from tests import tiny


def test_keys_in_int8_by_hand():
    x = jnp.array([[[[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]]]])  # of one row and head: two tokens of three features
    stored = Int8.of(x)
    assert stored.values.dtype == jnp.int8 and stored.values.tolist() == [[[[32, -127, 64], [0, 0, 0]]]]
    np.testing.assert_allclose(stored.scale, [[[[2 / 127], [0]]]], rtol=1e-6)
    assert float(jnp.abs(stored.values * stored.scale - x).max()) <= 0.5 * 2 / 127
    assert Int8.of(x.astype(jnp.bfloat16)).scale.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "share"), [("float32", 68 / 256), ("bfloat16", 68 / 128)])
def test_a_cache_in_int8_is_small(dtype, share):
    config = models.llama(2, 128, 2, 1, 24, vocab_size=31, max_length=128)
    sizes = []
    for kept in ("float", "int8"):
        one = dataclasses.replace(config, compute=models.Compute(dtype, cache=kept))
        empty = jax.eval_shape(lambda one=one: Cache.empty(one, 3, 10))
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((empty.key, empty.value))))
    assert sizes[1] == share * sizes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_reads_int8_as_what_it_stands_for(dtype):
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    own, before = (Int8.of(draw(0, 4, 2, 5, 8)), Int8.of(draw(1, 4, 2, 5, 8))), (Int8.of(draw(2, 2, 2, 7, 8)),) * 2
    plain = lambda stored: tuple((x.values * x.scale).astype(dtype) for x in stored)
    query, mask = draw(5, 4, 1, 2, 3, 8), jnp.asarray(np.random.default_rng(6).random((4, 1, 12)) < 0.8)
    atol = 1e-5 if dtype == "float32" else 0.03
    close = lambda a, b: np.testing.assert_allclose(a.astype(float), b.astype(float), atol=atol)
    close(
        attention.attend(query, *own, mask[:, :, 7:], tiny.LLAMA),
        attention.attend(query, *plain(own), mask[:, :, 7:], tiny.LLAMA),
    )
    close(
        attention.attend_behind(query, before, own, mask, tiny.LLAMA),
        attention.attend_behind(query, plain(before), plain(own), mask, tiny.LLAMA),
    )
