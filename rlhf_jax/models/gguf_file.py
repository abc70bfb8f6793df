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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.models import families, files, gguf_tokenizer, ranges
from rlhf_jax.models.config import Config
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """An architecture of llama.cpp whose name is also the `model_type` of its config.json."""

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of tensors, where they are not those of _NAMES
    permuted: bool = False  # rows of query and key lie such that RoPE rotates neighbours, not halves
    norm_offset: float = 0.0  # added to the weights of norms
    settings: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}  # those not in the file, from the rest


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of Gemma 2 that llama.cpp has in its code: of the 27B alone, queries are not scaled by their size."""
    layers = config["num_hidden_layers"]
    is_27b = layers == 46
    return {
        "layer_types": [("sliding_attention", "full_attention")[n % 2] for n in range(layers)],
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if is_27b
        else config["head_dim"],
    }


_GEMMA_NAMES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ARCHITECTURES = {
    "llama": _Architecture(permuted=True),
    "qwen2": _Architecture(),
    "qwen3": _Architecture(),
    "gemma2": _Architecture(names=_GEMMA_NAMES, norm_offset=1.0, settings=_gemma2),
}
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
}
_NEEDED = "block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"
_FREQUENCIES = "rope_freqs.weight"  # how much longer each wavelength of RoPE is than it was trained at first


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
        if self.kind not in _ARCHITECTURES:
            expected = f"expected one of {', '.join(_ARCHITECTURES)}"
            raise InputError(f"{path}: architecture {files.shown(self.kind)} is not supported: {expected}")
        if (parts := self.value("split.count", 1)) not in (0, 1):
            raise InputError(f"{path} is one of {parts} parts: join them first, with llama-gguf-split --merge")

    def value(self, name: str, default: Any = None) -> Any:
        """A setting of the file, `default` if it has none of that name."""
        field = self.reader.fields.get(name)
        try:
            return default if field is None else field.contents()
        except Exception as error:  # the library decodes what is in the file without a check
            raise InputError(f"{self.path}: {name} cannot be read: {type(error).__name__}") from error

    def config(self) -> Config:
        """The architecture. Raises InputError where it is none that this Transformer expresses."""
        raw = self._config_json()
        return families.read_config(raw, self.path, lambda: families.hf_settings(raw))

    def _config_json(self) -> dict[str, Any]:
        """The settings as a config.json has them."""
        if absent := [name for name in _NEEDED if self.value(f"{self.kind}.{name}") is None]:
            raise InputError(f"{self.path} lacks the setting {self.kind}.{absent[0]}: convert the model again")
        found = {theirs: self.value(f"{self.kind}.{ours}") for ours, theirs in _SETTINGS.items()}
        raw: dict[str, Any] = {name: _short(value) for name, value in found.items() if value is not None}
        shapes = {tensor.name: tensor.shape for tensor in self.reader.tensors}
        if len(shapes.get("token_embd.weight", ())) != 2:
            raise InputError(f"{self.path} has no matrix token_embd.weight: convert the model again")
        if type(raw["num_hidden_layers"]) is int and raw["num_hidden_layers"] > len(shapes):
            raise InputError(f"{self.path}: block_count={raw['num_hidden_layers']}: it has {len(shapes)} tensors alone")
        raw |= {"model_type": self.kind, "vocab_size": int(shapes["token_embd.weight"][1])}
        raw |= {"tie_word_embeddings": "output.weight" not in shapes}
        for name in "num_attention_heads", "num_key_value_heads", "intermediate_size":
            if isinstance(raw.get(name), list):
                raise InputError(f"{self.path}: {name} differs between layers, which is not supported")
        try:
            ranges.check_numbers(raw)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        raw.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        raw |= _ARCHITECTURES[self.kind].settings(raw)
        for name in "rope.dimension_count", "attention.value_length":
            if (size := self.value(f"{self.kind}.{name}", raw["head_dim"])) != raw["head_dim"]:
                raise InputError(
                    f"{self.path}: {name}={size} is not supported: expected {raw['head_dim']}, as of a head"
                )
        return raw | {"rope_parameters": self._rope(raw["head_dim"])}

    def _rope(self, size: int) -> dict[str, Any]:
        """RoPE's settings. Llama 3's scaling lies in the file as its result, a factor for each wavelength."""
        theta = _short(self.value(f"{self.kind}.rope.freq_base", 10000.0))
        kind = self.value(f"{self.kind}.rope.scaling.type", "none")
        if kind != "none" and self.value(f"{self.kind}.rope.scaling.factor", 1.0) != 1.0:
            raise InputError(f"{self.path}: rope.scaling.type {files.shown(kind)} is not supported: expected none")
        plain = {"rope_type": "default", "rope_theta": theta}
        factors = next((tensor.data for tensor in self.reader.tensors if tensor.name == _FREQUENCIES), None)
        if factors is None or np.all(factors == 1):
            return plain
        factor, low, high, length = float(np.max(factors)), 1.0, 4.0, 8192  # of Llama 3.1, 3.2 and 3.3
        wavelength = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
        smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            what = f"{_FREQUENCIES} scales RoPE in a way that is not supported"
            raise InputError(f"{self.path}: {what}: expected Llama 3's, with a context of {length} at first")
        scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        return plain | {"rope_type": "llama3", "original_max_position_embeddings": length} | scaling

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
        self.named = {_name(tensor.name, file.kind): tensor for tensor in file.reader.tensors}
        self.named.pop(_FREQUENCIES, None)
        self.where = dict.fromkeys(self.named, file.path.name)

    def get(self, name: str, dtype: Any = jnp.float32) -> np.ndarray:
        """The tensor as floats. Raises InputError unless all of it is finite, also in the type `dtype`."""
        tensor, architecture = self.named[name], _ARCHITECTURES[self.file.kind]
        value = _library(self.path).quants.dequantize(tensor.data, tensor.tensor_type)
        if architecture.permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            which = "head_count" if "q_proj" in name else "head_count_kv"
            heads = self.file.value(f"{self.file.kind}.attention.{which}")
            heads = heads or self.file.value(f"{self.file.kind}.attention.head_count")
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        if name.endswith("norm.weight"):
            value = value - architecture.norm_offset
        return self.finite(value, self.path, name, dtype)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless there are these tensors, of these shapes and of known types, and no others."""
        self.check_names(expected)
        for name, shape in expected.items():
            tensor = self.named[name]
            if (found := tuple(int(size) for size in reversed(tensor.shape))) != shape:
                raise InputError(f"{self.path}: {tensor.name} {[*found]} does not fit {self.settings}: {[*shape]}")
            if not _dequantises(_library(self.path), tensor.tensor_type):
                raise InputError(_unknown(self.path, tensor.tensor_type.name, tensor.name))


def _short(value: Any) -> Any:
    """A setting, of which a float32 is the number that it was written as: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _name(name: str, kind: str) -> str:
    """The name that a tensor has in a model directory; its own where it has none there."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    part = match and (_NAMES | {**_ARCHITECTURES[kind].names}).get(match[2])
    if not match or not part:
        return name
    return f"model.layers.{match[1]}.{part}.{match[3]}" if match[1] else f"{part}.{match[3]}"


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
