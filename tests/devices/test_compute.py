import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rlhf_jax import models
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.devices import compute, parallel
from rlhf_jax.models import lora
from rlhf_jax.rollouts import sampling
from tests import tiny
from tests.algorithms.test_sft import batch

INT8 = models.Compute(frozen="int8")
TOKENS, MASK = tiny.arrays((tiny.random_tokens(0, 8, 6), tiny.ragged(1, 8, 6)))
LOGPROBS = models.logprobs_fn(tiny.LLAMA)


def test_a_kernel_by_hand():
    kernel = jnp.array([[[0.5, -1.0, 0.0], [2.0, 0.25, 0.0]]])  # one layer, two inputs, three outputs
    params = {"mlp": {"up": {"kernel": kernel, "bias": jnp.array([[0.1, 0.2, 0.3]])}}, "kernel": jnp.ones(3)}
    frozen = INT8.freeze({"policy": {}, "critic": params})
    assert frozen["policy"] == {}
    up = frozen["critic"]["mlp"]["up"]
    assert up["kernel"].dtype == jnp.int8 and up["kernel"].tolist() == [[[32, -127, 0], [127, 32, 0]]]
    np.testing.assert_allclose(up["kernel_scale"], [[2 / 127, 1 / 127, 0]], rtol=1e-6)
    assert up["bias"].dtype == frozen["critic"]["kernel"].dtype == jnp.bfloat16  # a scalar model's head stays whole
    back = compute.dequantize(frozen["critic"])
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(back))
    assert float(jnp.abs(back["mlp"]["up"]["kernel"] - kernel).max()) <= 0.5 * 2 / 127


@pytest.mark.slow
@pytest.mark.parametrize("config", [tiny.GPT, tiny.CONFIGS["gemma2"]], ids=["gpt", "gemma2"])
def test_a_network_computes_with_int8_as_with_what_it_stands_for(config):
    params = INT8.freeze(tiny.policy(config))
    logits = jax.jit(models.bind(models.Transformer(config)))
    np.testing.assert_allclose(
        logits(params, TOKENS, MASK), logits(compute.dequantize(params), TOKENS, MASK), atol=1e-4
    )
    error = jnp.abs(logits(params, TOKENS, MASK) - logits(tiny.policy(config), TOKENS, MASK))[MASK].max()
    assert 0 < error < 0.3


@pytest.mark.slow
def test_responses_are_sampled_with_int8_kernels():
    params, policy = INT8.freeze(tiny.policy(tiny.LLAMA)), models.Transformer(tiny.LLAMA)
    cfg, key = sampling.Config(max_new_tokens=4, eos_id=0), jax.random.key(0)
    mine, other = (
        sampling.generate(policy, one, TOKENS, MASK, key, cfg) for one in (params, compute.dequantize(params))
    )
    np.testing.assert_array_equal(mine.tokens, other.tokens)
    np.testing.assert_allclose(mine.logp, other.logp, atol=1e-4)


@pytest.mark.slow
def test_the_policy_that_trains_samples_with_int8_kernels_where_asked():
    """All else stays in float32, and kernels that are int8 already are not rounded again."""
    config = dataclasses.replace(tiny.LLAMA, compute=models.Compute(rollout="int8"))
    params, cfg, key = tiny.policy(tiny.LLAMA), sampling.Config(max_new_tokens=4, eos_id=0), jax.random.key(0)
    frozen = compute.quantize(params, others=None)
    tiny.assert_close(frozen, compute.quantize(frozen, others=None), atol=0)
    mine = sampling.generate(models.Transformer(config), params, TOKENS, MASK, key, cfg)
    rounded = compute.dequantize(frozen)
    other = sampling.generate(models.Transformer(tiny.LLAMA), rounded, TOKENS, MASK, key, cfg)
    tiny.assert_close(mine, other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_on_an_int8_base(dtype):
    cfg, tx = lora.Config(rank=2), optim.adamw(1e-2)
    network = models.logprobs_fn(dataclasses.replace(tiny.GPT, compute=models.Compute(dtype)))
    trained, base = lora.split(tiny.policy(), cfg, jax.random.key(0))
    base = INT8.freeze(base)
    step = lora.on_base(cfg, lambda on: functools.partial(sft.train_step, logprobs_fn=on(network), tx=tx))
    state = optim.init(trained, tx, jax.random.key(1))
    step, losses = jax.jit(step), []
    for _ in range(3):
        state, metrics = step(state, base, batch(0))
        losses.append(float(metrics["loss/next_token"]))
    assert losses[-1] < losses[0]
    if dtype == "float32":
        merged = lora.merge(base, state.params, cfg)
        assert flatten_dict(merged).keys() == flatten_dict(tiny.policy()).keys()
        attached, other = (network(one, TOKENS, MASK)[0] for one in (lora.attach(base, state.params, cfg), merged))
        np.testing.assert_allclose(attached, other, atol=1e-3)  # embedding and position are added up in bfloat16


@pytest.mark.slow
def test_int8_on_one_device_equals_eight_and_a_mesh():
    params, found = INT8.freeze(tiny.policy(tiny.LLAMA)), []
    score = lambda params, tokens, mask, axis: LOGPROBS(params, tokens, mask)[0]
    for place in (
        parallel.layout(devices=jax.devices()[:1]),
        parallel.layout(),
        parallel.layout(parallel.Config(fsdp=4, tensor=2)),
    ):
        placed = place.frozen(params)
        found.append(place.gather(place.step(score)(placed, place.rows(TOKENS), place.rows(MASK))))
    kernel = placed["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.int8 and kernel.addressable_shards[0].data.size < kernel.size  # sharded as others are
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-5)
