"""The architecture of a Transformer, how it is computed, and presets of published sizes."""

import dataclasses
from typing import Literal

from rlhf_jax.devices.compute import Compute
from rlhf_jax.models.scaling import LongScaling, RopeScaling, YarnScaling
from rlhf_jax.settings import Count, Positive, Rate, Settings, Whole
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Experts(Settings):
    """A mixture of experts in place of each MLP; `d_ff` is the width of one expert."""

    count: Count  # experts of a layer
    active: Count  # of them that compute a token, those to which the router gives the highest probabilities
    normalized: bool = True  # a token's experts are weighted by their shares of these; False: by the probabilities

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.count:
            raise InputError(f"active={self.active} experts a token: expected at most count={self.count}")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The architecture, and how it is computed; the defaults are GPT-2 small."""

    vocab_size: Count = 50257
    max_length: Count = 1024  # tokens of context: rows of the position table, or the length RoPE was trained for
    d_model: Count = 768
    n_layers: Count = 12
    n_heads: Count = 12  # query heads
    n_kv_heads: Count = 12  # key/value heads; fewer than n_heads is grouped-query attention
    head_dim: Count = 64
    d_ff: Count = 3072
    position: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"] = "gelu"  # gelu is the tanh form, and so in geglu
    bias: Literal["all", "attention", "qkv", "mlp", "none"] = "all"  # which linear maps have one
    experts: Experts | None = None  # None: each layer has one MLP
    tie_embeddings: bool = True  # the unembedding is the embedding
    scale_embedding: bool = False  # embeddings times sqrt(d_model)
    norm_eps: Positive = 1e-5
    unit_offset: bool = False  # norms scale by 1 + their weight
    pre_norm: bool = True  # attention and MLP read the residual stream through a norm
    post_norm: bool = False  # what attention and MLP add has a norm too
    parallel_residual: bool = False  # the MLP reads the residual stream as attention does, before either adds to it
    qk_norm: Literal["none", "head", "whole"] = "none"  # queries and keys have a norm, before RoPE: each head's own,
    # or one over all heads together
    position_offset: Whole = 0  # rows of the position table before that of the first position
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_size: Count | None = None  # features of each head that RoPE rotates, the first ones; None is all
    window_theta: Positive | None = None  # rope_theta of layers with a window, then without rope_scaling; None is as
    # the others
    unrotated_layers: tuple[Whole, ...] = ()  # layers without RoPE
    query_size: Count | None = None  # attention scores are divided by its square root; None is head_dim
    inverse_layer_scale: bool = False  # and in layer n, counted from 1, by n too
    window: Count | None = None  # tokens that a token attends to, itself included; None is all before it
    full_layers: tuple[Whole, ...] = ()  # layers without the window
    attention_cap: Positive | None = None  # attention scores s become cap tanh(s / cap)
    logit_cap: Positive | None = None  # and so do logits
    dropout: Rate = 0.0  # residual dropout: on the embedding and on what each sublayer adds
    compute: Compute = Compute()
    # The row of `families` by which the model is saved, if it says all of this; None is the first one that does.
    family: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.position == "rope" and self.rotary_size is None and self.head_dim % 2:
            raise InputError(f"RoPE rotates pairs of features: head_dim={self.head_dim} must be even")
        if self.rotary_size is not None and (self.rotary_size % 2 or self.rotary_size > self.head_dim):
            raise InputError(f"rotary_size={self.rotary_size}: expected an even number up to head_dim={self.head_dim}")
        if self.experts is not None and self.bias in ("all", "mlp"):
            raise InputError(f"bias={self.bias}: experts have no biases, expected one of attention, qkv, none")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise InputError(f"rope_theta={self.rope_theta}: YaRN needs rope_theta above 1")
        if isinstance(scaling := self.rope_scaling, LongScaling):
            pairs = (self.rotary_size or self.head_dim) // 2
            for name, factors in {"short": scaling.short, "long": scaling.long}.items():
                if len(factors) != pairs:
                    raise InputError(f"{name} has {len(factors)} factors: expected one for each of {pairs} pairs")

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its nonlinearity by a second projection."""
        return self.mlp in ("swiglu", "geglu")


def gpt(
    n_layers: int,
    d_model: int,
    n_heads: int,
    vocab_size: int = Config.vocab_size,
    max_length: int = Config.max_length,
) -> Config:
    """A config of GPT-2's shape: learned positions, LayerNorm, GELU, biases, tied embeddings."""
    return Config(
        vocab_size=vocab_size,
        max_length=max_length,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model,
    )


def llama(
    n_layers: int,
    d_model: int,
    n_heads: int,
    n_kv_heads: int,
    d_ff: int,
    vocab_size: int = Config.vocab_size,
    max_length: int = Config.max_length,
    rope_theta: float = Config.rope_theta,
) -> Config:
    """A config of Llama's shape: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases, no tied embeddings."""
    return Config(
        vocab_size=vocab_size,
        max_length=max_length,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        d_ff=d_ff,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        tie_embeddings=False,
        rope_theta=rope_theta,
    )


def neox(n_layers: int, d_model: int, n_heads: int, vocab_size: int) -> Config:
    """A config of Pythia's shape, which is GPT-2's with RoPE on a quarter of each head and a parallel residual."""
    return dataclasses.replace(
        gpt(n_layers, d_model, n_heads, vocab_size, max_length=2048),
        position="rope",
        rotary_size=d_model // n_heads // 4,
        parallel_residual=True,
        mlp="gelu_exact",
        tie_embeddings=False,
    )


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
    "pythia-1b": neox(16, 2048, 8, 50304),
    "pythia-2.8b": neox(32, 2560, 32, 50304),
    "pythia-6.9b": neox(32, 4096, 32, 50432),
    "deepseek-7b": llama(30, 4096, 32, 32, 11008, vocab_size=102400, max_length=4096),
    "llama3-8b": llama(32, 4096, 32, 8, 14336, vocab_size=128256, max_length=8192, rope_theta=5e5),
    "llama3-70b": llama(80, 8192, 64, 8, 28672, vocab_size=128256, max_length=8192, rope_theta=5e5),
    "mixtral-micro": dataclasses.replace(
        llama(1, 32, 2, 1, 44, vocab_size=512, max_length=128),
        experts=Experts(count=4, active=2),
    ),
    "mixtral-8x7b": dataclasses.replace(
        llama(32, 4096, 32, 8, 14336, vocab_size=32000, max_length=32768, rope_theta=1e6),
        experts=Experts(count=8, active=2),
    ),
    "qwen3-30b-a3b": dataclasses.replace(
        llama(48, 2048, 32, 4, 768, vocab_size=151936, max_length=40960, rope_theta=1e6),
        head_dim=128,
        norm_eps=1e-6,
        qk_norm="head",
        experts=Experts(count=128, active=8),
    ),
}


def preset(name: str) -> Config:
    """The config of PRESETS under this name; raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
