"""A config.json, read and written: by `transformers`, which knows how older ones said the same.

What it knows and this Transformer does not is refused by name. Each number in the file has its range (`ranges`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import files, ranges
from rlhf_jax.models.config import Config
from rlhf_jax.models.families import FAMILIES, SUPPORTED, family
from rlhf_jax.types import InputError


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
        config = dataclasses.replace(FAMILIES[kind].read(read()), family=kind)
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
    return transformers.CONFIG_MAPPING[kind](**{**every, **row.write(config)})
