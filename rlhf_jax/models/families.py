"""The families: the names of settings and tensors in each published architecture, and the `Config` that it stands for.

A family is a row of `FAMILIES`, under the `model_type` of Hugging Face's config.json.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

from rlhf_jax.models.config import Compute, Config, gpt, llama
from rlhf_jax.models.fields import (
    EXPERTS,
    HEAD_DIM,
    INNER,
    LAYER_TYPES,
    OPT_WIDTH,
    QUERY_SIZE,
    ROTATED,
    USE_WINDOW,
    WEIGHTED,
    WINDOW,
    Fields,
    Setting,
    activation,
    biases,
    fixed,
    renamed,
    square,
)
from rlhf_jax.models.rope_fields import SCALINGS, TWO_ROPES, rope
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: what its Configs have in common, what they have a choice of, and the names of their tensors."""

    like: Config  # a Config of any size; the others differ from it in `settings` alone
    settings: tuple[Setting, ...]
    classes: tuple[str, str]  # in `transformers`: the language model, and the reward model
    # The modules in the file that each of ours lies in, in order: query, key and value, or gate and up, are several or
    # lie in one. Those in blocks have their layer in front, and in those of experts * stands for the expert.
    names: Mapping[str, tuple[str, ...]]
    layer: str  # in front of the names in blocks; {} stands for its number
    transposed: bool = True  # matrices are [outputs, inputs] in the file, not as ours
    by_head: bool = False  # where query, key and value lie in one: each head's three together, not all queries first

    def read(self, hf: Any) -> Config:
        """The Config of these settings of `transformers`. Raises InputError for one that no Config has."""
        found: dict[str, Any] = {}
        for setting in self.settings:
            found |= setting.read(hf)
        return dataclasses.replace(self.like, **found)

    def write(self, config: Config) -> Fields:
        """The settings of `transformers` by which this family says what a Config holds."""
        written: dict[str, Any] = {}
        for setting in self.settings:
            written |= setting.write(config)
        return written


_SIZES = renamed(
    n_layers="num_hidden_layers",
    d_model="hidden_size",
    n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads",
    d_ff="intermediate_size",
    vocab_size="vocab_size",
    max_length="max_position_embeddings",
    norm_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings",
)
_SILU = activation("hidden_act", silu="swiglu")
_ROPE = rope(*SCALINGS)
_CAPS = renamed(attention_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping")
_CAUSAL = fixed(use_bidirectional_attention=False)

_LLAMA = llama(1, 2, 1, 1, 1)
_GEMMA2 = dataclasses.replace(
    _LLAMA,
    mlp="geglu",
    scale_embedding=True,
    unit_offset=True,
    post_norm=True,
)
_OLMO = dataclasses.replace(_LLAMA, pre_norm=False, post_norm=True, qk_norm="whole")
_NEOX = dataclasses.replace(gpt(1, 2, 1), position="rope", mlp="gelu_exact")
_OPT = dataclasses.replace(gpt(1, 2, 1), mlp="relu", position_offset=2, norm_eps=1e-5)

_LLAMA_NAMES = {
    "embedding": ("model.embed_tokens",),
    "final_norm": ("model.norm",),
    "unembedding": ("lm_head",),
    "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/out": ("self_attn.o_proj",),
    "attention/query_norm": ("self_attn.q_norm",),
    "attention/key_norm": ("self_attn.k_norm",),
    "mlp/up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp/down": ("mlp.down_proj",),
    "norm_1": ("input_layernorm",),
    "norm_2": ("post_attention_layernorm",),
}
_POST_NORM_NAMES = {
    "post_norm_1": ("post_attention_layernorm",),
    "norm_2": ("pre_feedforward_layernorm",),
    "post_norm_2": ("post_feedforward_layernorm",),
}
_PHI3_NAMES = {"attention/qkv": ("self_attn.qkv_proj",), "mlp/up": ("mlp.gate_up_proj",)}
_GPT2_NAMES = {
    "embedding": ("transformer.wte",),
    "positions": ("transformer.wpe",),
    "final_norm": ("transformer.ln_f",),
    "unembedding": ("lm_head",),
    "attention/qkv": ("attn.c_attn",),
    "attention/out": ("attn.c_proj",),
    "mlp/up": ("mlp.c_fc",),
    "mlp/down": ("mlp.c_proj",),
    "norm_1": ("ln_1",),
    "norm_2": ("ln_2",),
}
_NEOX_NAMES = {
    "embedding": ("gpt_neox.embed_in",),
    "final_norm": ("gpt_neox.final_layer_norm",),
    "unembedding": ("embed_out",),
    "attention/qkv": ("attention.query_key_value",),
    "attention/out": ("attention.dense",),
    "mlp/up": ("mlp.dense_h_to_4h",),
    "mlp/down": ("mlp.dense_4h_to_h",),
    "norm_1": ("input_layernorm",),
    "norm_2": ("post_attention_layernorm",),
}
_OPT_NAMES = {
    "embedding": ("model.decoder.embed_tokens",),
    "positions": ("model.decoder.embed_positions",),
    "final_norm": ("model.decoder.final_layer_norm",),
    "unembedding": ("lm_head",),
    "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/out": ("self_attn.out_proj",),
    "mlp/up": ("fc1",),
    "mlp/down": ("fc2",),
    "norm_1": ("self_attn_layer_norm",),
    "norm_2": ("final_layer_norm",),
}
_MIXTRAL_NAMES = {
    "mlp/router": ("block_sparse_moe.gate",),
    "mlp/experts/up": ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
    "mlp/experts/down": ("block_sparse_moe.experts.*.w2",),
}
_QWEN_MOE_NAMES = {
    "mlp/router": ("mlp.gate",),
    "mlp/experts/up": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    "mlp/experts/down": ("mlp.experts.*.down_proj",),
}
_LAYER = "model.layers.{}."


def _classes(prefix: str) -> tuple[str, str]:
    return f"{prefix}ForCausalLM", f"{prefix}ForSequenceClassification"


FAMILIES = {  # by the model_type; where several say the same, an earlier one is written
    "gpt2": Family(
        gpt(1, 2, 1),
        (
            renamed(
                n_layers="n_layer",
                d_model="n_embd",
                n_heads="n_head",
                vocab_size="vocab_size",
                max_length="n_positions",
                norm_eps="layer_norm_epsilon",
                inverse_layer_scale="scale_attn_by_inverse_layer_idx",
            ),
            fixed(scale_attn_weights=True, add_cross_attention=False, tie_word_embeddings=True),
            activation("activation_function", gelu_new="gelu"),
            square("n_embd", "n_head"),
            INNER,
        ),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        _GPT2_NAMES,
        "transformer.h.{}.",
        transposed=False,
    ),
    "llama": Family(
        _LLAMA,
        (_SIZES, HEAD_DIM, _SILU, _ROPE, biases("attention_bias", "mlp_bias")),
        _classes("Llama"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "mistral": Family(
        _LLAMA,
        (_SIZES, HEAD_DIM, _SILU, _ROPE, WINDOW, fixed(attention_bias=False, mlp_bias=False)),
        _classes("Mistral"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "qwen2": Family(
        dataclasses.replace(_LLAMA, bias="qkv"),
        (_SIZES, HEAD_DIM, _SILU, _ROPE, LAYER_TYPES, USE_WINDOW, fixed(attention_bias=False, mlp_bias=False)),
        _classes("Qwen2"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "qwen3": Family(
        dataclasses.replace(_LLAMA, qk_norm="head"),
        (_SIZES, HEAD_DIM, _SILU, _ROPE, LAYER_TYPES, USE_WINDOW, biases("attention_bias", False)),
        _classes("Qwen3"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "mixtral": Family(
        _LLAMA,
        (_SIZES, HEAD_DIM, _SILU, _ROPE, WINDOW, EXPERTS, fixed(router_jitter_noise=0.0)),
        _classes("Mixtral"),
        _LLAMA_NAMES | _MIXTRAL_NAMES,
        _LAYER,
    ),
    "qwen3_moe": Family(
        dataclasses.replace(_LLAMA, qk_norm="head"),
        (
            *(_SIZES, renamed(d_ff="moe_intermediate_size"), HEAD_DIM, _SILU, _ROPE, WINDOW, USE_WINDOW),
            *(EXPERTS, WEIGHTED, biases("attention_bias", False), fixed(decoder_sparse_step=1, mlp_only_layers=[])),
        ),
        _classes("Qwen3Moe"),
        _LLAMA_NAMES | _QWEN_MOE_NAMES,
        _LAYER,
    ),
    "gemma2": Family(
        _GEMMA2,
        (
            *(_SIZES, HEAD_DIM, activation("hidden_activation", gelu_pytorch_tanh="geglu")),
            *(_ROPE, LAYER_TYPES, QUERY_SIZE, _CAPS, _CAUSAL, biases("attention_bias", False)),
        ),
        _classes("Gemma2"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "gemma3_text": Family(
        dataclasses.replace(_GEMMA2, qk_norm="head"),
        (
            *(_SIZES, HEAD_DIM, activation("hidden_activation", gelu_pytorch_tanh="geglu")),
            *(TWO_ROPES, LAYER_TYPES, QUERY_SIZE, _CAPS, _CAUSAL, biases("attention_bias", False)),
        ),
        ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "olmo2": Family(
        _OLMO,
        (_SIZES, HEAD_DIM, _SILU, _ROPE, biases("attention_bias", False)),
        _classes("Olmo2"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "olmo3": Family(
        _OLMO,
        (_SIZES, HEAD_DIM, _SILU, TWO_ROPES, LAYER_TYPES, biases("attention_bias", False)),
        _classes("Olmo3"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "smollm3": Family(
        _LLAMA,
        (
            *(_SIZES, HEAD_DIM, _SILU, _ROPE, ROTATED),
            *(LAYER_TYPES, USE_WINDOW, biases("attention_bias", "mlp_bias")),
        ),
        _classes("SmolLM3"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "phi3": Family(
        _LLAMA,
        (_SIZES, HEAD_DIM, _SILU, rope("longrope", partial=True), WINDOW),
        _classes("Phi3"),
        _LLAMA_NAMES | _PHI3_NAMES,
        _LAYER,
    ),
    "gpt_neox": Family(
        _NEOX,
        (
            renamed(
                n_layers="num_hidden_layers",
                d_model="hidden_size",
                n_heads="num_attention_heads",
                d_ff="intermediate_size",
                vocab_size="vocab_size",
                max_length="max_position_embeddings",
                norm_eps="layer_norm_eps",
                tie_embeddings="tie_word_embeddings",
                parallel_residual="use_parallel_residual",
            ),
            square("hidden_size", "num_attention_heads"),
            activation("hidden_act", gelu="gelu_exact", gelu_new="gelu", gelu_fast="gelu", relu="relu"),
            rope(*SCALINGS, partial=True),
            biases("attention_bias", True),
        ),
        _classes("GPTNeoX"),
        _NEOX_NAMES,
        "gpt_neox.layers.{}.",
        by_head=True,
    ),
    "opt": Family(
        _OPT,
        (
            renamed(
                n_layers="num_hidden_layers",
                d_model="hidden_size",
                n_heads="num_attention_heads",
                d_ff="ffn_dim",
                vocab_size="vocab_size",
                max_length="max_position_embeddings",
                tie_embeddings="tie_word_embeddings",
            ),
            square("hidden_size", "num_attention_heads"),
            OPT_WIDTH,
            activation("activation_function", relu="relu", gelu="gelu_exact", gelu_new="gelu"),
            biases("enable_bias", "enable_bias"),
            fixed(do_layer_norm_before=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
        ),
        _classes("OPT"),
        _OPT_NAMES,
        "model.decoder.layers.{}.",
    ),
}
SUPPORTED = tuple(FAMILIES)


def family(config: Config) -> str:
    """The family by which a config is written: its own, or the first that expresses it.

    Raises InputError where none does.
    """
    own = [config.family] if config.family in FAMILIES else []
    for kind in (*own, *FAMILIES):
        if _expresses(kind, config):
            return kind
    raise InputError(f"no Hugging Face architecture among {', '.join(SUPPORTED)} expresses {config}")


@functools.lru_cache(maxsize=1024)
def _expresses(kind: str, config: Config) -> bool:
    """Whether what a family writes of a config says all of it."""
    row = FAMILIES[kind]
    try:
        written = types.SimpleNamespace(**row.write(config))
        return _normal(row.read(written)) == _normal(config)
    except InputError:
        return False


def _normal(config: Config) -> Config:
    """The Config of those that compute the same, however they say it."""
    alike = config.window is None or (config.rope_scaling is None and config.window_theta == config.rope_theta)
    return dataclasses.replace(
        config,
        query_size=config.query_size or config.head_dim,
        rotary_size=config.rotary_size or 2 * (config.head_dim // 2),
        full_layers=() if config.window is None else config.full_layers,
        window_theta=None if alike else config.window_theta,
        dropout=0.0,
        compute=Compute(),
    )
