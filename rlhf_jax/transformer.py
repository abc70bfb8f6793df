"""The decoder-only Transformer. GPT-2 and the Llama family are settings of one block.

The layers are one scanned block whose parameters are stacked on a leading axis [L]. Query heads lie beside the key and
value head that they share: one fused projection yields [G groups, R query heads + key + value, head_dim].
Padding may be anywhere in a row: a token attends to the earlier real tokens of its own document, and its position is
how many of them there are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import InputError, Leaf, Params


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, whatever its architecture."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk; parameters, norms, softmax and logits are float32
    remat: bool = False  # recompute activations in the backward pass, a layer at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture, and how it is computed; the defaults are GPT-2 small."""

    vocab_size: int = 50257
    max_length: int = 1024  # tokens of context: rows of the position table, or the length RoPE was trained for
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12  # query heads
    n_kv_heads: int = 12  # key/value heads; fewer than n_heads is grouped-query attention
    head_dim: int = 64
    d_ff: int = 3072
    position: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True  # of every linear map
    tie_embeddings: bool = True  # the unembedding is the embedding
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.0  # residual dropout: on the embedding and on what each sublayer adds
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"RoPE rotates pairs of features: head_dim={self.head_dim} must be even")


def gpt(n_layers: int, d_model: int, n_heads: int, head_dim: int | None = None, **settings) -> Config:
    """A GPT-2/GPT-3 shaped config: learned positions, LayerNorm, GELU, biases, tied embeddings."""
    head_dim = head_dim or d_model // n_heads
    shape: dict[str, Any] = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_heads}
    return Config(**shape, head_dim=head_dim, d_ff=4 * d_model, **settings)


def llama(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, **settings) -> Config:
    """A Llama shaped config: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases, untied by default."""
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    family = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
    every: dict[str, Any] = {"head_dim": d_model // n_heads} | shape | family | settings
    return Config(**every)


# Radford et al. 2019, table 2 (parameter counts corrected by the released weights); Brown et al. 2020, table 2.1.

PRESETS: dict[str, Config] = {
    "tiny": gpt(2, 64, 4, vocab_size=512, max_length=128),
    "mini": gpt(2, 128, 4, vocab_size=1024, max_length=128),
    "llama-mini": llama(2, 128, 4, 4, 344, vocab_size=1024, max_length=128),
    "llama-micro": llama(1, 32, 2, 1, 88, vocab_size=512, max_length=128),
    "llama-tiny": llama(2, 64, 4, 2, 176, vocab_size=512, max_length=128),
    "gpt2": gpt(12, 768, 12),
    "gpt2-medium": gpt(24, 1024, 16),
    "gpt2-large": gpt(36, 1280, 20),
    "gpt2-xl": gpt(48, 1600, 25),
    "gpt3-125m": gpt(12, 768, 12, max_length=2048),
    "gpt3-350m": gpt(24, 1024, 16, max_length=2048),
    "gpt3-760m": gpt(24, 1536, 16, max_length=2048),
    "gpt3-1.3b": gpt(24, 2048, 24, 128, max_length=2048),
    "gpt3-2.7b": gpt(32, 2560, 32, max_length=2048),
    "gpt3-6.7b": gpt(32, 4096, 32, max_length=2048),
    "gpt3-13b": gpt(40, 5140, 40, 128, max_length=2048),
    "gpt3-175b": gpt(96, 12288, 96, max_length=2048),
    "llama3-8b": llama(32, 4096, 32, 8, 14336, vocab_size=128256, max_length=8192, rope_theta=5e5),
    "llama3-70b": llama(80, 8192, 64, 8, 28672, vocab_size=128256, max_length=8192, rope_theta=5e5),
}


def preset(name: str) -> Config:
    """The config of PRESETS under this name; raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


class Cache(struct.PyTreeNode):
    """Keys and values of the columns seen so far, for generation."""

    key: Leaf  # [L, B, S, G, head_dim]
    value: Leaf  # [L, B, S, G, head_dim]
    mask: Leaf  # [B, S] bool, columns that hold a real token
    column: Leaf  # [] int32, the next column to fill

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int) -> "Cache":
        shape = (config.n_layers, rows, columns, config.n_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.compute.dtype)
        return cls(key=zeros, value=zeros, mask=jnp.zeros((rows, columns), bool), column=jnp.int32(0))


class View(struct.PyTreeNode):
    """What every layer needs to know of the rows."""

    position: Leaf  # [B, T] int32, tokens before this one in its document
    attend: Leaf  # [B, T, S] bool
    keys: Leaf  # [B] dropout keys, one a row, or None to evaluate


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


def rope(x: Float[Array, "B T G R H"], position: Int[Array, "B T"], theta: float) -> Float[Array, "B T G R H"]:
    """Rotary positions (arXiv:2104.09864), feature i paired with feature i + head_dim / 2. Float32 inside."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None, None].astype(jnp.float32) * frequency[None, None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dropout(x: Float[Array, "B T D"], keys: Array | None, site: int | Array, rate: float) -> Float[Array, "B T D"]:
    """Inverted dropout whose mask depends on the row's key and the site alone, so never on batch size or devices."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm of [B, T, D] over the last axis, in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        if self.config.norm == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = (
            x
            * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
            * scale[None, None]
        )
        if self.config.norm == "layernorm":
            x = x + self.param("bias", nn.initializers.zeros, x.shape[-1:])[None, None]
        return x.astype(self.config.compute.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`, from the last axes of x [B, T, *inputs] to [B, T, *outputs]."""

    config: Config
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*self.inputs, *self.outputs))
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        # One plain matrix product: XLA for CPU takes three times as long over the gradient of anything else.
        y = x.reshape(-1, fan_in) @ kernel.astype(x.dtype).reshape(fan_in, fan_out)
        if self.config.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs).astype(x.dtype).reshape(1, fan_out)
        return y.reshape(*x.shape[:2], *self.outputs)


def attend(
    query: Float[Array, "B T G R H"], key: Float[Array, "B S G H"], value: Float[Array, "B S G H"], mask: Array
) -> Float[Array, "B T G R H"]:
    """Each query's mean of the values under `softmax(query . key / sqrt(H))`, over the keys that mask [B, T, S] allows.

    Heads go first, so that both products are plain batched matrix products. Softmax in float32.
    """
    rows, columns, groups, shared, size = query.shape
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows * groups, shared * columns, size)
    key, value = (x.transpose(0, 2, 1, 3).reshape(rows * groups, -1, size) for x in (key, value))
    scores = jnp.einsum("xqh,xsh->xqs", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, groups, shared, columns, -1) * size**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = weights.astype(value.dtype).reshape(rows * groups, shared * columns, -1) @ value
    return mixed.reshape(rows, groups, shared, columns, size).transpose(0, 3, 1, 2, 4)


class Attention(nn.Module):
    """Grouped-query causal attention; softmax in float32."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, layer: Array, view: View, cache: Cache | None) -> tuple[Array, Cache | None]:
        c = self.config
        groups, shared = c.n_kv_heads, c.n_heads // c.n_kv_heads
        qkv = Linear(c, (c.d_model,), (groups, shared + 2, c.head_dim), 0.02, name="qkv")(x)
        query, key, value = qkv[..., :shared, :], qkv[..., shared, :], qkv[..., shared + 1, :]
        if c.position == "rope":
            query = rope(query, view.position, c.rope_theta)
            key = rope(key[..., None, :], view.position, c.rope_theta)[..., 0, :]
        if cache is not None:
            at = (layer, 0, cache.column, 0, 0)
            cache = cache.replace(
                key=jax.lax.dynamic_update_slice(cache.key, key[None], at),
                value=jax.lax.dynamic_update_slice(cache.value, value[None], at),
            )
            if view.attend.shape[2] != key.shape[1]:  # not a prefill: look back at the cache
                key = jax.lax.dynamic_index_in_dim(cache.key, layer, keepdims=False)
                value = jax.lax.dynamic_index_in_dim(cache.value, layer, keepdims=False)
        mixed = attend(query, key, value, view.attend)
        out = Linear(c, (groups, shared, c.head_dim), (c.d_model,), 0.02 / (2 * c.n_layers) ** 0.5, name="out")
        return out(mixed), cache


class MLP(nn.Module):
    """GELU (tanh form, as GPT-2) or SwiGLU, whose gate and input projections are one."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        if c.mlp == "swiglu":
            both = Linear(c, (c.d_model,), (2, c.d_ff), 0.02, name="up")(x)
            hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
        else:
            hidden = jax.nn.gelu(Linear(c, (c.d_model,), (c.d_ff,), 0.02, name="up")(x), approximate=True)
        return Linear(c, (c.d_ff,), (c.d_model,), 0.02 / (2 * c.n_layers) ** 0.5, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP, the body of the scan over layers."""

    config: Config

    @nn.compact
    def __call__(self, carry: tuple[Array, Cache | None], layer: Array, view: View) -> tuple[tuple, None]:
        x, cache = carry
        rate = self.config.dropout
        mixed, cache = Attention(self.config, name="attention")(Norm(self.config, name="norm_1")(x), layer, view, cache)
        x = x + dropout(mixed, view.keys, 2 * layer + 1, rate)
        x = x + dropout(
            MLP(self.config, name="mlp")(Norm(self.config, name="norm_2")(x)), view.keys, 2 * layer + 2, rate
        )
        return (x, cache), None


class Transformer(nn.Module):
    """The trunk and its unembedding. `__call__` maps tokens to logits; `hidden` stops before the unembedding."""

    config: Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model))
        if c.position == "learned":
            self.position_table = self.param("positions", init, (c.max_length, c.d_model))
        if not c.tie_embeddings:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.d_model))
        block = nn.remat(Block, prevent_cse=False) if c.compute.remat else Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
        )(c)
        self.final_norm = Norm(c)

    def hidden(
        self, tokens: Array, segment: Array, keys: Array | None = None, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """Final hidden states [B, T, D], and the cache with these columns appended.

        `segment` is a bool mask or document ids [B, T]. `keys` [B] turn residual dropout on. With a cache, T columns
        are appended at `cache.column`: either the whole prompt into an empty cache, or one column.
        """
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_length:
            raise InputError(f"{tokens.shape[1]} columns exceed the model's context of {self.config.max_length}")
        position, attend = positions(segment), causal(segment)
        if cache is not None:
            start = (0, cache.column)
            cache = cache.replace(mask=jax.lax.dynamic_update_slice(cache.mask, segment.astype(bool), start))
            if tokens.shape[1] == 1:
                position = (jnp.sum(cache.mask, axis=1) - 1)[:, None]
                attend = cache.mask[:, None, :]
        x = self.embedding[tokens]
        if self.config.position == "learned":
            x = x + self.position_table[position]
        x = dropout(x.astype(self.config.compute.dtype), keys, 0, self.config.dropout)
        view = View(position=position, attend=attend, keys=keys)
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.config.n_layers), view)
        if cache is not None:
            cache = cache.replace(column=cache.column + tokens.shape[1])
        return self.final_norm(x), cache

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the next token, float32."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:2], -1)

    def __call__(
        self, tokens: Array, segment: Array, keys: Array | None = None, start: int = 0, stop: int | None = None
    ) -> Float[Array, "B N V"]:
        """Logits at columns `start:stop`, which predict the tokens at columns `start + 1 : stop + 1`."""
        return self.unembed(self.hidden(tokens, segment, keys)[0][:, start:stop])


def bind(module: Any) -> Callable:
    """`module.apply` on bare parameters: the `apply_fn(params, tokens, segment, ...)` that every step takes.

    A float32 trunk is float32 on every device: some compute such matrix products in bfloat16 unless told otherwise.
    """
    precision = "highest" if module.config.compute.dtype == "float32" else None

    def apply_fn(params: Params, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *args, **kwargs)

    return apply_fn


def parameter_shapes(config: Config) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: Transformer(config).init(jax.random.key(0), t, t)["params"], tokens)


def parameter_count(config: Config) -> int:
    """Number of parameters, from shapes alone."""
    return sum(x.size for x in jax.tree.leaves(parameter_shapes(config)))
