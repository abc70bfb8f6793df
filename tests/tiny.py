"""Models small enough to test with, and comparisons of trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models

GPT = models.gpt(2, 16, 2, vocab_size=31, max_length=24)
LLAMA = models.llama(2, 16, 4, 2, 24, vocab_size=31, max_length=24)
_SCALING = models.Llama3Scaling(factor=4.0, low=1.0, high=4.0, original_length=12)
CONFIGS = {  # every family that there is, with each of its settings
    "gpt": GPT,
    "llama": LLAMA,
    "llama3": dataclasses.replace(LLAMA, rope_scaling=_SCALING, rope_theta=100.0, tie_embeddings=True),
    "mistral": dataclasses.replace(LLAMA, window=3),
    "qwen2": dataclasses.replace(LLAMA, bias="qkv"),
    "qwen2-window": dataclasses.replace(LLAMA, bias="qkv", window=3, full_layers=(0,)),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", head_dim=6, tie_embeddings=True),
    "gemma2": dataclasses.replace(
        LLAMA,
        mlp="geglu",
        unit_offset=True,
        post_norm=True,
        scale_embedding=True,
        tie_embeddings=True,
        window=3,
        full_layers=(1,),
        query_size=7,
        attention_cap=2.0,
        logit_cap=3.0,
        head_dim=6,
    ),
    "mixtral": dataclasses.replace(LLAMA, d_ff=12, experts=models.Experts(count=4, active=2)),
}
_GEMMA3 = dataclasses.replace(CONFIGS["gemma2"], qk_norm="head", attention_cap=None, logit_cap=None)
_OLMO = dataclasses.replace(LLAMA, pre_norm=False, post_norm=True, qk_norm="whole")
_NEOX = dataclasses.replace(GPT, position="rope", mlp="gelu_exact", rotary_size=6, tie_embeddings=False)
_YARN = models.YarnScaling(factor=4.0, original_length=12, beta_fast=2.0, beta_slow=0.1)
_LONG = models.LongScaling(short=(1.0, 1.5), long=(2.0, 3.0), original_length=12, attention_factor=1.25)
MORE = {  # families that are settings of the same code
    "gpt2-inverse": dataclasses.replace(GPT, inverse_layer_scale=True, d_ff=24),
    "llama-bias": dataclasses.replace(LLAMA, bias="all", rope_scaling=models.LinearScaling(4.0)),
    "llama-yarn": dataclasses.replace(LLAMA, bias="attention", rope_scaling=_YARN),
    "gemma3_text": dataclasses.replace(_GEMMA3, window_theta=100.0, rope_scaling=models.LinearScaling(2.0)),
    "olmo2": _OLMO,
    "olmo3": dataclasses.replace(_OLMO, window=3, full_layers=(1,), rope_scaling=_YARN, window_theta=10000.0),
    "smollm3": dataclasses.replace(LLAMA, unrotated_layers=(1,), bias="mlp"),
    "phi3": dataclasses.replace(LLAMA, window=3, family="phi3"),
    "phi3-long": dataclasses.replace(LLAMA, n_heads=2, n_kv_heads=1, head_dim=8, rotary_size=4, rope_scaling=_LONG),
    "gpt_neox": dataclasses.replace(_NEOX, parallel_residual=True),
    "gpt_neox-sequential": dataclasses.replace(_NEOX, bias="mlp", mlp="gelu"),
    "opt": dataclasses.replace(GPT, mlp="relu", position_offset=2),
    "qwen3_moe": dataclasses.replace(
        LLAMA, d_ff=12, qk_norm="head", head_dim=6, experts=models.Experts(count=6, active=3, normalized=False)
    ),
}


def policy(config: models.Config = GPT, seed: int = 0):
    """Parameters of a language model, large enough that errors show."""
    return _policy(dataclasses.replace(config, dropout=0.0, compute=models.Compute()), seed)


@functools.cache
def _policy(config: models.Config, seed: int):
    rng = np.random.default_rng(seed)
    shapes = models.parameter_shapes(config)
    return jax.tree.map(lambda x: jnp.array(rng.normal(0.0, 0.15, x.shape), x.dtype), shapes)


def scalar(config: models.Config = GPT, seed: int = 5):
    """Parameters of a reward model or critic."""
    kernel = np.random.default_rng(seed).normal(0.0, 0.25, config.d_model)
    trunk = policy(dataclasses.replace(config, tie_embeddings=True), seed)
    return {"trunk": trunk, "kernel": jnp.array(kernel, jnp.float32), "bias": jnp.float32(0.0)}


def arrays(tree):
    """Host arrays to device arrays."""
    return jax.tree.map(jnp.asarray, tree)


def ragged(seed: int, rows: int, columns: int, left: bool = False) -> np.ndarray:
    """A mask whose rows have different lengths, at least two."""
    lengths = np.random.default_rng(seed).integers(2, columns + 1, rows)
    mask = np.arange(columns) < lengths[:, None]
    return mask[:, ::-1].copy() if left else mask


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 31, shape).astype(np.int32)


def assert_close(a, b, atol: float) -> None:
    """Every leaf within `atol`; the failing leaf is named."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
