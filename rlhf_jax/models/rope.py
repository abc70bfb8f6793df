"""Rotary position embeddings (arXiv:2104.09864), with Llama 3's scaling."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.models.config import Config

# Cosine and sine of the angle of each pair of features, F = head_dim / 2.
Table = tuple[Float[Array, "N F"], Float[Array, "N F"]]
Rotation = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]


def frequencies(config: Config) -> np.ndarray:
    """The angle in radians by which one token more rotates each pair of features, [head_dim / 2] float32."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    if scaling := config.rope_scaling:
        rotations = scaling.original_length * frequency / (2 * np.pi)  # within the original context
        unscaled = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        frequency = frequency * (unscaled + (1 - unscaled) / scaling.factor)
    return frequency.astype(np.float32)


def rotary_table(length: int, config: Config) -> Table | None:
    """The rotations of the first `length` positions; None for a model without RoPE.

    Positions are looked up in it because XLA for CPU would otherwise compute the cosines anew at each use.
    """
    if config.position != "rope":
        return None
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies(config)[None]
    return jnp.cos(angle), jnp.sin(angle)


def look_up(table: Table | None, position: Int[Array, "B T"]) -> Rotation | None:
    """The rotation of each token. A position outside of the table, as padding may have, gets the nearest one."""
    return jax.tree.map(lambda part: jnp.take(part, position, axis=0, mode="clip"), table)


def rotate(x: Float[Array, "B T G R H"], rotation: Rotation) -> Float[Array, "B T G R H"]:
    """Queries or keys, rotated; feature i is paired with feature i + head_dim / 2. Computes in float32."""
    cos, sin = (part[:, :, None, None] for part in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
