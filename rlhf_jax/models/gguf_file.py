"""A GGUF file, llama.cpp's format of one file for weights, settings and tokenizer, as a model directory would say it.

The library `gguf` reads the file and dequantises its tensors. An architecture is a row of `_ARCHITECTURES`: what
llama.cpp changed in the tensors when it wrote them, which is undone here. The settings become a config.json, so that
they pass the same checks; the tokenizer becomes one of the library `tokenizers` (`gguf_tokenizer`). Quantised weights
are dequantised once, when they are loaded: what is trained, and what `save` writes, are plain floats.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.models import config_json, files, gguf_tokenizer, ranges, rope_fields
from rlhf_jax.models.config import Config
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How llama.cpp writes the models of a family: what it changed in them, and what it has in its code instead."""

    name: str  # in the file
    family: str  # the `model_type` of its config.json
    needs: tuple[str, ...] = ()  # settings that such a file has, which tell families of one name apart
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of tensors, where they are not those of _NAMES
    permuted: bool = False  # rows of query and key lie such that RoPE rotates neighbours, not halves
    norm_offset: float = 0.0  # added to the weights of norms
    period: int | None = None  # of so many layers the last has no window, where the file does not say which
    two_ropes: bool = False  # layers with a window have a RoPE of their own,
    window_theta: float | None = None  # with this theta where the file does not say it; None is that of the others
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}  # others that are not in the file


def _query_size(layers_of_27b: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Gemma's scale of attention scores: that of a head, but in the largest model."""

    def settings(config: Mapping[str, Any]) -> dict[str, Any]:
        size, rest = divmod(config["hidden_size"], config["num_attention_heads"])
        large = config["num_hidden_layers"] == layers_of_27b and not rest
        return {"query_pre_attn_scalar": size if large else config["head_dim"]}

    return settings


def _smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layers without positions, every fourth."""
    return {"no_rope_layers": [int((n + 1) % 4 != 0) for n in range(config["num_hidden_layers"])]}


_EXPERTS = "expert_count", "expert_used_count"
_POST_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_NAMES = {  # * stands for the expert: the file has all of a layer in one tensor
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_QWEN_MOE_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_ARCHITECTURES = (
    _Architecture("llama", "mixtral", needs=_EXPERTS, names=_MIXTRAL_NAMES, permuted=True),
    _Architecture("llama", "mistral", needs=("attention.sliding_window",), permuted=True),
    _Architecture("llama", "llama", permuted=True),
    _Architecture("qwen2", "qwen2"),
    _Architecture("qwen3", "qwen3"),
    _Architecture(
        "qwen3moe",
        "qwen3_moe",
        needs=(*_EXPERTS, "expert_feed_forward_length"),
        names=_QWEN_MOE_NAMES,
        settings=lambda config: {"norm_topk_prob": True},
    ),
    _Architecture("gemma2", "gemma2", names=_POST_NORMS, norm_offset=1.0, period=2, settings=_query_size(46)),
    _Architecture(
        "gemma3",
        "gemma3_text",
        names=_POST_NORMS,
        norm_offset=1.0,
        period=6,
        two_ropes=True,
        window_theta=10000.0,
        settings=_query_size(62),
    ),
    _Architecture("olmo2", "olmo3", needs=("attention.sliding_window",), names=_POST_NORMS, period=4, two_ropes=True),
    _Architecture("olmo2", "olmo2", names=_POST_NORMS),
    _Architecture("smollm3", "smollm3", permuted=True, settings=_smollm3),
    _Architecture("phi3", "phi3", names=_PHI3_NAMES),
)
SUPPORTED = tuple(dict.fromkeys(row.name for row in _ARCHITECTURES))
_NAMES = {  # of tensors of the whole model, and of a layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SETTINGS = {  # of config.json, by their names in the file behind that of the architecture
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_ZERO_IS_NONE = "attention.sliding_window", *_EXPERTS
_NEEDED = "block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"
_FREQUENCIES = "rope_freqs.weight"  # how much longer each wavelength of RoPE is than it was trained at first
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # and so for longrope
_FACTORS = _FREQUENCIES, _SHORT, _LONG
_ORIGINAL = {"original_context_length": "original_max_position_embeddings"}
_SCALINGS = {  # by the rope_type: its settings in rope_parameters, by their names in the file behind rope.scaling
    "linear": {"factor": "factor"},
    "yarn": {
        **_ORIGINAL,
        "factor": "factor",
        "attn_factor": "attention_factor",
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
    "longrope": {**_ORIGINAL, "attn_factor": "attention_factor"},
}


def is_one(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


class File:
    """A GGUF file, opened: its settings and its tokenizer are read when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        library = _library(path)
        if not path.is_file():
            raise InputError(f"{path} cannot be read: there is no such file")
        self.reader = _read(library, path)
        self.kind = self.value("general.architecture")
        rows = [row for row in _ARCHITECTURES if row.name == self.kind]
        if not rows:
            expected = f"expected one of {', '.join(SUPPORTED)}"
            raise InputError(f"{path}: architecture {files.shown(self.kind)} is not supported: {expected}")
        has_all = lambda row: all(self.setting(name) for name in row.needs)
        self.architecture = next((row for row in rows if has_all(row)), rows[-1])
        if (parts := self.value("split.count", 1)) not in (0, 1):
            raise InputError(f"{path} is one of {parts} parts: join them first, with llama-gguf-split --merge")

    def value(self, name: str, default: Any = None) -> Any:
        """A setting of the file, `default` if it has none of that name."""
        field = self.reader.fields.get(name)
        try:
            return default if field is None else field.contents()
        except Exception as error:  # the library decodes what is in the file without a check
            raise InputError(f"{self.path}: {name} cannot be read: {type(error).__name__}") from error

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the model, by its name behind that of the architecture."""
        return self.value(f"{self.kind}.{name}", default)

    def config(self) -> Config:
        """The architecture. Raises InputError where it is none that this Transformer expresses."""
        raw = self._config_json()
        return config_json.read_config(raw, self.path, lambda: config_json.hf_settings(raw))

    def _config_json(self) -> dict[str, Any]:
        """The settings as a config.json has them."""
        row = self.architecture
        if absent := [name for name in (*_NEEDED, *row.needs) if self.setting(name) is None]:
            raise InputError(f"{self.path} lacks the setting {self.kind}.{absent[0]}: convert the model again")
        found = {ours: _short(self.setting(ours)) for ours in _SETTINGS}
        none = [ours for ours, value in found.items() if value is None or (ours in _ZERO_IS_NONE and value == 0)]
        raw: dict[str, Any] = {theirs: found[ours] for ours, theirs in _SETTINGS.items() if ours not in none}
        shapes = {tensor.name: tensor.shape for tensor in self.reader.tensors}
        if len(shapes.get("token_embd.weight", ())) != 2:
            raise InputError(f"{self.path} has no matrix token_embd.weight: convert the model again")
        if type(raw["num_hidden_layers"]) is int and raw["num_hidden_layers"] > len(shapes):
            raise InputError(f"{self.path}: block_count={raw['num_hidden_layers']}: it has {len(shapes)} tensors alone")
        raw |= {"model_type": row.family, "vocab_size": int(shapes["token_embd.weight"][1])}
        raw |= {"tie_word_embeddings": "output.weight" not in shapes}
        raw |= {"attention_bias": "blk.0.attn_output.bias" in shapes, "mlp_bias": "blk.0.ffn_down.bias" in shapes}
        for name in "num_attention_heads", "num_key_value_heads", "intermediate_size":
            if isinstance(raw.get(name), list):
                raise InputError(f"{self.path}: {name} differs between layers, which is not supported")
        try:
            ranges.check_numbers(raw)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        raw.setdefault("sliding_window", None)
        raw |= row.settings(raw) | self._layer_types(raw)
        if (size := self.setting("attention.value_length", raw["head_dim"])) != raw["head_dim"]:
            what = f"attention.value_length={size} is not supported"
            raise InputError(f"{self.path}: {what}: expected {raw['head_dim']}, as of a head")
        return raw | {"rope_parameters": self._ropes(raw["head_dim"])}

    def _layer_types(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Which layers have the window. The file lists them, or says that every n-th has none."""
        layers = raw["num_hidden_layers"]
        pattern = self.setting("attention.sliding_window_pattern", self.architecture.period)
        if pattern is None:
            return {}
        if raw["sliding_window"] is None:
            pattern = [False] * layers
        elif type(pattern) is int and pattern >= 0:
            pattern = [pattern == 0 or (n + 1) % pattern != 0 for n in range(layers)]
        if not isinstance(pattern, list) or len(pattern) != layers:
            expected = f"expected a number of layers, or true or false for each of {layers}"
            raise InputError(f"{self.path}: attention.sliding_window_pattern={files.shown(pattern)}: {expected}")
        return {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in pattern]}

    def _ropes(self, size: int) -> dict[str, Any]:
        """RoPE's settings, or those of full layers and of layers with a window."""
        full, row = self._rope(size), self.architecture
        theta = row.window_theta or full["rope_theta"]
        theta = _short(self.setting("rope.freq_base_swa", theta))
        if row.two_ropes:
            return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
        if theta != full["rope_theta"]:
            what = f"rope.freq_base_swa={theta} is not supported"
            raise InputError(f"{self.path}: {what}: expected {full['rope_theta']}, as of the other layers")
        return full

    def _rope(self, size: int) -> dict[str, Any]:
        """RoPE's settings, for heads of this size."""
        rope = {"rope_type": "default", "rope_theta": _short(self.setting("rope.freq_base", 10000.0))}
        if (rotary := self.setting("rope.dimension_count", size)) != size:
            if self.architecture.family != "phi3" or type(rotary) is not int or not 0 < rotary < size:
                what = f"rope.dimension_count={rotary} is not supported"
                raise InputError(f"{self.path}: {what}: expected {size}, as of a head")
            rope["partial_rotary_factor"] = rope_fields.share(rotary, size)
        return rope | self._scaling(rope["rope_theta"], size)

    def _scaling(self, theta: float, size: int) -> dict[str, Any]:
        """How RoPE is scaled: by the settings, or by factors for each wavelength, which lie among the tensors."""
        named = self.setting("rope.scaling.type", "none")
        factors = {tensor.name: tensor.data for tensor in self.reader.tensors if tensor.name in _FACTORS}
        stretched = _FREQUENCIES in factors and bool(np.any(factors[_FREQUENCIES] != 1))
        kinds = {"llama3"} if stretched else set()
        if _SHORT in factors or _LONG in factors:
            kinds |= {"longrope"}
        if named not in ("none", "linear", "yarn") or self.setting("rope.scaling.factor", 1.0) != 1.0:
            kinds |= {named}
        if not kinds:
            return {}
        kind, *others = sorted(kinds)
        if others or kind not in ("llama3", *_SCALINGS):
            what = f"rope.scaling.type {files.shown(named)}" + (f" beside {_FREQUENCIES}" if stretched else "")
            raise InputError(f"{self.path}: {what} is not supported: expected none, {', '.join(_SCALINGS)}")
        if kind == "llama3":
            return self._llama3(factors[_FREQUENCIES], theta, size)
        found = {ours: _short(self.setting(f"rope.scaling.{ours}")) for ours in _SCALINGS[kind]}
        said = {_SCALINGS[kind][ours]: value for ours, value in found.items() if value is not None}
        if kind == "longrope":
            if absent := [name for name in (_SHORT, _LONG) if name not in factors]:
                raise InputError(f"{self.path} has no tensor {absent[0]!r}, which longrope needs")
            listed = {"short_factor": factors[_SHORT], "long_factor": factors[_LONG]}
            said |= {name: [_short(float(factor)) for factor in value] for name, value in listed.items()}
        return {"rope_type": kind} | said

    def _llama3(self, factors: np.ndarray, theta: float, size: int) -> dict[str, Any]:
        """Llama 3's scaling, which lies in the file as its result."""
        factor, low, high, length = float(np.max(factors)), 1.0, 4.0, 8192  # of Llama 3.1, 3.2 and 3.3
        wavelength = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
        smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            what = f"{_FREQUENCIES} scales RoPE in a way that is not supported"
            raise InputError(f"{self.path}: {what}: expected Llama 3's, with a context of {length} at first")
        scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        return {"rope_type": "llama3", "original_max_position_embeddings": length} | scaling

    def tokenizer(self, config: Config) -> tokenizers.Tokenizer | None:
        """The tokenizer in the file, None if there is none."""
        if self.value("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return None
        try:
            tokenizer = gguf_tokenizer.build(self.value)
            tokenizers.check_vocabulary(tokenizer, config.vocab_size)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        except Exception as error:  # the libraries raise anything on settings of other types
            raise InputError(f"{self.path} holds no usable tokenizer: {_line(error)}") from error
        return tokenizers.prepared(tokenizer, self.path)

    def generation(self, config: Config, tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any] | None:
        """The EOS that the file names, where they are others than the tokenizer's own."""
        if tokenizer is None:
            return None
        named = [self.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        ends = [i for i in dict.fromkeys(named) if i is not None]
        if set(ends) <= {tokenizer.eos_token_id}:
            return None
        try:
            tokenizers.stop_ids(tokenizer, {"eos_token_id": ends})
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        return {"eos_token_id": ends}

    def tensors(self) -> files.Tensors:
        """The tensors, by the names that they have in a model directory."""
        return Tensors(self)


class Tensors(files.Tensors):
    """The tensors of a GGUF file under the names of a model directory, dequantised as they are read."""

    settings = "metadata"

    def __init__(self, file: File):
        self.path, self.file = file.path, file
        self.named = {
            name: (tensor, expert)
            for tensor in file.reader.tensors
            for name, expert in _names(tensor, file.architecture)
            if name not in _FACTORS
        }
        self.where = dict.fromkeys(self.named, file.path.name)

    def get(self, name: str, dtype: Any = jnp.float32) -> np.ndarray:
        """The tensor as floats. Raises InputError unless all of it is finite, also in the type `dtype`."""
        (tensor, expert), architecture = self.named[name], self.file.architecture
        data = tensor.data if expert is None else tensor.data[expert]
        value = _library(self.path).quants.dequantize(data, tensor.tensor_type)
        if architecture.permuted and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            which = "head_count" if "q_proj" in name else "head_count_kv"
            heads = self.file.setting(f"attention.{which}") or self.file.setting("attention.head_count")
            value = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if name.endswith("norm.weight"):
            value = value - architecture.norm_offset
        return self.finite(value, self.path, name, dtype)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless there are these tensors, of these shapes and of known types, and no others."""
        self.check_names(expected)
        for name, shape in expected.items():
            tensor, expert = self.named[name]
            found = tuple(int(size) for size in reversed(tensor.shape))[0 if expert is None else 1 :]
            if found != shape:
                raise InputError(f"{self.path}: {tensor.name} {[*found]} does not fit {self.settings}: {[*shape]}")
            if not _dequantises(_library(self.path), tensor.tensor_type):
                raise InputError(_unknown(self.path, tensor.tensor_type.name, tensor.name))


def _short(value: Any) -> Any:
    """A setting, of which a float32 is the number that it was written as: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _names(tensor: Any, architecture: _Architecture) -> Iterator[tuple[str, int | None]]:
    """The names of a tensor in a model directory, each with its expert: its own where it has none there."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
    part = match and (_NAMES | {**architecture.names}).get(match[2])
    experts = int(tensor.shape[-1]) if part and "*" in part and len(tensor.shape) == 3 and tensor.n_elements else None
    if not match or not part or (experts is None and "*" in part):
        yield tensor.name, None
        return
    name = f"model.layers.{match[1]}.{part}.{match[3]}" if match[1] else f"{part}.{match[3]}"
    if experts is None:
        yield name, None
    else:
        yield from ((name.replace("*", str(n)), n) for n in range(experts))


def _library(path: Path) -> ModuleType:
    try:
        import gguf  # here, because most models are directories
        import gguf.quants
    except ImportError as error:
        raise InputError(
            f"{path} is a GGUF file, which the library gguf reads: pip install 'rlhf_jax[gguf]'"
        ) from error
    return gguf


def _read(library: Any, path: Path) -> Any:
    """The library's reader of a file. Raises InputError for what is no GGUF, cut short, or of an unknown type."""

    class Reader(library.GGUFReader):
        """Ends at the end of the file: the library goes on with nothing, as often as a broken length says."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            found = super()._get(offset, dtype, count, override_order)
            if found.size < count:
                raise ValueError("the file ends in the middle of it")
            return found

    try:
        return Reader(path)
    except Exception as error:  # the library takes what it finds for sizes and types, and trips over them
        if match := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise InputError(_unknown(path, f"type {match[1]}", "a tensor")) from error
        raise InputError(f"{path} cannot be read as GGUF: {_line(error)}; is it cut short? get it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unknown(path: Path, found: str, name: str) -> str:
    library = _library(path)
    known = [kind.name for kind in library.GGMLQuantizationType if _dequantises(library, kind)]
    return f"{path}: {name} has the quantisation {found}, which is not supported: expected {', '.join(known)}"


@functools.cache
def _dequantises(library: ModuleType, kind: Any) -> bool:
    """Whether the library dequantises a type, which it tells of by trying."""
    if kind.name in ("F32", "F16"):
        return True
    _, width = library.GGML_QUANT_SIZES[kind]
    try:
        library.quants.dequantize(np.zeros((1, width), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
