"""RoPE in a config.json: rope_parameters, which `transformers` makes of the older rope_theta and rope_scaling too."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.models import files
from rlhf_jax.models.config import Config
from rlhf_jax.models.fields import Fields, Setting, read_head_dim
from rlhf_jax.models.scaling import LinearScaling, Llama3Scaling, LongScaling, RopeScaling, YarnScaling
from rlhf_jax.types import InputError


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
SCALINGS = {  # by the rope_type
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


def _read_scaling(rope: Fields, max_length: int, kinds: Sequence[str] = tuple(SCALINGS)) -> RopeScaling | None:
    """The scaling that rope_parameters name, of these rope_types."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in ("default", *kinds))
        raise InputError(f"rope_type {files.shown(kind)} is not supported: expected {expected}")
    make, names, implied = SCALINGS[kind]
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
    kind, names = next((kind, row.names) for kind, row in SCALINGS.items() if row.make is type(scaling))
    default = {field.name for field in dataclasses.fields(scaling) if getattr(scaling, field.name) == field.default}
    said = {theirs: getattr(scaling, ours) for ours, theirs in names.items() if ours not in default}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}
    return {"rope_type": kind, "rope_theta": theta} | listed


def rope(*kinds: str, partial: bool = False) -> Setting:
    """RoPE with these scalings, of all layers; `partial` says that a part of each head may rotate."""

    def read(hf: Any) -> Fields:
        rope = hf.rope_parameters
        share = rope.get("partial_rotary_factor") or 1.0
        size = read_head_dim(hf)["head_dim"]
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


TWO_ROPES = Setting(_read_two_ropes, _write_two_ropes)  # of full layers, and of those with a window
