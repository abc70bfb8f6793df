"""Rotary position embeddings (arXiv:2104.09864), with Llama 3's scaling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.models.config import Config


def frequencies(config: Config) -> np.ndarray:
    """Radians a token by which RoPE turns each pair of features, [head_dim / 2], float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    if scaling := config.rope_scaling:
        turns = scaling.original_length * frequency / (2 * np.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def turns(length: int, config: Config) -> tuple[Float[Array, "N F"], Float[Array, "N F"]] | None:
    """Cosine and sine of RoPE's angles at the first `length` positions; None without RoPE.

    A table to look positions up in: XLA for CPU would compute cosines again wherever something is turned.
    """
    if config.position != "rope":
        return None
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies(config)[None]
    return jnp.cos(angle), jnp.sin(angle)


def rope(
    x: Float[Array, "B T G R H"], turn: tuple[Float[Array, "B T F"], Float[Array, "B T F"]]
) -> Float[Array, "B T G R H"]:
    """Rotary positions (arXiv:2104.09864), feature i paired with feature i + head_dim / 2. Float32 inside."""
    cos, sin = (part[:, :, None, None] for part in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
