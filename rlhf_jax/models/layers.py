"""The layers that a block is made of, and what each of them needs to know of the rows."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.devices import parallel
from rlhf_jax.models.config import Config
from rlhf_jax.types import Leaf


class View(struct.PyTreeNode):
    """What every layer needs to know of the rows."""

    turn: Any  # cosine and sine of RoPE's angles, [B, T, head_dim / 2] each; None without RoPE
    attend: Leaf  # [B, T, S] bool
    near: Leaf  # [B, T, S] bool, the same within the window; None without one
    segment: Leaf  # [B, T] of these columns
    keys: Leaf  # [B] dropout keys, one a row, or None to evaluate


Columns = slice | Int[Array, "B N"]  # of a row: the same of each, or its own


EVERY = slice(None)


def pick(x: Shaped[Array, "B T ..."], columns: Columns) -> Shaped[Array, "B N ..."]:
    """These columns alone."""
    return x[:, columns] if isinstance(columns, slice) else jax.vmap(lambda row, n: row[n])(x, columns)


def positions(segment: Int[Array, "B T"] | Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """How many real tokens of its own document precede each token. Arbitrary at padding."""
    segment = segment.astype(jnp.int32)
    real = (segment > 0).astype(jnp.int32)
    count = jnp.cumsum(real, axis=1) - real
    latest = jax.lax.cummax(segment, axis=1)
    starts = segment > jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)


def causal(segment: Int[Array, "B T"] | Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which tokens attend to which: to themselves and the earlier real tokens of their own document."""
    columns = jnp.arange(segment.shape[1])
    same = (segment[:, :, None] == segment[:, None, :]) & (segment[:, None, :] > 0)
    return same & (columns[:, None] >= columns[None, :])[None]


def dropout(x: Float[Array, "B T D"], keys: Array | None, site: int | Array, rate: float) -> Float[Array, "B T D"]:
    """Inverted dropout whose mask depends on the row's key and the site alone, so never on batch size or devices."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def capped(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`: x where it is small, and never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


# What is cheap to compute and as large as what it is computed from is computed again in the backward pass, which would
# else read back intermediates from memory, several of each.
again = functools.partial(jax.checkpoint, prevent_cse=False)


class Norm(nn.Module):
    """LayerNorm or RMSNorm of [B, T, ..., D] over the last axis, in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        along = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.zeros if c.unit_offset else nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, along[-1:]) if c.norm == "layernorm" else None

        def normed(x: Array, scale: Array, bias: Array | None) -> Array:
            x = x.astype(jnp.float32)
            if bias is not None:
                x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + c.norm_eps)
            x = x * (scale + 1.0 if c.unit_offset else scale).reshape(along)
            if bias is not None:
                x = x + bias.reshape(along)
            return x.astype(c.compute.dtype)

        return again(normed)(x, scale, bias)


class Linear(nn.Module):
    """`x @ kernel + bias`, from the last axes of x [B, T, *inputs] to [B, T, *outputs]."""

    config: Config
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float
    bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*self.inputs, *self.outputs))
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        outputs = *x.shape[:2], *self.outputs
        # One plain matrix product: XLA for CPU takes three times as long over the gradient of anything else.
        flat = lambda x, kernel: (x.reshape(-1, fan_in) @ kernel.astype(x.dtype).reshape(fan_in, fan_out)).reshape(
            outputs
        )
        # On a mesh, flat outputs [2 F] could not be spread over F.
        whole = lambda x, kernel: jnp.tensordot(x, kernel.astype(x.dtype), len(self.inputs))
        product = whole if parallel.has_mesh() else flat
        if self.has_variable("params", "kernel_a"):  # of lora.py
            a, b = (self.variables["params"][f"kernel_{factor}"].astype(x.dtype) for factor in "ab")
            # The backward pass keeps the kernel itself, not a cast and reshaped copy for each layer.
            y = jax.checkpoint(product, prevent_cse=False)(x, kernel)
            y = y + (x.reshape(-1, fan_in) @ a @ b).reshape(outputs)
        else:
            y = product(x, kernel)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs).astype(x.dtype)[None, None]
        return y


class MLP(nn.Module):
    """GELU, or SwiGLU or GeGLU, whose gate and input projections are one. GELU is the tanh form, as GPT-2's."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gated, biased = c.mlp != "gelu", c.bias == "all"
        hidden = Linear(c, (c.d_model,), (2, c.d_ff) if gated else (c.d_ff,), 0.02, biased, name="up")(x)
        activation = jax.nn.silu if c.mlp == "swiglu" else jax.nn.gelu  # its default is the tanh form
        active = lambda x: activation(x[..., 0, :]) * x[..., 1, :] if gated else activation(x)
        hidden = again(active)(hidden)
        return Linear(c, (c.d_ff,), (c.d_model,), 0.02 / (2 * c.n_layers) ** 0.5, biased, name="down")(hidden)
