"""The decoder-only Transformer. GPT-2, Llama, Mistral, Qwen and Gemma 2 are settings of one block.

The layers are one scanned block whose parameters are stacked on a leading axis [L]. Query heads lie beside the key and
value head that they share: one fused projection yields [G groups, R query heads + key + value, head_dim].
Padding may be anywhere in a row: a token attends to the earlier real tokens of its own document, and its position is
how many of them there are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax import attention, parallel
from rlhf_jax.logprobs import by_columns, entropy, token_logprobs
from rlhf_jax.types import InputError, Leaf, Params, check_positive


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, whatever its architecture."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk; parameters, norms, softmax and logits are float32
    # What the backward pass computes again, a layer at a time: norms and activations, all but matrix products with
    # weights, or all.
    remat: Literal["none", "dots", "full"] = "none"
    frozen: Literal["float32", "bfloat16"] = "float32"  # of the parameters of models that are not trained
    attention: Literal["auto", "plain", "flash"] = "auto"  # flash is TPUs' or GPUs' kernel, auto is where one serves
    chunk: int = 0  # columns whose logits exist at a time where log-probabilities are computed; 0 is all of them
    # Whether the program has each layer written out and no loop: faster, and longer to compile. None is where a CPU
    # computes at most 12 layers and remat is none, which its compiler heeds in a loop alone. Sampling has its own way.
    unroll: bool | None = None

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise InputError(f"chunk={self.chunk}: expected a number of columns, or 0 for all at once")

    def freeze(self, params: Params) -> Params:
        """Parameters that are not to be trained, in the type that `frozen` names."""
        return jax.tree.map(lambda x: x.astype(self.frozen), params)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's: wavelengths beyond the context that RoPE was trained for grow, those well inside stay."""

    factor: float  # by which the longest are
    low: float  # from original_length / low on, wavelengths are the longest,
    high: float  # up to original_length / high they are as they were, and between the two they go from one to the other
    original_length: int  # tokens


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
    mlp: Literal["gelu", "swiglu", "geglu"] = "gelu"  # gelu is the tanh form
    bias: Literal["all", "qkv", "none"] = "all"  # which linear maps have one
    tie_embeddings: bool = True  # the unembedding is the embedding
    scale_embedding: bool = False  # embeddings times sqrt(d_model)
    norm_eps: float = 1e-5
    unit_offset: bool = False  # norms scale by 1 + their weight
    post_norm: bool = False  # what attention and MLP add has a norm too
    qk_norm: bool = False  # each head's query and key has a norm, before RoPE
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    query_size: int | None = None  # attention scores are divided by its square root; None is head_dim
    window: int | None = None  # tokens that a token attends to, itself included; None is all before it
    full_layers: tuple[int, ...] = ()  # layers without the window
    attention_cap: float | None = None  # attention scores s become cap tanh(s / cap)
    logit_cap: float | None = None  # and so do logits
    dropout: float = 0.0  # residual dropout: on the embedding and on what each sublayer adds
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        sizes = "vocab_size", "max_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"
        check_positive(self, *sizes, "query_size", "window", "attention_cap", "logit_cap")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"RoPE rotates pairs of features: head_dim={self.head_dim} must be even")


def gpt(n_layers: int, d_model: int, n_heads: int, **settings) -> Config:
    """A GPT-2/GPT-3 shaped config: learned positions, LayerNorm, GELU, biases, tied embeddings."""
    shape: dict[str, Any] = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_heads}
    return Config(**shape, head_dim=d_model // n_heads, d_ff=4 * d_model, **settings)


def llama(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, **settings) -> Config:
    """A Llama shaped config: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases, untied by default."""
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    family = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": "none", "tie_embeddings": False}
    every: dict[str, Any] = {"head_dim": d_model // n_heads} | shape | family | settings
    return Config(**every)


# Radford et al. 2019, table 2 (parameter counts corrected by the released weights); Brown et al. 2020, table 2.1.

PRESETS: dict[str, Config] = {
    "tiny": gpt(2, 64, 4, vocab_size=512, max_length=128),
    "mini": gpt(2, 128, 4, vocab_size=1024, max_length=128),
    "llama-mini": llama(2, 128, 4, 4, 344, vocab_size=1024, max_length=128),
    "llama-mini-512": llama(2, 128, 4, 4, 344, vocab_size=2048, max_length=512),
    "llama-micro": llama(1, 32, 2, 1, 88, vocab_size=512, max_length=128),
    "llama-tiny": llama(2, 64, 4, 2, 176, vocab_size=512, max_length=128),
    "gpt2": gpt(12, 768, 12),
    "gpt2-medium": gpt(24, 1024, 16),
    "gpt2-large": gpt(36, 1280, 20),
    "gpt2-xl": gpt(48, 1600, 25),
    "gpt3-125m": gpt(12, 768, 12, max_length=2048),
    "gpt3-350m": gpt(24, 1024, 16, max_length=2048),
    "gpt3-760m": gpt(24, 1536, 16, max_length=2048),
    "gpt3-1.3b": gpt(24, 2048, 16, max_length=2048),  # the table's 24 heads of 128 are not 2048 wide
    "gpt3-2.7b": gpt(32, 2560, 32, max_length=2048),
    "gpt3-6.7b": gpt(32, 4096, 32, max_length=2048),
    "gpt3-13b": gpt(40, 5120, 40, max_length=2048),  # the table has 5140, which 40 heads of 128 are not
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
    """Keys and values of the columns seen so far, for generation.

    The layers are stacked on a leading axis [L], for a scan over them, or `apart` in a tuple.
    """

    key: Leaf  # [L, B, G, S, head_dim], or L times [B, G, S, head_dim]
    value: Leaf  # as key
    mask: Leaf  # [B, S] bool, columns that hold a real token
    column: Leaf  # [] int32, the next column to fill
    turns: Any  # `turns` of S positions; None without RoPE

    @classmethod
    def empty(cls, config: Config, rows: int, columns: int) -> "Cache":
        shape = (config.n_layers, rows, config.n_kv_heads, columns, config.head_dim)
        zeros = jnp.zeros(shape, config.compute.dtype)
        return cls(
            key=zeros,
            value=zeros,
            mask=jnp.zeros((rows, columns), bool),
            column=jnp.int32(0),
            turns=turns(columns, config),
        )

    def apart(self) -> "Cache":
        """Each layer as an array of its own, of the very shape that attention multiplies by: XLA for CPU copies
        whatever is cut out of a stack, and whatever is both updated and reshaped."""
        return self.replace(key=tuple(self.key), value=tuple(self.value))

    def put(self, layer: int | Array, key: Float[Array, "B G T H"], value: Float[Array, "B G T H"]) -> "Cache":
        """With these columns of a layer; `column` moves on when all layers have theirs."""

        def into(old: Any, new: Array) -> Any:
            if isinstance(old, tuple):
                changed = jax.lax.dynamic_update_slice(old[layer], new, (0, 0, self.column, 0))
                return (*old[:layer], changed, *old[layer + 1 :])
            return jax.lax.dynamic_update_slice(old, new[None], (layer, 0, 0, self.column, 0))

        return self.replace(key=into(self.key, key), value=into(self.value, value))

    def at(self, layer: int | Array) -> tuple[Float[Array, "B G S H"], Float[Array, "B G S H"]]:
        """All columns of a layer."""
        if isinstance(self.key, tuple):
            return self.key[layer], self.value[layer]
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.key, self.value))

    def rows(self, index: Int[Array, "B"]) -> "Cache":
        """These rows alone, of a cache that is `apart`."""
        key, value = jax.tree.map(lambda x: x[index], (self.key, self.value))
        return self.replace(key=key, value=value, mask=self.mask[index])


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


def dropout(x: Float[Array, "B T D"], keys: Array | None, site: int | Array, rate: float) -> Float[Array, "B T D"]:
    """Inverted dropout whose mask depends on the row's key and the site alone, so never on batch size or devices."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


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
        product = whole if parallel.on_mesh() else flat
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


def attend(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G S H"],
    value: Float[Array, "B G S H"],
    mask: Array,
    config: Config,
) -> Float[Array, "B T G R H"]:
    """Each query's mean of the values under `softmax(query . key / sqrt(H))`, over the keys that mask [B, T, S] allows.

    `config` may give another size than H, and a cap. Heads go first, so that both products are plain batched matrix
    products; rows and groups stay apart, which a mesh may spread over different axes. Softmax in float32.
    """
    rows, columns, groups, shared, size = query.shape
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, groups, shared * columns, size)
    scores = jnp.einsum("bgqh,bgsh->bgqs", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, groups, shared, columns, -1) * (config.query_size or size) ** -0.5
    scores = capped(scores, config.attention_cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    mixed = weights.astype(value.dtype).reshape(rows, groups, shared * columns, -1) @ value
    return mixed.reshape(rows, groups, shared, columns, size).transpose(0, 3, 1, 2, 4)


def kernel(config: Config, queries: int, keys: int) -> Literal["splash", "cudnn"] | None:
    """Which kernel of `attention` serves so many columns, in what is being traced; None is `attend`.

    Raises InputError where one is asked for that does not serve.
    """
    c, wanted = config, config.compute.attention
    if queries != keys or wanted == "plain" or (wanted == "auto" and not attention.worthwhile(queries)):
        return None
    name: Literal["splash", "cudnn"] = "cudnn" if parallel.platform() == "gpu" else "splash"
    if name == "cudnn":
        capability = attention.compute_capability()
        serves = c.compute.dtype == "bfloat16" and c.head_dim in range(8, 129, 8) and c.attention_cap is None
        serves = serves and capability >= 8.0
        why = (
            "takes bfloat16, at most 128 features a head by eights, no cap, and compute capability 8.0 or more: here"
            f" are {c.compute.dtype}, {c.head_dim}, {c.attention_cap} and {capability}"
        )
    else:
        serves, why = c.window is None, "has no window, which this model has"
    if not serves and wanted == "flash":
        raise InputError(f"attention=flash {why}; use auto or plain")
    return name if serves else None


def capped(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`: x where it is small, and never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Attention(nn.Module):
    """Grouped-query causal attention; softmax in float32."""

    config: Config

    @nn.compact
    def __call__(
        self, x: Array, layer: int | Array, view: View, cache: Cache | None, columns: Columns
    ) -> tuple[Array, Cache | None]:
        c = self.config
        groups, shared = c.n_kv_heads, c.n_heads // c.n_kv_heads
        qkv = Linear(c, (c.d_model,), (groups, shared + 2, c.head_dim), 0.02, c.bias != "none", name="qkv")(x)
        query, key, value = jax.lax.split(qkv, (shared, 1, 1), axis=3)
        query = pick(query, columns)
        if c.qk_norm:
            query, key = Norm(c, name="query_norm")(query), Norm(c, name="key_norm")(key)
        if c.position == "rope":
            query = rope(query, jax.tree.map(lambda part: pick(part, columns), view.turn))
            key = rope(key, view.turn)
        key, value = (x[..., 0, :].transpose(0, 2, 1, 3) for x in (key, value))
        if cache is not None:
            cache = cache.put(layer, key, value)
            if view.attend.shape[2] != key.shape[2]:  # not a prefill: look back at the cache
                key, value = cache.at(layer)
        mask = view.attend
        if c.window is not None:
            far = jnp.isin(layer, jnp.array(c.full_layers, jnp.int32))
            mask = jnp.where(far, view.attend, view.near) if c.full_layers else view.near
        scale = (c.query_size or c.head_dim) ** -0.5
        match kernel(c, query.shape[1], key.shape[2]):
            case "splash":
                mixed = attention.splash(query, key, value, view.segment, scale, c.attention_cap)
            case "cudnn":
                mixed = attention.cudnn(query, key, value, mask, scale)
            case None:
                mixed = attend(query, key, value, pick(mask, columns), c)
        std = 0.02 / (2 * c.n_layers) ** 0.5
        out = Linear(c, (groups, shared, c.head_dim), (c.d_model,), std, c.bias == "all", name="out")
        return out(mixed), cache


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


class Block(nn.Module):
    """Pre-norm attention and MLP, the body of the scan over layers. Of what it yields, `columns` alone are computed."""

    config: Config

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], layer: int | Array, view: View, columns: Columns = EVERY
    ) -> tuple[tuple, None]:
        c = self.config
        x, cache = carry
        mixed, cache = Attention(c, name="attention")(Norm(c, name="norm_1")(x), layer, view, cache, columns)
        if c.post_norm:
            mixed = Norm(c, name="post_norm_1")(mixed)
        x = pick(x, columns) + dropout(mixed, view.keys, 2 * layer + 1, c.dropout)
        added = MLP(c, name="mlp")(Norm(c, name="norm_2")(x))
        if c.post_norm:
            added = Norm(c, name="post_norm_2")(added)
        x = x + dropout(added, view.keys, 2 * layer + 2, c.dropout)
        # What the backward pass keeps of a layer, if anything.
        return (parallel.constrain(x, parallel.ROWS, "tensor"), cache), None


SAVED = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


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
        block = Block
        if c.compute.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=SAVED[c.compute.remat])
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
        )(c)
        self.final_norm = Norm(c)

    def hidden(
        self,
        tokens: Array,
        segment: Array,
        keys: Array | None = None,
        cache: Cache | None = None,
        layers: Sequence[Params] | None = None,
        columns: Columns = EVERY,
    ) -> tuple[Array, Cache | None]:
        """Final hidden states [B, N, D] of these of the columns, and the cache with all T of them appended.

        `segment` is a bool mask or document ids [B, T]. `keys` [B] turn residual dropout on. With a cache, T columns
        are appended at `cache.column`: either the whole prompt into an empty cache, or one column. `layers` are the
        parameters of the blocks one by one (`layers_of`), which then run one by one, on a cache that is `apart`.
        """
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_length:
            raise InputError(f"{tokens.shape[1]} columns exceed the model's context of {self.config.max_length}")
        if cache is None and unrolled(self.config) and not self.is_initializing():
            layers = layers_of(self.variables["params"], self.config)
        position, attend = positions(segment), causal(segment)
        key_position = position
        if cache is not None:
            start = (0, cache.column)
            cache = cache.replace(mask=jax.lax.dynamic_update_slice(cache.mask, segment.astype(bool), start))
            if tokens.shape[1] == 1:
                position = jnp.sum(cache.mask, axis=1, dtype=jnp.int32, keepdims=True) - 1
                attend = cache.mask[:, None, :]
        near = None
        if self.config.window is not None:
            if cache is not None and tokens.shape[1] == 1:
                key_position = jnp.cumsum(cache.mask, axis=1) - 1
            near = attend & (position[:, :, None] - key_position[:, None, :] < self.config.window)
        x = self.embedding[tokens]
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.d_model**0.5, self.config.compute.dtype)
        if self.config.position == "learned":
            x = x + self.position_table[position]
        x = dropout(x.astype(self.config.compute.dtype), keys, 0, self.config.dropout)
        x = parallel.constrain(x, parallel.ROWS, "tensor")
        table = turns(tokens.shape[1], self.config) if cache is None else cache.turns
        turn = jax.tree.map(lambda part: jnp.take(part, position, axis=0, mode="clip"), table)  # padding's may be any
        view = View(turn=turn, attend=attend, near=near, segment=segment, keys=keys)
        if layers is None:
            (x, cache), _ = self.blocks((x, cache), jnp.arange(self.config.n_layers), view)
        else:
            # Of the last layer only what is asked for, unless that takes dropout of all, or is no faster.
            whole = (keys is not None and self.config.dropout > 0) or kernel(self.config, *(tokens.shape[1],) * 2)
            asked, columns = (EVERY, columns) if whole else (columns, EVERY)
            for layer, params in enumerate(layers):
                last = layer == self.config.n_layers - 1
                x, cache = self._block(params, x, cache, layer, view, asked if last else EVERY)
        if cache is not None:
            cache = cache.replace(column=cache.column + tokens.shape[1])
        return self.final_norm(pick(x, columns)), cache

    def _block(
        self, params: Params, x: Array, cache: Cache | None, layer: int, view: View, columns: Columns
    ) -> tuple[Array, Cache | None]:
        """One layer by itself."""

        def run(params: Params, x: Array) -> tuple[Array, Cache | None]:
            return Block(self.config, parent=None).apply({"params": params}, (x, cache), layer, view, columns)[0]

        if self.config.compute.remat != "none":
            run = jax.checkpoint(run, policy=SAVED[self.config.compute.remat])
        return run(params, x)

    def unembed(self, hidden: Float[Array, "B T D"], over: str | None = None) -> Float[Array, "B T V"]:
        """Logits of the next token, float32; the vocabulary is spread `over` an axis of the mesh, or whole."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        logits = capped(logits, self.config.logit_cap).reshape(*hidden.shape[:2], -1)
        return parallel.constrain(logits, parallel.ROWS, None, over)

    def logprobs(
        self,
        tokens: Int[Array, "B T"],
        segment: Array,
        keys: Array | None = None,
        *,
        start: int = 0,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
        """Log-probability of each token after column `start`, N = T - 1 - start, and the entropy that it came out of.

        Of `softmax(logits / temperature)`. Logits exist for these columns alone, `compute.chunk` of them at a time.
        """
        hidden, _ = self.hidden(tokens, segment, keys, columns=slice(start, -1))

        def read(hidden: Array, targets: Array) -> tuple[Array, Array | None]:
            logits = self.unembed(hidden, over="tensor")
            logp = token_logprobs(logits, targets, temperature)
            return logp, entropy(logits, temperature) if with_entropy else None

        return by_columns(read, self.config.compute.chunk, hidden, tokens[:, start + 1 :])

    def __call__(self, tokens: Array, segment: Array, keys: Array | None = None) -> Float[Array, "B T V"]:
        """Logits at each column, which predict the token at the next."""
        return self.unembed(self.hidden(tokens, segment, keys)[0])


def bind(module: Any) -> Callable:
    """`module.apply` on bare parameters: the `apply_fn(params, tokens, segment, ...)` that every step takes.

    A float32 trunk is float32 on every device: some compute such matrix products in bfloat16 unless told otherwise.
    """
    precision = "highest" if module.config.compute.dtype == "float32" else None

    def apply_fn(params: Params, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *args, **kwargs)

    return apply_fn


def layers_of(params: Params, config: Config) -> list[Params]:
    """The parameters of each block, cut out of the stack."""
    leaves, tree = jax.tree.flatten(params["blocks"])
    cut = [jax.lax.split(x, (1,) * config.n_layers) for x in leaves]
    return [jax.tree.unflatten(tree, [jnp.squeeze(x[layer], 0) for x in cut]) for layer in range(config.n_layers)]


def unrolled(config: Config) -> bool:
    """Whether the layers are written out, in what is being traced."""
    compute = config.compute
    if compute.unroll is None:
        return config.n_layers <= 12 and compute.remat == "none" and parallel.platform() == "cpu"
    return compute.unroll


def parameter_shapes(config: Config) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: Transformer(config).init(jax.random.key(0), t, t)["params"], tokens)


def parameter_count(config: Config) -> int:
    """Number of parameters, from shapes alone."""
    return sum(x.size for x in jax.tree.leaves(parameter_shapes(config)))
