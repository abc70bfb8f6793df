"""Rotary position embeddings (arXiv:2104.09864), of all of a head or its first features, by the layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.config import Config

# Cosine and sine of the angle of each pair of features, F = rotary_size / 2.
Rotation = tuple[Float[Array, "B T F"], Float[Array, "B T F"]]


class Rotations(NamedTuple):
    """Rotations of positions: a table [N, F] of the first N, or [B, T, F] of tokens."""

    every: Any  # cosine and sine
    windowed: Any  # those of layers with a window, where they have their own; else None


def frequencies(config: Config, columns: int, windowed: bool = False) -> np.ndarray:
    """The angle in radians by which one token more rotates each pair of features, [F] float32, in rows of `columns`.

    `windowed` is for layers with a window, whose own theta has no scaling.
    """
    own = config.window_theta if windowed else None
    theta = own or config.rope_theta
    half = (config.rotary_size or config.head_dim) // 2
    frequency = theta ** (-np.arange(half) / half)
    if config.rope_scaling and own is None:
        frequency = config.rope_scaling.frequencies(frequency, theta, columns)
    return frequency.astype(np.float32)


def rotary_table(columns: int, config: Config) -> Rotations | None:
    """The rotations of the first `columns` positions; None for a model without RoPE.

    Positions are looked up in it because XLA for CPU would otherwise compute the cosines anew at each use.
    """
    if config.position != "rope":
        return None
    magnitude = config.rope_scaling.magnitude if config.rope_scaling else 1.0
    every = _table(frequencies(config, columns), columns, magnitude)
    if config.window_theta is None:
        return Rotations(every, None)
    return Rotations(every, _table(frequencies(config, columns, windowed=True), columns, 1.0))


def _table(frequency: np.ndarray, columns: int, magnitude: float) -> tuple[Array, Array]:
    angle = jnp.arange(columns, dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if magnitude == 1.0 else (magnitude * cos, magnitude * sin)


def look_up(table: Rotations | None, position: Int[Array, "B T"]) -> Rotations | None:
    """The rotation of each token. A position outside of the table, as padding may have, gets the nearest one."""
    return jax.tree.map(lambda part: jnp.take(part, position, axis=0, mode="clip"), table)


def listed(layer: int | Array, layers: tuple[int, ...]) -> Bool[Array, ""]:
    """Whether a layer is one of these."""
    return jnp.isin(layer, jnp.array(layers, jnp.int32))


def layer_rotation(config: Config, rotations: Rotations, layer: int | Array) -> Rotation:
    """The rotation of each token in a layer; in one without RoPE it turns nothing."""
    cos, sin = rotations.every
    if rotations.windowed is not None:
        full = listed(layer, config.full_layers)
        cos, sin = (jnp.where(full, *pair) for pair in zip(rotations.every, rotations.windowed, strict=True))
    if config.unrotated_layers:
        still = listed(layer, config.unrotated_layers)
        cos, sin = jnp.where(still, 1.0, cos), jnp.where(still, 0.0, sin)
    return cos, sin


def rotate(x: Float[Array, "B T G R H"], rotation: Rotation) -> Float[Array, "B T G R H"]:
    """Queries or keys, whose first 2 F features are rotated; feature i is paired with i + F. Computes in float32."""
    cos, sin = (part[:, :, None, None] for part in rotation)
    size = 2 * cos.shape[-1]
    turned, others = (x[..., :size], [x[..., size:]]) if size < x.shape[-1] else (x, [])
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, *others], axis=-1) if others else turned
