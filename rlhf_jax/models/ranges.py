"""The range of each number of a config.json, under the name that it has there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models import files
from rlhf_jax.types import InputError


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
_SHARE = _Range(float, _TINY, 1, "a number above 0, at most 1")
_WEIGHT = _Range(float, 0, _MOST, "a number from 0 on, in float32's range")
_RATE = _Range(float, 0, 1 - 2**-24, "a number from 0 to below 1")

_NEVER_NULL: dict[str, _Range] = {
    "vocab_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "hidden_size": _SIZE,
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "max_position_embeddings": _SIZE,
    "original_max_position_embeddings": _SIZE,
    "n_layer": _SIZE,
    "n_embd": _SIZE,
    "n_head": _SIZE,
    "n_positions": _SIZE,
    "ffn_dim": _SIZE,
    "no_rope_layer_interval": _SIZE,
    "moe_intermediate_size": _SIZE,
    "num_experts": _SIZE,
    "num_local_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "decoder_sparse_step": _SIZE,
    "sliding_window_pattern": _SIZE,
    "rms_norm_eps": _SHARE,
    "layer_norm_eps": _SHARE,
    "layer_norm_epsilon": _SHARE,
    "rope_theta": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "rotary_emb_base": _POSITIVE,
    "rotary_pct": _SHARE,
}
_NULLABLE: dict[str, _Range] = {
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "n_inner": _SIZE,
    "n_ctx": _SIZE,
    "sliding_window": _SIZE,
    "query_pre_attn_scalar": _SIZE,
    "word_embed_proj_dim": _SIZE,
    "max_window_layers": _COUNT,
    "attn_logit_softcapping": _POSITIVE,
    "final_logit_softcapping": _POSITIVE,
    "partial_rotary_factor": _SHARE,
    "attention_dropout": _RATE,
    "attn_pdrop": _RATE,
    "embd_pdrop": _RATE,
    "resid_pdrop": _RATE,
    "dropout": _RATE,
    "hidden_dropout": _RATE,
    "layerdrop": _RATE,
    "router_jitter_noise": _RATE,
    "router_aux_loss_coef": _WEIGHT,
    "classifier_dropout": _RATE,
    "summary_first_dropout": _RATE,
}
_OF_ROPE: dict[str, _Range] = {  # rope_theta is never null there, all others may be
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _SHARE,
    "factor": _FACTOR,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "attention_factor": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
}
_LISTS_OF_ROPE = "short_factor", "long_factor"  # of positive numbers
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention", "use_parallel_residual"),
    *("enable_bias", "do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm"),
    *("norm_topk_prob", "output_router_logits"),
)


def check_numbers(raw: Mapping[str, Any]) -> None:
    """Raises InputError for the first field of config.json whose value is of another type, or out of its range."""
    for name, value in raw.items():
        if name in _NEVER_NULL:
            _check_number(name, value, _NEVER_NULL[name], nullable=False)
        elif name in _NULLABLE:
            _check_number(name, value, _NULLABLE[name], nullable=True)
        elif name in _FLAGS and not isinstance(value, bool | None):
            raise InputError(f"{name}={files.shown(value)}: expected true or false")
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int for i in ids):
                raise InputError(f"{name}={files.shown(value)}: expected an id, or a list of ids")
        elif name in ("rope_parameters", "rope_scaling") and value is not None:
            if not isinstance(value, dict):
                raise InputError(f"{name}={files.shown(value)}: expected an object")
            _check_rope(name, value)
    if raw.get("tie_word_embeddings", True) is None:
        raise InputError("tie_word_embeddings=None: expected true or false")


def _check_rope(name: str, rope: Mapping[str, Any]) -> None:
    for inner, value in rope.items():
        if inner in _OF_ROPE:
            _check_number(f"{name}.{inner}", value, _OF_ROPE[inner], nullable=inner != "rope_theta")
        elif inner in _LISTS_OF_ROPE:
            if not isinstance(value, list):
                raise InputError(f"{name}.{inner}={files.shown(value)}: expected a list of numbers")
            for n, number in enumerate(value):
                _check_number(f"{name}.{inner}[{n}]", number, _POSITIVE, nullable=False)
        elif inner == "truncate" and not isinstance(value, bool):
            raise InputError(f"{name}.{inner}={files.shown(value)}: expected true or false")
        elif isinstance(value, dict):  # the rope of some of the layers
            _check_rope(f"{name}.{inner}", value)


def _check_number(name: str, value: Any, allowed: _Range, nullable: bool) -> None:
    if value is None and nullable:
        return
    kinds = (int,) if allowed.kind is int else (int, float)
    if type(value) not in kinds or not allowed.low <= value <= allowed.high:
        raise InputError(f"{name}={files.shown(value)}: expected {allowed.expected}{' or null' if nullable else ''}")
