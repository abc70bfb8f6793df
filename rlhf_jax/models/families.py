"""The names of settings and tensors in each published architecture, and the `Config` that it stands for.

A family is a row of `FAMILIES`, under the `model_type` of Hugging Face's config.json. Configs are read and written by
`transformers`, which knows how older ones said the same; what it knows and this Transformer does not is refused by
name. Each number in the file has its range (`ranges`).
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers
from flax.traverse_util import flatten_dict

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import files, ranges
from rlhf_jax.models.config import Compute, Config, Experts, gpt, llama
from rlhf_jax.models.scaling import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling
from rlhf_jax.models.transformer import parameter_shapes
from rlhf_jax.types import InputError

Fields = Mapping[str, Any]  # some fields of a Config, or of a config.json, by name


class Setting(NamedTuple):
    """Fields of a Config that a family has a choice of, and what config.json has in their place.

    What `write` says of a Config, `read` takes for the same Config, or for another where config.json has no words for
    this one: `expresses` compares the two.
    """

    read: Callable[[Any], Fields]  # from settings, which `transformers` has completed; raises InputError
    write: Callable[[Config], Fields]


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


# What config.json has in place of the fields of a Config --------------------------------------------------------------


def _renamed(**names: str) -> Setting:
    """Fields that have other names."""
    return Setting(
        lambda hf: {ours: getattr(hf, theirs) for ours, theirs in names.items()},
        lambda config: {theirs: getattr(config, ours) for ours, theirs in names.items()},
    )


def _fixed(**expected: Any) -> Setting:
    """Settings of one value alone, which no Config says and the file need not have."""

    def read(hf: Any) -> Fields:
        for name, value in expected.items():
            found = getattr(hf, name, value)
            if found != value and not (value is False and found is None):
                raise InputError(f"{name}={files.shown(found)} is not supported: expected {value!r}")
        return {}

    return Setting(read, lambda config: {})


def _activation(name: str, **ours: str) -> Setting:
    """The MLP, by the name of its nonlinearity; of two names for one function the first is written."""

    def read(hf: Any) -> Fields:
        found = getattr(hf, name)
        if found not in ours:
            expected = " or ".join(repr(x) for x in ours)
            raise InputError(f"{name}={files.shown(found)} is not supported: expected {expected}")
        return {"mlp": ours[found]}

    return Setting(read, lambda config: {name: next((x for x in ours if ours[x] == config.mlp), None)})


_BIASES = {(True, True): "all", (True, False): "attention", (False, True): "mlp", (False, False): "none"}


def _biases(attention: str | bool, mlp: str | bool) -> Setting:
    """Which linear maps have a bias: for attention and MLP the name of a flag, or what holds for all of the family."""

    def read(hf: Any) -> Fields:
        on_attention, on_mlp = (bool(getattr(hf, x, None) if isinstance(x, str) else x) for x in (attention, mlp))
        return {"bias": _BIASES[on_attention, on_mlp]}

    def write(config: Config) -> Fields:
        each = next((pair for pair, bias in _BIASES.items() if bias == config.bias), ())
        return {name: on for name, on in zip((attention, mlp), each, strict=False) if isinstance(name, str)}

    return Setting(read, write)


def _square(width: str, heads: str) -> Setting:
    """Each query head has a key of its own, and all heads together the width of the model."""

    def read(hf: Any) -> Fields:
        size, rest = divmod(getattr(hf, width), count := getattr(hf, heads))
        if rest:
            raise InputError(f"{width}={getattr(hf, width)} is not a multiple of {heads}={count}")
        return {"n_kv_heads": count, "head_dim": size}

    return Setting(read, lambda config: {})


def _read_head_dim(hf: Any) -> Fields:
    size, heads = getattr(hf, "head_dim", None), hf.num_attention_heads
    if size is None and hf.hidden_size % heads:
        what = f"hidden_size={hf.hidden_size} is not a multiple of num_attention_heads={heads}"
        raise InputError(f"{what}, and there is no head_dim")
    return {"head_dim": size or hf.hidden_size // heads}


def _read_inner(hf: Any) -> Fields:
    return {"d_ff": 4 * hf.n_embd if hf.n_inner is None else hf.n_inner}


def _read_window(hf: Any) -> Fields:
    layers = hf.num_hidden_layers
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * layers
    if len(kinds) != layers or {*kinds} - {"sliding_attention", "full_attention"}:
        expected = f"sliding_attention or full_attention for each of {layers} layers"
        raise InputError(f"layer_types={files.shown(kinds)} is not supported: expected {expected}")
    full = tuple(n for n, kind in enumerate(kinds) if kind == "full_attention")
    windowed = hf.sliding_window is not None and len(full) < layers
    return {"window": hf.sliding_window, "full_layers": full} if windowed else {"window": None, "full_layers": ()}


def _write_layer_types(config: Config) -> Fields:
    far = [config.window is None or n in config.full_layers for n in range(config.n_layers)]
    kinds = ["full_attention" if full else "sliding_attention" for full in far]
    return {"sliding_window": config.window, "layer_types": kinds}


def _read_rotated(hf: Any) -> Fields:
    flags = hf.no_rope_layers
    if len(flags) != hf.num_hidden_layers or any(type(flag) is not int or flag not in (0, 1) for flag in flags):
        expected = f"expected 1 or 0 for each of {hf.num_hidden_layers} layers"
        raise InputError(f"no_rope_layers={files.shown(flags)}: {expected}")
    return {"unrotated_layers": tuple(n for n, rotated in enumerate(flags) if not rotated)}


def _read_opt_width(hf: Any) -> Fields:
    if hf.word_embed_proj_dim != hf.hidden_size:
        what = f"word_embed_proj_dim={hf.word_embed_proj_dim} is not supported"
        raise InputError(f"{what}: expected hidden_size={hf.hidden_size}")
    return {}


def _read_experts(hf: Any) -> Fields:
    count, active = hf.num_local_experts, hf.num_experts_per_tok
    if active > count:
        raise InputError(f"num_experts_per_tok={active}: expected at most the number of experts, {count}")
    return {"experts": Experts(count, active, normalized=getattr(hf, "norm_topk_prob", True))}


def _write_experts(config: Config) -> Fields:
    if config.experts is None:
        raise InputError("there are no experts")
    return {"num_local_experts": config.experts.count, "num_experts_per_tok": config.experts.active}


_HEAD_DIM = Setting(_read_head_dim, lambda config: {"head_dim": config.head_dim})
_EXPERTS = Setting(_read_experts, _write_experts)
_INNER = Setting(_read_inner, lambda config: {"n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff})
_WINDOW = Setting(_read_window, lambda config: {"sliding_window": config.window})  # of every layer
_LAYER_TYPES = Setting(_read_window, _write_layer_types)
_WEIGHTED = Setting(  # how, beside `_EXPERTS`
    lambda hf: {}, lambda config: {"norm_topk_prob": config.experts is not None and config.experts.normalized}
)
_USE_WINDOW = Setting(lambda hf: {}, lambda config: {"use_sliding_window": config.window is not None})
_QUERY_SIZE = Setting(
    lambda hf: {"query_size": hf.query_pre_attn_scalar},
    lambda config: {"query_pre_attn_scalar": config.query_size or config.head_dim},
)
_ROTATED = Setting(
    _read_rotated,
    lambda config: {"no_rope_layers": [int(n not in config.unrotated_layers) for n in range(config.n_layers)]},
)


# RoPE: what rope_parameters has, which `transformers` makes of the older rope_theta and rope_scaling too.


class _Scaling(NamedTuple):
    """A scaling as rope_parameters have it."""

    make: type[RopeScaling]
    names: Mapping[str, str]  # of its fields
    # Settings that the others, of a model with this context, imply where they are absent.
    implied: Callable[[Fields, int], Fields] = lambda rope, max_length: {}


def _yarn(rope: Fields, max_length: int) -> Fields:
    factor = rope.get("factor") or _ratio(rope, max_length)
    if "mscale" not in rope or "mscale_all_dim" not in rope:
        return {"factor": factor}
    up, down = (0.1 * rope[name] * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
    return {"factor": factor, "attention_factor": up / down}


def _longrope(rope: Fields, max_length: int) -> Fields:
    factor, length = rope.get("factor") or _ratio(rope, max_length), rope[_ORIGINAL]
    return {"attention_factor": math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0}


def _ratio(rope: Fields, max_length: int) -> float:
    return max(max_length / rope[_ORIGINAL], 1.0)


_ORIGINAL = "original_max_position_embeddings"
_SCALINGS = {  # by the rope_type
    "linear": _Scaling(LinearScaling, {"factor": "factor"}),
    "llama3": _Scaling(
        Llama3Scaling,
        {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "original_length": _ORIGINAL},
    ),
    "yarn": _Scaling(
        YarnScaling,
        {
            "factor": "factor",
            "original_length": _ORIGINAL,
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
            "truncate": "truncate",
        },
        _yarn,
    ),
    "longrope": _Scaling(
        LongScaling,
        {
            "short": "short_factor",
            "long": "long_factor",
            "original_length": _ORIGINAL,
            "attention_factor": "attention_factor",
        },
        _longrope,
    ),
}


def _read_scaling(rope: Fields, max_length: int, kinds: Sequence[str] = tuple(_SCALINGS)) -> RopeScaling | None:
    """The scaling that rope_parameters name, of these rope_types."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in ("default", *kinds))
        raise InputError(f"rope_type {files.shown(kind)} is not supported: expected {expected}")
    make, names, implied = _SCALINGS[kind]
    said = {name: value for name, value in rope.items() if value is not None}
    said = {**(implied(said, max_length) if _ORIGINAL in said else {}), **said}
    found = {ours: said[theirs] for ours, theirs in names.items() if theirs in said}
    needed = [field.name for field in dataclasses.fields(make) if field.default is dataclasses.MISSING]
    if absent := [names[ours] for ours in needed if ours not in found]:
        raise InputError(f"rope_type {kind!r} needs {', '.join(absent)}, which rope_parameters or rope_scaling lacks")
    values: dict[str, Any] = {ours: tuple(x) if isinstance(x, list) else x for ours, x in found.items()}
    scaling = make(**values)
    for below, above in (("low", "high"), ("beta_slow", "beta_fast")):
        if hasattr(scaling, below) and getattr(scaling, below) >= getattr(scaling, above):
            low, high = (f"{names[x]}={getattr(scaling, x)}" for x in (below, above))
            raise InputError(f"{low}: expected less than {high}")
    return scaling


def _write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind, names = next((kind, row.names) for kind, row in _SCALINGS.items() if row.make is type(scaling))
    default = {field.name for field in dataclasses.fields(scaling) if getattr(scaling, field.name) == field.default}
    said = {theirs: getattr(scaling, ours) for ours, theirs in names.items() if ours not in default}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}
    return {"rope_type": kind, "rope_theta": theta} | listed


def _rope(*kinds: str, partial: bool = False) -> Setting:
    """RoPE with these scalings, of all layers; `partial` says that a part of each head may rotate."""

    def read(hf: Any) -> Fields:
        rope = hf.rope_parameters
        share = rope.get("partial_rotary_factor") or 1.0
        size = _read_head_dim(hf)["head_dim"]
        rotary = int(size * share)
        if share != 1.0 and not partial:
            raise InputError("partial_rotary_factor is not supported: expected 1")
        if partial and (rotary < 2 or rotary % 2):
            what = f"partial_rotary_factor={share}: it rotates {rotary} of {size} features of a head"
            raise InputError(f"{what}, expected an even number of them")
        return {
            "rope_theta": float(rope["rope_theta"]),
            "rope_scaling": _read_scaling(rope, hf.max_position_embeddings, kinds),
            "rotary_size": rotary if rotary < size else None,
        }

    def write(config: Config) -> Fields:
        rope = _write_rope(config.rope_theta, config.rope_scaling)
        beside = {_ORIGINAL: rope[_ORIGINAL]} if partial and _ORIGINAL in rope else {}  # where Phi-3 has it
        rotated = {"partial_rotary_factor": share(config.rotary_size or config.head_dim, config.head_dim)}
        return {"rope_parameters": rope | rotated if partial else rope} | beside

    return Setting(read, write)


def share(part: int, whole: int) -> float:
    """The number by which `whole` is multiplied to give `part`, rounded down."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 2.0)


def _read_two_ropes(hf: Any) -> Fields:
    full, windowed = (hf.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    scaling, own = (_read_scaling(rope, hf.max_position_embeddings) for rope in (full, windowed))
    theta, own_theta = (float(rope["rope_theta"]) for rope in (full, windowed))
    if any((rope.get("partial_rotary_factor") or 1.0) != 1.0 for rope in (full, windowed)):
        raise InputError("partial_rotary_factor is not supported: expected 1")
    same = (theta, scaling) == (own_theta, own)
    if own is not None and not same:
        raise InputError(
            f"rope_type {windowed['rope_type']!r} of sliding_attention is not supported: expected 'default'"
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "window_theta": None if same else own_theta}


def _write_two_ropes(config: Config) -> Fields:
    full = _write_rope(config.rope_theta, config.rope_scaling)
    own = full if config.window_theta is None else _write_rope(config.window_theta, None)
    return {"rope_parameters": {"full_attention": full, "sliding_attention": own}}


_TWO_ROPES = Setting(_read_two_ropes, _write_two_ropes)  # of full layers, and of those with a window


# The families ---------------------------------------------------------------------------------------------------------

_SIZES = _renamed(
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
_SILU = _activation("hidden_act", silu="swiglu")
_ROPE = _rope(*_SCALINGS)
_CAPS = _renamed(attention_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping")
_CAUSAL = _fixed(use_bidirectional_attention=False)

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
            _renamed(
                n_layers="n_layer",
                d_model="n_embd",
                n_heads="n_head",
                vocab_size="vocab_size",
                max_length="n_positions",
                norm_eps="layer_norm_epsilon",
                inverse_layer_scale="scale_attn_by_inverse_layer_idx",
            ),
            _fixed(scale_attn_weights=True, add_cross_attention=False, tie_word_embeddings=True),
            _activation("activation_function", gelu_new="gelu"),
            _square("n_embd", "n_head"),
            _INNER,
        ),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        _GPT2_NAMES,
        "transformer.h.{}.",
        transposed=False,
    ),
    "llama": Family(
        _LLAMA,
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _biases("attention_bias", "mlp_bias")),
        _classes("Llama"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "mistral": Family(
        _LLAMA,
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _WINDOW, _fixed(attention_bias=False, mlp_bias=False)),
        _classes("Mistral"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "qwen2": Family(
        dataclasses.replace(_LLAMA, bias="qkv"),
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _LAYER_TYPES, _USE_WINDOW, _fixed(attention_bias=False, mlp_bias=False)),
        _classes("Qwen2"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "qwen3": Family(
        dataclasses.replace(_LLAMA, qk_norm="head"),
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _LAYER_TYPES, _USE_WINDOW, _biases("attention_bias", False)),
        _classes("Qwen3"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "mixtral": Family(
        _LLAMA,
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _WINDOW, _EXPERTS, _fixed(router_jitter_noise=0.0)),
        _classes("Mixtral"),
        _LLAMA_NAMES | _MIXTRAL_NAMES,
        _LAYER,
    ),
    "qwen3_moe": Family(
        dataclasses.replace(_LLAMA, qk_norm="head"),
        (
            *(_SIZES, _renamed(d_ff="moe_intermediate_size"), _HEAD_DIM, _SILU, _ROPE, _WINDOW, _USE_WINDOW),
            *(_EXPERTS, _WEIGHTED, _biases("attention_bias", False), _fixed(decoder_sparse_step=1, mlp_only_layers=[])),
        ),
        _classes("Qwen3Moe"),
        _LLAMA_NAMES | _QWEN_MOE_NAMES,
        _LAYER,
    ),
    "gemma2": Family(
        _GEMMA2,
        (
            *(_SIZES, _HEAD_DIM, _activation("hidden_activation", gelu_pytorch_tanh="geglu")),
            *(_ROPE, _LAYER_TYPES, _QUERY_SIZE, _CAPS, _CAUSAL, _biases("attention_bias", False)),
        ),
        _classes("Gemma2"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "gemma3_text": Family(
        dataclasses.replace(_GEMMA2, qk_norm="head"),
        (
            *(_SIZES, _HEAD_DIM, _activation("hidden_activation", gelu_pytorch_tanh="geglu")),
            *(_TWO_ROPES, _LAYER_TYPES, _QUERY_SIZE, _CAPS, _CAUSAL, _biases("attention_bias", False)),
        ),
        ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "olmo2": Family(
        _OLMO,
        (_SIZES, _HEAD_DIM, _SILU, _ROPE, _biases("attention_bias", False)),
        _classes("Olmo2"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "olmo3": Family(
        _OLMO,
        (_SIZES, _HEAD_DIM, _SILU, _TWO_ROPES, _LAYER_TYPES, _biases("attention_bias", False)),
        _classes("Olmo3"),
        _LLAMA_NAMES | _POST_NORM_NAMES,
        _LAYER,
    ),
    "smollm3": Family(
        _LLAMA,
        (
            *(_SIZES, _HEAD_DIM, _SILU, _ROPE, _ROTATED),
            *(_LAYER_TYPES, _USE_WINDOW, _biases("attention_bias", "mlp_bias")),
        ),
        _classes("SmolLM3"),
        _LLAMA_NAMES,
        _LAYER,
    ),
    "phi3": Family(
        _LLAMA,
        (_SIZES, _HEAD_DIM, _SILU, _rope("longrope", partial=True), _WINDOW),
        _classes("Phi3"),
        _LLAMA_NAMES | _PHI3_NAMES,
        _LAYER,
    ),
    "gpt_neox": Family(
        _NEOX,
        (
            _renamed(
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
            _square("hidden_size", "num_attention_heads"),
            _activation("hidden_act", gelu="gelu_exact", gelu_new="gelu", gelu_fast="gelu", relu="relu"),
            _rope(*_SCALINGS, partial=True),
            _biases("attention_bias", True),
        ),
        _classes("GPTNeoX"),
        _NEOX_NAMES,
        "gpt_neox.layers.{}.",
        by_head=True,
    ),
    "opt": Family(
        _OPT,
        (
            _renamed(
                n_layers="num_hidden_layers",
                d_model="hidden_size",
                n_heads="num_attention_heads",
                d_ff="ffn_dim",
                vocab_size="vocab_size",
                max_length="max_position_embeddings",
                tie_embeddings="tie_word_embeddings",
            ),
            _square("hidden_size", "num_attention_heads"),
            Setting(_read_opt_width, lambda config: {"word_embed_proj_dim": config.d_model}),
            _activation("activation_function", relu="relu", gelu="gelu_exact", gelu_new="gelu"),
            _biases("enable_bias", "enable_bias"),
            _fixed(do_layer_norm_before=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
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
        written = types.SimpleNamespace(**_written(row, config))
        return _normal(_read(row, written)) == _normal(config)
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


def _read(row: Family, hf: Any) -> Config:
    fields: dict[str, Any] = {}
    for setting in row.settings:
        fields |= setting.read(hf)
    return dataclasses.replace(row.like, **fields)


def _written(row: Family, config: Config) -> Fields:
    written: dict[str, Any] = {}
    for setting in row.settings:
        written |= setting.write(config)
    return written


# Configs --------------------------------------------------------------------------------------------------------------


def load_config(path: Path) -> Config:
    """The architecture of a model directory. Raises InputError where it is none that this Transformer expresses."""
    files.check_directory(path, "config.json")
    file = path / "config.json"
    read = functools.partial(
        transformers.AutoConfig.from_pretrained, path, local_files_only=True, trust_remote_code=False
    )
    return read_config(files.read_json(file), file, read)


def hf_settings(raw: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The settings of a config.json, as `transformers` completes them."""
    return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict({**raw})


def read_config(raw: Mapping[str, Any], file: Path, read: Callable[[], transformers.PretrainedConfig]) -> Config:
    """The architecture that the settings `raw` of a `file` tell of, which `read` returns once they are checked."""
    kind = raw.get("model_type")
    if kind not in SUPPORTED:
        found = files.shown(kind)
        raise InputError(f"{file}: model_type {found} is not supported: expected one of {', '.join(SUPPORTED)}")
    if raw.get("quantization_config"):
        raise InputError(f"{file}: quantization_config is not supported: expected float weights")
    try:
        ranges.check_numbers(raw)
        config = dataclasses.replace(_read(FAMILIES[kind], read()), family=kind)
        for name, value in vars(config).items():
            if isinstance(value, int) and value >= 2**31:
                raise InputError(f"{name}={value}: expected less than 2^31")
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except Exception as error:  # the library checks some values, with errors of its own, and trips over others
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{file} cannot be read: {' '.join(lines[:2])[:300] or type(error).__name__}") from error
    return config


def hf_config(config: Config, scalar: bool, dtype: str, tokenizer: Tokenizer | None) -> transformers.PretrainedConfig:
    """The config.json of a model whose weights have the type `dtype`; `scalar` says that it is a reward model."""
    kind = family(config)
    row = FAMILIES[kind]
    every: dict[str, Any] = {
        "architectures": [row.classes[1 if scalar else 0]],
        "dtype": dtype,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    every |= {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if scalar:
        every |= {"num_labels": 1}
        if every["pad_token_id"] == every["eos_token_id"]:
            every["pad_token_id"] = None  # transformers would read the score before EOS, where it looks for padding
    return transformers.CONFIG_MAPPING[kind](**{**every, **_written(row, config)})


# How a checkpoint's tensors lie in the parameters ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the parameters, and the tensors of a checkpoint that it is made of.

    `into` takes numpy's arrays; `out` takes theirs, and jax's for their shapes alone.
    """

    leaf: str  # path in the parameters
    names: tuple[str, ...]  # of the tensors; {} stands for the layer, in a leaf with an axis of layers
    into: Callable[..., Any] = lambda tensor: tensor  # tensors (of one layer) -> leaf
    out: Callable[[Any], tuple[Any, ...]] = lambda leaf: (leaf,)  # its inverse


def entries(config: Config, scalar: bool) -> list[Entry]:
    """The entries of a language model or, without its unembedding, of a `heads.ScalarModel`'s trunk."""
    row = FAMILIES[family(config)]
    leaves = {path: x.shape for path, x in flatten_dict(parameter_shapes(config), sep="/").items()}
    if scalar:
        leaves.pop("unembedding", None)

    def place(path: str) -> tuple[int, bool]:
        module = path if path in row.names else path.removeprefix("blocks/").rpartition("/")[0]
        return list(row.names).index(module), path.endswith("/bias")

    paths = sorted(leaves, key=place)
    whole = [path for path in paths if not path.startswith("blocks/")]
    blocks = [path for path in paths if path.startswith("blocks/")]
    return [
        *(_entry(row, config, path, leaves[path]) for path in whole),
        *(_block_entry(row, config, path, leaves[path][1:]) for path in blocks),
    ]


def unembedding(config: Config) -> str:
    """The name of the tensor that an untied unembedding is, and a tied one may be."""
    (name,) = FAMILIES[family(config)].names["unembedding"]
    return f"{name}.weight"


_INPUTS = {"attention/out": 3}  # axes of a kernel that are inputs, where they are several


def _block_entry(row: Family, config: Config, path: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a leaf in blocks; where its first axis is that of experts, each has tensors of its own."""
    if "/experts/" not in path:
        return _entry(row, config, path, shape)
    one, count = _entry(row, config, path, shape[1:]), shape[0]
    each = len(one.names)

    def into(*tensors: np.ndarray) -> np.ndarray:
        return np.stack([one.into(*tensors[n * each : (n + 1) * each]) for n in range(count)])

    def out(leaf: Any) -> tuple[Any, ...]:
        return tuple(tensor for n in range(count) for tensor in one.out(leaf[n]))

    return Entry(path, tuple(name.replace("*", str(n)) for n in range(count) for name in one.names), into, out)


def _entry(row: Family, config: Config, path: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a leaf of this shape, without an axis of layers."""
    if path in row.names:  # a table of vectors
        return Entry(path, tuple(f"{name}.weight" for name in row.names[path]))
    module, parameter = path.removeprefix("blocks/").rsplit("/", 1)
    before = row.layer if path.startswith("blocks/") else ""
    names = tuple(f"{before}{name}.{'bias' if parameter == 'bias' else 'weight'}" for name in row.names[module])
    rows = (math.prod(shape[: _INPUTS.get(module, 1)]),) if parameter == "kernel" else ()
    turned = row.transposed and parameter == "kernel"
    parts = _parts(row, config, module)
    ends = np.cumsum(parts).tolist()
    shapes = [(*shape[:-2], part, shape[-1]) for part in parts] or [shape]

    def into(*tensors: np.ndarray) -> np.ndarray:
        flat = [tensor.T if turned else tensor for tensor in tensors]
        if len(flat) < len(shapes):
            sizes = [math.prod(part) // math.prod(rows) for part in shapes]
            flat = np.split(flat[0], np.cumsum(sizes)[:-1], axis=-1)
        found = [tensor.reshape(part) for tensor, part in zip(flat, shapes, strict=True)]
        return np.concatenate(found, axis=-2) if parts else found[0]

    def out(leaf: Any) -> tuple[Any, ...]:
        found = [leaf[..., end - part : end, :] for part, end in zip(parts, ends, strict=True)] or [leaf]
        flat = [part.reshape(*rows, -1) for part in found]
        if len(names) < len(flat):
            flat = [flat[0].__array_namespace__().concat(flat, axis=-1)]
        return tuple(tensor.T if turned else tensor for tensor in flat)

    return Entry(path, names, into, out)


def _parts(row: Family, config: Config, module: str) -> tuple[int, ...]:
    """Sizes, along the last axis but one, of parts of a leaf that are apart in the file; none where it is all one."""
    if module == "attention/qkv" and not row.by_head:
        return config.n_heads // config.n_kv_heads, 1, 1
    return (1, 1) if module in ("mlp/up", "mlp/experts/up") and config.gated else ()
