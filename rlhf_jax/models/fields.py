"""The settings of a config.json in place of the fields of a `Config`; the rows of `families` are made of them.

Those of RoPE are in `rope_fields`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.models import files
from rlhf_jax.models.config import Config, Experts
from rlhf_jax.types import InputError

Fields = Mapping[str, Any]  # some fields of a Config, or of a config.json, by name


class Setting(NamedTuple):
    """Fields of a Config that a family has a choice of, and what config.json has in their place.

    What `write` says of a Config, `read` takes for the same Config, or for another where config.json has no words for
    this one: `families.family` compares the two.
    """

    read: Callable[[Any], Fields]  # from settings, which `transformers` has completed; raises InputError
    write: Callable[[Config], Fields]


def renamed(**names: str) -> Setting:
    """Fields that have other names."""
    return Setting(
        lambda hf: {ours: getattr(hf, theirs) for ours, theirs in names.items()},
        lambda config: {theirs: getattr(config, ours) for ours, theirs in names.items()},
    )


def fixed(**expected: Any) -> Setting:
    """Settings of one value alone, which no Config says and the file need not have."""

    def read(hf: Any) -> Fields:
        for name, value in expected.items():
            found = getattr(hf, name, value)
            if found != value and not (value is False and found is None):
                raise InputError(f"{name}={files.shown(found)} is not supported: expected {value!r}")
        return {}

    return Setting(read, lambda config: {})


def activation(name: str, **ours: str) -> Setting:
    """The MLP, by the name of its nonlinearity; of two names for one function the first is written."""

    def read(hf: Any) -> Fields:
        found = getattr(hf, name)
        if found not in ours:
            expected = " or ".join(repr(x) for x in ours)
            raise InputError(f"{name}={files.shown(found)} is not supported: expected {expected}")
        return {"mlp": ours[found]}

    return Setting(read, lambda config: {name: next((x for x in ours if ours[x] == config.mlp), None)})


_BIASES = {(True, True): "all", (True, False): "attention", (False, True): "mlp", (False, False): "none"}


def biases(attention: str | bool, mlp: str | bool) -> Setting:
    """Which linear maps have a bias: for attention and MLP the name of a flag, or what holds for all of the family."""

    def read(hf: Any) -> Fields:
        on_attention, on_mlp = (bool(getattr(hf, x, None) if isinstance(x, str) else x) for x in (attention, mlp))
        return {"bias": _BIASES[on_attention, on_mlp]}

    def write(config: Config) -> Fields:
        each = next((pair for pair, bias in _BIASES.items() if bias == config.bias), ())
        return {name: on for name, on in zip((attention, mlp), each, strict=False) if isinstance(name, str)}

    return Setting(read, write)


def square(width: str, heads: str) -> Setting:
    """Each query head has a key of its own, and all heads together the width of the model."""

    def read(hf: Any) -> Fields:
        size, rest = divmod(getattr(hf, width), count := getattr(hf, heads))
        if rest:
            raise InputError(f"{width}={getattr(hf, width)} is not a multiple of {heads}={count}")
        return {"n_kv_heads": count, "head_dim": size}

    return Setting(read, lambda config: {})


def read_head_dim(hf: Any) -> Fields:
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


def _read_experts(hf: Any) -> Fields:
    count, active = hf.num_local_experts, hf.num_experts_per_tok
    if active > count:
        raise InputError(f"num_experts_per_tok={active}: expected at most the number of experts, {count}")
    return {"experts": Experts(count, active, normalized=getattr(hf, "norm_topk_prob", True))}


def _write_experts(config: Config) -> Fields:
    if config.experts is None:
        raise InputError("there are no experts")
    return {"num_local_experts": config.experts.count, "num_experts_per_tok": config.experts.active}


def _read_opt_width(hf: Any) -> Fields:
    if hf.word_embed_proj_dim != hf.hidden_size:
        what = f"word_embed_proj_dim={hf.word_embed_proj_dim} is not supported"
        raise InputError(f"{what}: expected hidden_size={hf.hidden_size}")
    return {}


HEAD_DIM = Setting(read_head_dim, lambda config: {"head_dim": config.head_dim})
EXPERTS = Setting(_read_experts, _write_experts)
INNER = Setting(_read_inner, lambda config: {"n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff})
WINDOW = Setting(_read_window, lambda config: {"sliding_window": config.window})  # of every layer
LAYER_TYPES = Setting(_read_window, _write_layer_types)
WEIGHTED = Setting(  # how, beside `EXPERTS`
    lambda hf: {}, lambda config: {"norm_topk_prob": config.experts is not None and config.experts.normalized}
)
USE_WINDOW = Setting(lambda hf: {}, lambda config: {"use_sliding_window": config.window is not None})
QUERY_SIZE = Setting(
    lambda hf: {"query_size": hf.query_pre_attn_scalar},
    lambda config: {"query_pre_attn_scalar": config.query_size or config.head_dim},
)
ROTATED = Setting(
    _read_rotated,
    lambda config: {"no_rope_layers": [int(n not in config.unrotated_layers) for n in range(config.n_layers)]},
)
OPT_WIDTH = Setting(_read_opt_width, lambda config: {"word_embed_proj_dim": config.d_model})
