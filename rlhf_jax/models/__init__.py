"""Networks and model directories: `load`, `load_reward` and `save` are where to begin."""

from rlhf_jax.models.config import PRESETS, Compute, Config, Experts, gpt, llama, preset
from rlhf_jax.models.directory import (
    Model,
    check_length,
    check_vocabularies,
    check_writable,
    load,
    load_average,
    load_config,
    load_reward,
    save,
    stop_ids,
    tokenizer_of,
)
from rlhf_jax.models.experts import balance_weight
from rlhf_jax.models.scaling import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from rlhf_jax.models.transformer import (
    Transformer,
    bind,
    logits_fn,
    logprobs_fn,
    parameter_count,
    parameter_shapes,
    part,
)

__all__ = [
    "PRESETS",
    "Compute",
    "Config",
    "Experts",
    "LinearScaling",
    "Llama3Scaling",
    "LongScaling",
    "Model",
    "Transformer",
    "YarnScaling",
    "balance_weight",
    "bind",
    "check_length",
    "check_vocabularies",
    "check_writable",
    "gpt",
    "llama",
    "load",
    "load_average",
    "load_config",
    "load_reward",
    "logits_fn",
    "logprobs_fn",
    "parameter_count",
    "parameter_shapes",
    "part",
    "preset",
    "save",
    "stop_ids",
    "tokenizer_of",
]
