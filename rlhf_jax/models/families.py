"""The names of settings and tensors in each published architecture, and the `Config` that it stands for.

A family is a `model_type` of Hugging Face's config.json. Configs are read and written by `transformers`, which knows
how older ones said the same; what it knows and this Transformer does not is refused by name. Each number in the file
has its range, under the name that it has there: `_NUMBERS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import files
from rlhf_jax.models.config import Config, RopeScaling, gpt, llama
from rlhf_jax.types import InputError

# The families with RoPE, RMSNorm and a gated MLP: the settings that set each apart from Llama, and those that it may
# have beside Llama's.
_LLAMA_LIKE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({}, ()),
    "mistral": ({}, ("window",)),
    "qwen2": ({"bias": "qkv"}, ("window", "full_layers")),
    "qwen3": ({"qk_norm": True}, ("window", "full_layers")),
    "gemma2": (
        {"mlp": "geglu", "scale_embedding": True, "unit_offset": True, "post_norm": True},
        ("window", "full_layers", "query_size", "attention_cap", "logit_cap"),
    ),
}
SUPPORTED = ("gpt2", *_LLAMA_LIKE)
_ANY = {"head_dim", "rope_theta", "dropout", "compute"}  # settings of every family, beside those of _SIZES
_SIZES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_GPT2_SIZES = {  # n_inner, the width of the MLP, is beside these: null is 4 n_embd
    "n_layers": "n_layer",
    "d_model": "n_embd",
    "n_heads": "n_head",
    "vocab_size": "vocab_size",
    "max_length": "n_positions",
    "norm_eps": "layer_norm_epsilon",
}


class _Range(NamedTuple):
    """The numbers that a field of config.json may hold."""

    kind: type  # int, or float for any number
    low: float
    high: float
    expected: str  # the range in words


_TINY, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_SIZE = _Range(int, 1, 2**31 - 1, "a whole number from 1 to 2^31 - 1")
_COUNT = _Range(int, 0, 2**31 - 1, "a whole number from 0 to 2^31 - 1")
_POSITIVE = _Range(float, _TINY, _MOST, "a number above 0, in float32's range")
_FACTOR = _Range(float, 1, _MOST, "a number from 1 on, in float32's range")
_EPSILON = _Range(float, _TINY, 1, "a number above 0, at most 1")
_RATE = _Range(float, 0, 1 - 2**-24, "a number from 0 to below 1")
_NUMBERS: dict[str, _Range] = {
    **{name: _SIZE for name in (*_SIZES.values(), *_GPT2_SIZES.values())},
    **{name: _SIZE for name in ("n_inner", "head_dim", "sliding_window", "query_pre_attn_scalar", "n_ctx")},
    **{name: _COUNT for name in ("max_window_layers",)},
    **{name: _EPSILON for name in ("rms_norm_eps", "layer_norm_epsilon")},
    **{name: _POSITIVE for name in ("rope_theta", "attn_logit_softcapping", "final_logit_softcapping")},
    **{name: _RATE for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")},
    **{name: _RATE for name in ("classifier_dropout", "summary_first_dropout")},
}
del _NUMBERS["tie_word_embeddings"]
_ROPE_NUMBERS: dict[str, _Range] = {
    "rope_theta": _POSITIVE,
    "factor": _FACTOR,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
}
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
)
_NEVER_NULL = {*_SIZES.values(), *_GPT2_SIZES.values(), "rope_theta"} - {"num_key_value_heads"}


def family(config: Config) -> str:
    """The first family that expresses a config; raises InputError where none does."""
    square = config.n_kv_heads == config.n_heads and config.n_heads * config.head_dim == config.d_model
    if square and config.tie_embeddings and _same(config, gpt(config.n_layers, config.d_model, config.n_heads), ()):
        return "gpt2"
    for name, (settings, optional) in _LLAMA_LIKE.items():
        like = llama(1, config.head_dim, 1, 1, config.d_ff)  # sizes may differ
        if _same(config, dataclasses.replace(like, **settings), ("rope_scaling", *optional)):
            return name
    raise InputError(f"no Hugging Face architecture among {', '.join(SUPPORTED)} expresses {config}")


def _same(config: Config, other: Config, optional: tuple[str, ...]) -> bool:
    """Whether two configs differ in sizes and `optional` settings at most."""
    names = {field.name for field in dataclasses.fields(config)} - _ANY - {*_SIZES, *optional}
    return all(getattr(config, name) == getattr(other, name) for name in names)


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
        check_numbers(raw)
        hf = read()
        config = _gpt2_config(hf) if kind == "gpt2" else _gated_config(hf, kind)
        for name, value in vars(config).items():
            if isinstance(value, int) and value >= 2**31:
                raise InputError(f"{name}={value}: expected less than 2^31")
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except Exception as error:  # the library checks some values, with errors of its own, and trips over others
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{file} cannot be read: {' '.join(lines[:2])[:300] or type(error).__name__}") from error
    return config


def check_numbers(raw: Mapping[str, Any]) -> None:
    """Raises InputError for the first field of config.json whose value is of another type, or out of its range."""
    for name, value in raw.items():
        if name in _NUMBERS:
            _check_number(name, value, _NUMBERS[name], name not in _NEVER_NULL)
        elif name in _FLAGS and not isinstance(value, bool | None):
            raise InputError(f"{name}={files.shown(value)}: expected true or false")
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int for i in ids):
                raise InputError(f"{name}={files.shown(value)}: expected an id, or a list of ids")
        elif name in ("rope_parameters", "rope_scaling") and value is not None:
            if not isinstance(value, dict):
                raise InputError(f"{name}={files.shown(value)}: expected an object")
            for inner, number in value.items():
                if inner in _ROPE_NUMBERS:
                    _check_number(f"{name}.{inner}", number, _ROPE_NUMBERS[inner], False)
    if raw.get("tie_word_embeddings", True) is None:
        raise InputError("tie_word_embeddings=None: expected true or false")


def _check_number(name: str, value: Any, allowed: _Range, nullable: bool) -> None:
    if value is None and nullable:
        return
    kinds = (int,) if allowed.kind is int else (int, float)
    if type(value) not in kinds or not allowed.low <= value <= allowed.high:
        raise InputError(f"{name}={files.shown(value)}: expected {allowed.expected}{' or null' if nullable else ''}")


def _gpt2_config(hf: Any) -> Config:
    _expect(hf, activation_function="gelu_new", scale_attn_weights=True, tie_word_embeddings=True)
    _expect(hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    if hf.n_embd % hf.n_head:
        raise InputError(f"n_embd={hf.n_embd} is not a multiple of n_head={hf.n_head}")
    sizes = {ours: getattr(hf, theirs) for ours, theirs in _GPT2_SIZES.items()}
    config = gpt(**sizes)
    return config if hf.n_inner is None else dataclasses.replace(config, d_ff=hf.n_inner)


def _gated_config(hf: Any, kind: str) -> Config:
    activation = "hidden_activation" if kind == "gemma2" else "hidden_act"
    _expect(hf, **{activation: "gelu_pytorch_tanh" if kind == "gemma2" else "silu"})
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        _expect(hf, **{name: (False, None)} if hasattr(hf, name) else {})
    settings, optional = _LLAMA_LIKE[kind]
    sizes = {ours: getattr(hf, theirs) for ours, theirs in _SIZES.items()}
    if getattr(hf, "head_dim", None) is None and hf.hidden_size % hf.num_attention_heads:
        heads = f"num_attention_heads={hf.num_attention_heads}"
        raise InputError(f"hidden_size={hf.hidden_size} is not a multiple of {heads}, and there is no head_dim")
    found: dict[str, Any] = {"head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads}
    window = hf.sliding_window if "window" in optional else None
    if window is not None:
        kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
        if len(kinds) != hf.num_hidden_layers or {*kinds} - {"sliding_attention", "full_attention"}:
            expected = f"sliding_attention or full_attention for each of {hf.num_hidden_layers} layers"
            raise InputError(f"layer_types={files.shown(kinds)} is not supported: expected {expected}")
        full = tuple(n for n, layer in enumerate(kinds) if layer == "full_attention")
        if len(full) < len(kinds):
            found |= {"window": window, "full_layers": full}
    if kind == "gemma2":
        found |= {"attention_cap": hf.attn_logit_softcapping, "logit_cap": hf.final_logit_softcapping}
        found |= {"query_size": hf.query_pre_attn_scalar}
    return llama(**sizes, **settings, **found, **_rope(hf.rope_parameters))


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of a Config that tell of RoPE."""
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("partial_rotary_factor is not supported: expected 1")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise InputError(f"rope_type {files.shown(kind)} is not supported: expected 'default' or 'llama3'")
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    if absent := [name for name in names if name not in rope]:
        raise InputError(f"rope_type 'llama3' needs {', '.join(absent)}, which rope_parameters or rope_scaling lacks")
    scaling = RopeScaling(*(rope[name] for name in names))
    if scaling.low >= scaling.high:
        high = f"high_freq_factor={scaling.high}"
        raise InputError(f"low_freq_factor={scaling.low}: expected less than {high}")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _expect(config: Any, **settings: Any) -> None:
    for name, expected in settings.items():
        found = getattr(config, name)
        if found not in (expected if isinstance(expected, tuple) else (expected,)):
            shown = expected[0] if isinstance(expected, tuple) else expected
            raise InputError(f"{name}={files.shown(found)} is not supported: expected {shown!r}")


def hf_config(config: Config, scalar: bool, dtype: str, tokenizer: Tokenizer | None) -> transformers.PretrainedConfig:
    """The config.json of a model whose weights have the type `dtype`; `scalar` says that it is a reward model."""
    kind = family(config)
    name = "GPT2" if kind == "gpt2" else kind.capitalize()
    causal = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    every: dict[str, Any] = {
        "architectures": [name + ("ForSequenceClassification" if scalar else causal)],
        "dtype": dtype,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
    every |= {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if scalar:
        every |= {"num_labels": 1}
        if every["pad_token_id"] == every["eos_token_id"]:
            every["pad_token_id"] = None  # transformers would read the score before EOS, where it looks for padding
    make = getattr(transformers, f"{name}Config")
    if kind == "gpt2":
        sizes = {theirs: getattr(config, ours) for ours, theirs in _GPT2_SIZES.items()}
        return make(**every | sizes, n_inner=None if config.d_ff == 4 * config.d_model else config.d_ff)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low}
        rope |= {"high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_length}
    every |= {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    every |= {"head_dim": config.head_dim, "rope_parameters": rope}
    _, optional = _LLAMA_LIKE[kind]
    if "window" in optional:
        every |= {"sliding_window": config.window}
    if "full_layers" in optional:
        kinds = ("full_attention", "sliding_attention")
        far = [n in config.full_layers or config.window is None for n in range(config.n_layers)]
        every |= {"layer_types": [kinds[0] if full else kinds[1] for full in far]}
        every |= {} if kind == "gemma2" else {"use_sliding_window": config.window is not None}
    if kind == "gemma2":
        every |= {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logit_cap}
        every |= {"query_pre_attn_scalar": config.query_size or config.head_dim}
    return make(**every)


# How a checkpoint's tensors lie in the parameters ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the parameters, and the tensors of a checkpoint that it is made of.

    `into` and `out` use methods and slices alone, which numpy's arrays and jax's shapes both have.
    """

    leaf: str  # path in the parameters
    names: tuple[str, ...]  # of the tensors; {} stands for the layer, in a leaf with an axis of layers
    into: Callable[..., Any] = lambda tensor: tensor  # tensors (of one layer) -> leaf
    out: Callable[[Any], tuple[Any, ...]] = lambda leaf: (leaf,)  # its inverse


def entries(config: Config, scalar: bool) -> list[Entry]:
    """The entries of a language model or, without its unembedding, of a `heads.ScalarModel`'s trunk."""
    untied = [] if config.tie_embeddings or scalar else [Entry("unembedding", ("lm_head.weight",))]
    return (_gpt2(config) if family(config) == "gpt2" else _gated(config)) + untied


_KERNEL = {"kernel": "weight", "bias": "bias"}
_SCALE = {"scale": "weight", "bias": "bias"}


def _gpt2(c: Config) -> list[Entry]:
    """GPT-2 keeps matrices as [in, out], and query, key and value side by side."""
    qkv = (3, c.n_heads, c.head_dim)
    layer = "transformer.h.{}."
    found = [
        Entry("embedding", ("transformer.wte.weight",)),
        Entry("positions", ("transformer.wpe.weight",)),
        Entry("final_norm/scale", ("transformer.ln_f.weight",)),
        Entry("final_norm/bias", ("transformer.ln_f.bias",)),
        Entry(
            "blocks/attention/qkv/kernel",
            (layer + "attn.c_attn.weight",),
            lambda t: t.reshape(c.d_model, *qkv).swapaxes(1, 2),
            lambda x: (x.swapaxes(1, 2).reshape(c.d_model, -1),),
        ),
        Entry(
            "blocks/attention/qkv/bias",
            (layer + "attn.c_attn.bias",),
            lambda t: t.reshape(qkv).swapaxes(0, 1),
            lambda x: (x.swapaxes(0, 1).reshape(-1),),
        ),
        Entry(
            "blocks/attention/out/kernel",
            (layer + "attn.c_proj.weight",),
            lambda t: t.reshape(c.n_heads, 1, c.head_dim, c.d_model),
            lambda x: (x.reshape(-1, c.d_model),),
        ),
        Entry("blocks/attention/out/bias", (layer + "attn.c_proj.bias",)),
    ]
    for ours, theirs in {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}.items():
        found += [Entry(f"blocks/{ours}/{k}", (f"{layer}{theirs}.{t}",)) for k, t in _KERNEL.items()]
    for ours, theirs in {"norm_1": "ln_1", "norm_2": "ln_2"}.items():
        found += [Entry(f"blocks/{ours}/{k}", (f"{layer}{theirs}.{t}",)) for k, t in _SCALE.items()]
    return found


def _gated(c: Config) -> list[Entry]:
    """Llama and its kin keep matrices as [out, in]. Query head h reads key/value head h // R."""
    shared = c.n_heads // c.n_kv_heads
    layer = "model.layers.{}."
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."

    def split(x: Any) -> tuple[Any, ...]:
        """Kernels [D, G, R + 2, H] and biases [G, R + 2, H] to those of query, key and value."""
        parts = x[..., :shared, :], x[..., shared, :], x[..., shared + 1, :]
        return tuple(part.reshape(*x.shape[:-3], -1).T for part in parts)

    def fused(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        heads = [t.T.reshape(*t.shape[1:], c.n_kv_heads, -1, c.head_dim) for t in (q, k, v)]
        return np.concatenate(heads, axis=-2)

    found = [
        Entry("embedding", ("model.embed_tokens.weight",)),
        Entry("final_norm/scale", ("model.norm.weight",)),
        Entry("blocks/attention/qkv/kernel", tuple(f"{attention}{x}_proj.weight" for x in "qkv"), fused, split),
        Entry(
            "blocks/attention/out/kernel",
            (attention + "o_proj.weight",),
            lambda t: t.T.reshape(c.n_kv_heads, shared, c.head_dim, c.d_model),
            lambda x: (x.reshape(-1, c.d_model).T,),
        ),
        Entry(
            "blocks/mlp/up/kernel",
            (mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            lambda gate, up: np.stack([gate.T, up.T], axis=1),
            lambda x: (x[:, 0].T, x[:, 1].T),
        ),
        Entry("blocks/mlp/down/kernel", (mlp + "down_proj.weight",), lambda t: t.T, lambda x: (x.T,)),
    ]
    if c.bias == "qkv":
        found.append(
            Entry("blocks/attention/qkv/bias", tuple(f"{attention}{x}_proj.bias" for x in "qkv"), fused, split)
        )
    norms = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    if c.post_norm:
        norms = {"norm_1": "input_layernorm", "post_norm_1": "post_attention_layernorm"}
        norms |= {"norm_2": "pre_feedforward_layernorm", "post_norm_2": "post_feedforward_layernorm"}
    if c.qk_norm:
        norms |= {f"attention/{ours}_norm": f"self_attn.{ours[0]}_norm" for ours in ("query", "key")}
    return found + [Entry(f"blocks/{ours}/scale", (f"{layer}{theirs}.weight",)) for ours, theirs in norms.items()]
