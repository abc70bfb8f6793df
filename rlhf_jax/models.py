"""A model directory in the Hugging Face layout (config.json, *.safetensors, tokenizer), in and out.

Weights stream from disk tensor by tensor into the stacked parameters of `transformer.Transformer`. Only safetensors are
read: nothing is unpickled, and no code that comes with a checkpoint runs.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from rlhf_jax import heads, transformer
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.types import InputError, Params

SUPPORTED = ("gpt2", "llama")  # values of `model_type`


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model or a reward model, ready to be applied."""

    config: transformer.Config
    params: Params
    tokenizer: tokenizers.Tokenizer | None
    apply: Callable  # (params, tokens [B, T], mask [B, T]) -> logits [B, T, V], or score [B] for a reward model


def tokenizer_of(model: Model) -> tokenizers.Tokenizer:
    """The model's tokenizer; raises InputError when its directory has none."""
    if model.tokenizer is None:
        raise InputError(
            "the model directory has no tokenizer.json, and this needs one: put the model's tokenizer there"
        )
    return model.tokenizer


def check_vocabularies(loaded: Mapping[Path, Model]) -> None:
    """Raises InputError unless models that are to read the same tokens have the same vocabulary."""
    (first, model), *others = loaded.items()
    for path, other in others:
        if (a := model.config.vocab_size) != (b := other.config.vocab_size):
            what = f"the vocabularies differ in size ({first} {a}, {path} {b})"
        elif model.tokenizer and other.tokenizer and model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            what = f"the vocabularies of {first} and {path} have the same size and differ"
        else:
            continue
        raise InputError(f"{what}: train the reward model from the policy's own directory")


def load(path: str | Path, dtype: Any = jnp.float32, compute: transformer.Compute = transformer.Compute()) -> Model:
    """A language model from a directory. Parameters have the type `dtype`.

    Raises InputError when the directory, its architecture or a tensor is not what it should be.
    """
    path = Path(path)
    config = dataclasses.replace(_config(path), compute=compute)
    params = _read(path, config, scalar=False, dtype=dtype)
    return Model(config, params, _tokenizer(path, config), transformer.bind(transformer.Transformer(config)))


def load_reward(
    path: str | Path, dtype: Any = jnp.float32, compute: transformer.Compute = transformer.Compute()
) -> Model:
    """A reward model from a directory: a trunk and a score head of one output, read at the last real token."""
    path = Path(path)
    config = dataclasses.replace(_config(path), compute=compute)
    params = _read(path, config, scalar=True, dtype=dtype)
    per_token = transformer.bind(heads.ScalarModel(config))

    def apply(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return heads.at_last(per_token(params, tokens, mask), mask)

    return Model(config, params, _tokenizer(path, config), apply)


def save(model: Model, params: Params, path: str | Path) -> None:
    """Write `params`, with the config and tokenizer of `model`, as a directory that `transformers` loads.

    Parameters of a `heads.ScalarModel` become a sequence classifier with one label. Its bias, which that layout has no
    place for, is kept in a tensor `score.bias` that only `load_reward` reads. The directory appears whole or not at
    all.
    """
    path = Path(path)
    scalar = "trunk" in params
    tensors = dict(_tensors(_entries(model.config, scalar), model.config, params["trunk"] if scalar else params))
    if scalar:
        tensors["score.weight"] = np.asarray(params["kernel"])[None]
        if float(params["bias"]) != 0.0:
            tensors["score.bias"] = np.asarray(params["bias"])[None]
    config = _hf_config(model.config, scalar, model.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        config.save_pretrained(partial)
        safetensors.numpy.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        os.chmod(partial, 0o755)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# How a checkpoint's tensors lie in the parameters ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the parameters, and the tensors of a checkpoint that it is made of."""

    leaf: str  # path in the parameters
    names: tuple[str, ...]  # of the tensors; {} stands for the layer, in a leaf with an axis of layers
    into: Callable[..., np.ndarray] = lambda tensor: tensor  # tensors (of one layer) -> leaf
    out: Callable[[np.ndarray], tuple[np.ndarray, ...]] = lambda leaf: (leaf,)  # its inverse


def _gpt2(c: transformer.Config) -> list[Entry]:
    """GPT-2 keeps matrices as [in, out], and query, key and value side by side."""
    qkv = (3, c.n_heads, c.head_dim)
    layer = "transformer.h.{}."
    entries = [
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
        entries += [Entry(f"blocks/{ours}/{k}", (f"{layer}{theirs}.{t}",)) for k, t in _KERNEL.items()]
    for ours, theirs in {"norm_1": "ln_1", "norm_2": "ln_2"}.items():
        entries += [Entry(f"blocks/{ours}/{k}", (f"{layer}{theirs}.{t}",)) for k, t in _SCALE.items()]
    return entries


_KERNEL = {"kernel": "weight", "bias": "bias"}
_SCALE = {"scale": "weight", "bias": "bias"}


def _llama(c: transformer.Config) -> list[Entry]:
    """Llama keeps matrices as [out, in]. Query head h reads key/value head h // R."""
    shared = c.n_heads // c.n_kv_heads
    attention, mlp = "model.layers.{}.self_attn.", "model.layers.{}.mlp."

    def heads_first(count: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda t: t.T.reshape(c.d_model, c.n_kv_heads, count, c.head_dim)

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.split(x, [shared, shared + 1], axis=2)
        return tuple(part.reshape(c.d_model, -1).T for part in parts)

    return [
        Entry("embedding", ("model.embed_tokens.weight",)),
        Entry("final_norm/scale", ("model.norm.weight",)),
        Entry(
            "blocks/attention/qkv/kernel",
            tuple(f"{attention}{x}_proj.weight" for x in "qkv"),
            lambda q, k, v: np.concatenate([heads_first(shared)(q), heads_first(1)(k), heads_first(1)(v)], axis=2),
            split,
        ),
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
        Entry("blocks/norm_1/scale", ("model.layers.{}.input_layernorm.weight",)),
        Entry("blocks/norm_2/scale", ("model.layers.{}.post_attention_layernorm.weight",)),
    ]


def _entries(config: transformer.Config, scalar: bool) -> list[Entry]:
    """The entries of a language model or, without its unembedding, of a `heads.ScalarModel`'s trunk."""
    family = _gpt2 if _family(config) == "gpt2" else _llama
    untied = [] if config.tie_embeddings or scalar else [Entry("unembedding", ("lm_head.weight",))]
    return family(config) + untied


def _tensors(entries: Sequence[Entry], config: transformer.Config, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that the entries stand for, by name."""
    for entry in entries:
        leaf = np.asarray(_get(params, entry.leaf))
        layered = "{}" in entry.names[0]
        for layer in range(config.n_layers) if layered else (0,):
            for name, tensor in zip(entry.names, entry.out(leaf[layer] if layered else leaf), strict=True):
                yield name.format(layer), np.ascontiguousarray(tensor)


def _get(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


# Reading --------------------------------------------------------------------------------------------------------------


class _Files:
    """The tensors of a directory by name, whether in one file or in shards."""

    def __init__(self, path: Path):
        self._path = path
        self._open: dict[str, Any] = {}
        index = path / "model.safetensors.index.json"
        if index.exists():
            try:
                self._where = dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} cannot be read: it needs an object weight_map of tensor to file") from error
        elif (path / "model.safetensors").exists():
            self._where = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            raise InputError(f"{path} holds no model.safetensors: other weight formats are not read")

    def _file(self, name: str) -> Any:
        try:
            if name not in self._open:
                self._open[name] = safetensors.safe_open(self._path / name, framework="np")
            return self._open[name]
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{self._path / name} cannot be read: {error}") from error

    def get(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise InputError(f"{self._path} has no tensor {name!r}, which its config.json asks for")
        return self._file(self._where[name]).get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self._where


def _read(path: Path, config: transformer.Config, scalar: bool, dtype: Any) -> Params:
    files = _Files(path)
    entries = _entries(config, scalar)
    probe = entries[0].names[0]
    prefix = "" if probe in files else probe.split(".")[0] + "."  # GPT-2's own files lack it
    shapes = transformer.parameter_shapes(config)
    params: dict[str, Any] = {}
    for entry in entries:
        shape = _get(shapes, entry.leaf).shape
        layered = "{}" in entry.names[0]
        leaf = np.empty(shape, dtype)
        for layer in range(config.n_layers) if layered else (0,):
            names = [name.format(layer).removeprefix(prefix) for name in entry.names]
            tensors = [files.get(name) for name in names]
            part = leaf[layer] if layered else leaf
            try:
                value = entry.into(*tensors)
            except ValueError:  # a reshape that cannot be
                value = None
            if value is None or value.shape != part.shape:
                found = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(names, tensors, strict=True))
                raise InputError(
                    f"{path}: {found} does not fit config.json, which asks for {entry.leaf} {list(part.shape)}"
                )
            part[...] = value
        _set(params, entry.leaf, jnp.asarray(leaf))
    if not scalar:
        return params
    if "score.weight" not in files:
        raise InputError(f"{path} has no score head (score.weight): it is not a reward model")
    weight = files.get("score.weight")
    if weight.shape != (1, config.d_model):
        raise InputError(f"{path}: score.weight {list(weight.shape)} should be [1, {config.d_model}]: one label")
    bias = files.get("score.bias")[0] if "score.bias" in files else 0.0
    return {"trunk": params, "kernel": jnp.asarray(weight[0], jnp.float32), "bias": jnp.float32(bias)}


def _set(tree: dict, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _tokenizer(path: Path, config: transformer.Config) -> tokenizers.Tokenizer | None:
    if not (path / "tokenizer.json").exists():
        return None
    tokenizer = tokenizers.load(path)
    try:
        tokenizers.check_vocabulary(tokenizer, config.vocab_size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return tokenizer


# Configs --------------------------------------------------------------------------------------------------------------


def _family(config: transformer.Config) -> str:
    """The `model_type` that expresses a config; raises InputError where none does."""
    shape = (config.position, config.norm, config.mlp, config.bias)
    square = config.n_kv_heads == config.n_heads and config.n_heads * config.head_dim == config.d_model
    if shape == ("learned", "layernorm", "gelu", True) and square and config.tie_embeddings:
        return "gpt2"
    if shape == ("rope", "rmsnorm", "swiglu", False):
        return "llama"
    raise InputError(f"no Hugging Face architecture among {', '.join(SUPPORTED)} expresses {config}")


def _config(path: Path) -> transformer.Config:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model directory: it has no config.json; run the experiment that writes it")
    try:
        raw = json.loads((path / "config.json").read_text())
        if not isinstance(raw, dict):
            raise InputError(f"{path}/config.json holds no object: expected the model's settings by name")
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            raise InputError(f"{path}: model_type {kind!r} is not supported: expected one of {', '.join(SUPPORTED)}")
        hf = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}/config.json cannot be read: {str(error).splitlines()[0]}") from error
    if kind == "gpt2":
        _expect(path, hf, activation_function="gelu_new", scale_attn_weights=True, tie_word_embeddings=True)
        _expect(path, hf, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        _expect(path, hf, n_inner=(None, 4 * hf.n_embd))
        size = {"vocab_size": hf.vocab_size, "max_length": hf.n_positions, "norm_eps": hf.layer_norm_epsilon}
        return transformer.gpt(hf.n_layer, hf.n_embd, hf.n_head, **size)
    _expect(path, hf, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{path}: rope_type {rope['rope_type']!r} is not supported: expected 'default'")
    return transformer.llama(
        hf.num_hidden_layers,
        hf.hidden_size,
        hf.num_attention_heads,
        hf.num_key_value_heads,
        hf.intermediate_size,
        head_dim=hf.head_dim,
        vocab_size=hf.vocab_size,
        max_length=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        tie_embeddings=bool(hf.tie_word_embeddings),
    )


def _expect(path: Path, config: Any, **settings: Any) -> None:
    for name, expected in settings.items():
        found = getattr(config, name)
        if found not in (expected if isinstance(expected, tuple) else (expected,)):
            raise InputError(f"{path}: {name}={found!r} is not supported: expected {expected!r}")


def _hf_config(
    config: transformer.Config, scalar: bool, tokenizer: tokenizers.Tokenizer | None
) -> transformers.PretrainedConfig:
    shared: dict[str, Any] = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    if tokenizer is not None:
        shared |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        shared |= {"bos_token_id": tokenizer.bos_token_id}
    if scalar:
        shared |= {"num_labels": 1}
    if _family(config) == "gpt2":
        return transformers.GPT2Config(
            **shared,
            architectures=["GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"],
            n_positions=config.max_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            layer_norm_epsilon=config.norm_eps,
        )
    return transformers.LlamaConfig(
        **shared,
        architectures=["LlamaForSequenceClassification" if scalar else "LlamaForCausalLM"],
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
