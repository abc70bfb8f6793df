"""The architecture of a Transformer, how it is computed, and presets of published sizes."""

import dataclasses
from typing import Any, Literal

from rlhf_jax.devices.compute import Compute
from rlhf_jax.settings import Count, Positive, Rate, Settings, Whole
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling(Settings):
    """Llama 3's: wavelengths beyond the context that RoPE was trained for grow, those well inside stay."""

    factor: Positive  # by which the longest are
    low: Positive  # from original_length / low on, wavelengths are the longest,
    high: Positive  # up to original_length / high they are as they were, and in between they go from one to the other
    original_length: Count  # tokens


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
    mlp: Literal["gelu", "swiglu", "geglu"] = "gelu"  # gelu is the tanh form
    bias: Literal["all", "qkv", "none"] = "all"  # which linear maps have one
    tie_embeddings: bool = True  # the unembedding is the embedding
    scale_embedding: bool = False  # embeddings times sqrt(d_model)
    norm_eps: Positive = 1e-5
    unit_offset: bool = False  # norms scale by 1 + their weight
    post_norm: bool = False  # what attention and MLP add has a norm too
    qk_norm: bool = False  # each head's query and key has a norm, before RoPE
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    query_size: Count | None = None  # attention scores are divided by its square root; None is head_dim
    window: Count | None = None  # tokens that a token attends to, itself included; None is all before it
    full_layers: tuple[Whole, ...] = ()  # layers without the window
    attention_cap: Positive | None = None  # attention scores s become cap tanh(s / cap)
    logit_cap: Positive | None = None  # and so do logits
    dropout: Rate = 0.0  # residual dropout: on the embedding and on what each sublayer adds
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"RoPE rotates pairs of features: head_dim={self.head_dim} must be even")


def gpt(n_layers: int, d_model: int, n_heads: int, **others: Any) -> Config:
    """A config of GPT-2's shape: learned positions, LayerNorm, GELU, biases, tied embeddings.

    `others` are further fields of `Config`.
    """
    return Config(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model,
        **others,
    )


def llama(n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, d_ff: int, **others: Any) -> Config:
    """A config of Llama's shape: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases, no tied embeddings.

    `others` are further fields of `Config`, in which they may differ from that.
    """
    family: dict[str, Any] = {
        "head_dim": d_model // n_heads,
        "position": "rope",
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "bias": "none",
        "tie_embeddings": False,
    }
    return Config(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        **(family | others),
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
    "deepseek-7b": llama(30, 4096, 32, 32, 11008, vocab_size=102400, max_length=4096),
    "llama3-8b": llama(32, 4096, 32, 8, 14336, vocab_size=128256, max_length=8192, rope_theta=5e5),
    "llama3-70b": llama(80, 8192, 64, 8, 28672, vocab_size=128256, max_length=8192, rope_theta=5e5),
}


def preset(name: str) -> Config:
    """The config of PRESETS under this name; raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
