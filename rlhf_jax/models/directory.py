"""A model directory in the Hugging Face layout (config.json, *.safetensors, tokenizer), in and out; a GGUF file, in.

Weights stream from disk tensor by tensor into the stacked parameters of `transformer.Transformer`, straight to the
devices that `Placement` names: the host never holds a second copy of the model. No code that comes with a checkpoint
runs. All that can be checked before the weights are read is, and each tensor as it is read.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlhf_jax import hub
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import hosts
from rlhf_jax.devices.compute import Compute
from rlhf_jax.models import config_json, entries, files, gguf_file, heads, transformer
from rlhf_jax.models.config import Config
from rlhf_jax.models.scaling import LongScaling
from rlhf_jax.types import InputError, Params

SHARD = 5 * 2**30  # bytes of a file of weights at most, unless one tensor is larger

# The sharding of a parameter, from its path ("blocks/mlp/up/kernel") and shape; None is the default device. Layers, the
# first axis of a block's parameters, must not be split.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
_Value = tuple[str, int | None, np.ndarray]  # the path of a leaf, a layer of it where it has any, and what is there


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model or a reward model, ready to be applied."""

    config: Config
    params: Params
    tokenizer: tokenizers.Tokenizer | None
    apply: Callable  # (params, tokens [B, T], mask [B, T]) -> logits [B, T, V], or score [B] for a reward model
    # The settings of generation_config.json, which `save` passes on. Where that file is absent, they are the EOS that
    # config.json names, if the tokenizer names another one.
    generation: dict[str, Any] | None = None


def tokenizer_of(model: Model, control_tokens: tokenizers.ControlTokens | None = None) -> tokenizers.Tokenizer:
    """The model's tokenizer; raises InputError when its directory has none.

    `control_tokens` says how those that rows spell are read, see `tokenizer.read_control_tokens`; None leaves it.
    """
    if model.tokenizer is None:
        raise InputError(
            "the model directory has no tokenizer.json, and this needs one: put the model's tokenizer there"
        )
    if control_tokens is not None:
        tokenizers.read_control_tokens(model.tokenizer, control_tokens)
    return model.tokenizer


def stop_ids(model: Model) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's EOS first, then those that the model's generation settings add.

    Raises InputError when the model's directory has no tokenizer.
    """
    return tokenizers.stop_ids(tokenizer_of(model), model.generation)


def check_vocabularies(loaded: Mapping[Path, Model]) -> None:
    """Raises InputError unless models that are to read the same tokens have the same vocabulary.

    Warns where another model's EOS, BOS, padding or chat template is not that of the first one: it then reads texts
    that are not laid out as those that it was trained on.
    """
    (first, model), *others = loaded.items()
    for path, other in others:
        if (a := model.config.vocab_size) != (b := other.config.vocab_size):
            what = f"the vocabularies differ in size ({first} {a}, {path} {b})"
        elif model.tokenizer and other.tokenizer and model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            what = f"the vocabularies of {first} and {path} have the same size and differ"
        else:
            differing = _differences(model.tokenizer, other.tokenizer)
            if differing and hosts.first():
                advice = f"{path} reads what {first} writes, which may not be what it was trained to read"
                print(f"warning: {first} and {path} differ in {', '.join(differing)}: {advice}", file=sys.stderr)
            continue
        raise InputError(f"{what}: train the reward model from the policy's own directory")


def _differences(one: tokenizers.Tokenizer | None, other: tokenizers.Tokenizer | None) -> list[str]:
    """Each convention by which two tokenizers of one vocabulary lay a text out otherwise, in words."""
    if one is None or other is None:
        return []
    found = []
    for name in ("eos", "bos", "pad"):
        a, b = (getattr(tokenizer, f"{name}_token_id") for tokenizer in (one, other))
        if a != b:
            a, b = (files.shown(getattr(tokenizer, f"{name}_token")) for tokenizer in (one, other))
            found.append(f"{name.upper()} ({a}, {b})")
    if _normalized(one.chat_template) != _normalized(other.chat_template):
        found.append("chat template")
    return found


def _normalized(template: Any) -> Any:
    """A chat template, or several by name, without the whitespace at its end."""
    if isinstance(template, dict):
        return {name: _normalized(text) for name, text in template.items()}
    return template.rstrip() if isinstance(template, str) else template


def check_length(config: Config, length: int, name: str = "length") -> None:
    """Raises InputError for rows longer than the table of positions; warns where RoPE was trained for less.

    Warns too where RoPE has other factors for rows so long. `name` is the setting that the message names.
    """
    scaling = config.rope_scaling
    if isinstance(scaling, LongScaling) and length > scaling.original_length and hosts.first():
        what = f"{name}={length} is more than {scaling.original_length} tokens, for which longrope has other factors"
        print(f"warning: {what}: shorter rows are read as by another model", file=sys.stderr)
    if length > config.max_length:
        what = f"{name}={length} is more than the model's context of {config.max_length} tokens"
        if config.position == "learned":
            raise InputError(f"{what}, beyond which it has no positions")
        if hosts.first():
            print(f"warning: {what}, the most that it was trained for", file=sys.stderr)


def load(
    path: str | Path,
    dtype: Any = jnp.float32,
    compute: Compute = Compute(),
    place: Placement = lambda path, shape: None,
) -> Model:
    """A language model. Parameters have the type `dtype`, whatever the type of the file.

    `path` is a directory, a GGUF file or a name of the Hub (`hub`). Raises InputError when it, its architecture or a
    tensor cannot be used.
    """
    source = _open(Path(path))
    config, tokenizer, generation = _settings(source, compute)
    params = _read(source.tensors(), config, scalar=False, dtype=dtype, place=place)
    return Model(config, params, tokenizer, transformer.bind(transformer.Transformer(config)), generation)


def load_reward(
    path: str | Path,
    dtype: Any = jnp.float32,
    compute: Compute = Compute(),
    place: Placement = lambda path, shape: None,
) -> Model:
    """A reward model, from what `load` takes: a trunk and a score head of one output, read at the last real token."""
    source = _open(Path(path))
    config, tokenizer, generation = _settings(source, compute)
    params = _read(source.tensors(), config, scalar=True, dtype=dtype, place=place)
    return Model(config, params, tokenizer, heads.score_fn(config), generation)


def load_average(
    paths: Sequence[str | Path],
    dtype: Any = jnp.float32,
    compute: Compute = Compute(),
    place: Placement = lambda path, shape: None,
) -> Model:
    """The model whose parameters are the means of those of several, all language models or all reward models.

    Models that were trained from one and the same have weights that may be averaged (WARM, arXiv:2401.12187). They are
    read side by side, a tensor at a time, so that one model is in memory. Raises InputError where they differ in
    architecture or tokenizer, or where the weights of one have nothing to do with the first one's.
    """
    read = [_open(Path(path)) for path in paths]
    settings = [_settings(source, compute) for source in read]
    tensors = [source.tensors() for source in read]
    scalar = ["score.weight" in each.where for each in tensors]
    for path, kind, (config, tokenizer, _) in zip(paths, scalar, settings, strict=True):
        if kind != scalar[0]:
            one, other = (path, paths[0]) if kind else (paths[0], path)
            raise InputError(f"{one} is a reward model and {other} is a language model: average models of one kind")
        differing = _unlike(settings[0][0], config) or _unlike_tokenizers(settings[0][1], tokenizer)
        if differing:
            raise InputError(f"{paths[0]} and {path} differ in {differing}: average models of one init")
    config, tokenizer, generation = settings[0]
    values = [_values(each, config, scalar[0], dtype) for each in tensors]
    params = _placed(_means(paths, values), config, dtype, place)
    apply = heads.score_fn(config) if scalar[0] else transformer.bind(transformer.Transformer(config))
    return Model(config, params, tokenizer, apply, generation)


_RELATED = 0.5  # cosine of two models' weights at least, if one init is to be theirs: else it is about 0


def _means(paths: Sequence[str | Path], values: Sequence[Iterator[_Value]]) -> Iterator[_Value]:
    """The mean of each part over several models; raises InputError at the end for one that is not related."""
    # Of each model: the products of the first model's kernels with its own, of its own with themselves, and of the
    # first model's with themselves.
    products = np.zeros((len(values), 3))
    for leaf, layer, first in values[0]:
        total = first.astype(np.float64)
        for n, others in enumerate(values[1:], 1):
            _, _, value = next(others)
            if value.ndim > 1:  # gains and biases of norms are alike in all models
                a, b = (x.astype(np.float32, copy=False).reshape(-1) for x in (first, value))
                products[n] += np.dot(a, b), np.dot(b, b), np.dot(a, a)
            total += value
        yield leaf, layer, (total / len(values)).astype(first.dtype)
    for path, (both, this, that) in zip(paths[1:], products[1:], strict=True):
        cosine = both / max((this * that) ** 0.5, 1e-30)
        if cosine < _RELATED:
            what = f"the cosine between its weights and those of {paths[0]} is {cosine:.2f}"
            raise InputError(f"{path} was trained from another init: {what}; average models of one")


def _unlike(config: Config, other: Config) -> str:
    """The settings in which two architectures differ, as a message has them."""
    names = [field.name for field in dataclasses.fields(config)]
    found = [(name, getattr(config, name), getattr(other, name)) for name in names]
    return ", ".join(f"{name} ({files.shown(a)}, {files.shown(b)})" for name, a, b in found if a != b)


def _unlike_tokenizers(one: tokenizers.Tokenizer | None, other: tokenizers.Tokenizer | None) -> str:
    """The respects in which two tokenizers differ, as a message has them."""
    if one is not None and other is not None and one.get_vocab() != other.get_vocab():
        return "vocabulary"
    return ", ".join(_differences(one, other))


def load_config(path: str | Path) -> Config:
    """The architecture of a model. Raises InputError where it is none that this Transformer expresses."""
    return _open(Path(path)).config()


@dataclasses.dataclass(frozen=True)
class _Directory:
    """A model directory."""

    path: Path

    def config(self) -> Config:
        return config_json.load_config(self.path)

    def tokenizer(self, config: Config) -> tokenizers.Tokenizer | None:
        return _load_tokenizer(self.path, config)

    def generation(self, config: Config, tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any] | None:
        return _load_generation(self.path, config, tokenizer)

    def tensors(self) -> files.Tensors:
        return files.Tensors(self.path)


_Source = _Directory | gguf_file.File  # what a model is read from


def _open(path: Path) -> _Source:
    """The source of a model, a GGUF file or a directory; fetched first if the path is a name of the Hub."""
    path = hub.local(path)
    return gguf_file.File(path) if gguf_file.is_one(path) else _Directory(path)


def _settings(source: _Source, compute: Compute) -> tuple[Config, tokenizers.Tokenizer | None, dict[str, Any] | None]:
    """All that a model has beside its weights."""
    config = dataclasses.replace(source.config(), compute=compute)
    tokenizer = source.tokenizer(config)
    return config, tokenizer, source.generation(config, tokenizer)


def check_writable(path: str | Path) -> None:
    """Raises InputError where `save` could not write a model directory, before there is anything to write.

    Nothing is written, and no folder made.
    """
    target = _destination(Path(path))
    folder = next(folder for folder in target.parents if folder.exists())
    with _writable(Path(path)), contextlib.suppress(FileNotFoundError):
        os.lstat(target.with_name(f".{target.name}-12345678-former"))  # the longest name that `save` gives a folder
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"a model cannot be written to {path}: {folder} is read-only; make it writable, or name another"
        )


def save(model: Model, params: Params, path: str | Path) -> None:
    """Write `params`, with what else `model` came with, as a directory that `transformers` loads.

    Parameters of a `heads.ScalarModel` become a sequence classifier with one label. Its bias, which that layout has no
    place for, is kept in a tensor `score.bias` that only `load_reward` reads. The directory appears whole or not at
    all; where `path` is a link, it appears where that leads. The first process writes it, and the others wait until it
    is there. Raises InputError for a path where none can be written, see `check_writable`.
    """
    if any(map(hosts.spans, jax.tree.leaves(params))):
        if hosts.first():
            _save(model, params, Path(path))
        else:
            _hand_over(model.config, params)
        hosts.meet("model")
    else:
        with hosts.first_before_others():
            if hosts.first():
                _save(model, params, Path(path))


def _save(model: Model, params: Params, path: Path) -> None:
    trunk = params.get("trunk", params)
    config = config_json.hf_config(model.config, "trunk" in params, str(trunk["embedding"].dtype), model.tokenizer)
    target = _destination(path)
    with _writable(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(".*"):  # by a save that was killed
            if re.fullmatch(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}(-former)?", left.name):
                _remove(left)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            config.save_pretrained(partial)
            _write(partial, model.config, params)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(partial)
            if model.generation is not None and "trunk" not in params:
                settings = tokenizers.stopping(model.generation, model.tokenizer)
                text = json.dumps(settings, indent=2) + "\n"
                (partial / "generation_config.json").write_text(text, encoding="utf-8")
            os.chmod(partial, 0o755)
            _replace(target, partial)
        except BaseException:
            _remove(partial)
            raise


def _destination(path: Path) -> Path:
    """The directory that a model at `path` is written to, which is another where `path` is a link.

    Raises InputError where something is in the way that is no model.
    """
    with _writable(path):
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise InputError(f"a model cannot be written to {path}: it is a link that leads to itself; remove it")
        if target in Path(os.path.realpath(path.parent), path.name).parents:
            raise InputError(f"a model cannot be written to {path}: it is a link to {target}, in which it lies itself")
        for folder in (target, *target.parents):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"a model cannot be written to {path}: {folder} is a file; move it, or name another")
        if target.is_dir():
            if os.path.ismount(target):
                raise InputError(f"a model cannot be written to {path}: {target} is a mount; name a folder below it")
            if path.is_symlink() and not (target / "config.json").exists() and any(target.iterdir()):
                what = f"it leads to {target}, which holds other things than a model"
                raise InputError(f"a model cannot be written to {path}: {what}; name a folder of its own")
        return target


_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV),
)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Raise InputError for an error in writing whose cause is the path; others, such as a full disk, pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise InputError(f"a model cannot be written to {path}: {error.strerror}") from error


def _replace(target: Path, partial: Path) -> None:
    """Move a whole directory to `target`; what was there is deleted after, and comes back if the move fails."""
    former = partial.with_name(f"{partial.name}-former")
    if not target.exists():
        partial.rename(target)
        return
    target.rename(former)  # at once, where deleting it could be stopped half way
    try:
        partial.rename(target)
    except BaseException:
        former.rename(target)
        raise
    _remove(former)


def _remove(left: Path) -> None:
    """Delete a folder or a link, with write access where that is what is missing; warns if it has to stay."""
    if left.is_symlink() or not left.is_dir():
        with contextlib.suppress(OSError):
            left.unlink()
        return
    shutil.rmtree(left, ignore_errors=True)
    if left.is_dir():
        for folder, *_ in os.walk(left):
            with contextlib.suppress(OSError):
                os.chmod(folder, 0o700)
        shutil.rmtree(left, ignore_errors=True)
    if left.is_dir():
        print(f"warning: {left} cannot be deleted: it is a former or partial copy; delete it", file=sys.stderr)


def _layout(config: Config, scalar: bool) -> Iterator[tuple[entries.Entry, int | None, dict[str, tuple[int, ...]]]]:
    """The parts that parameters consist of, one layer at a time: entry, layer, and the tensors' shapes by name.

    The layer is None where a leaf has none.
    """
    shapes = transformer.parameter_shapes(config)
    for entry in entries.entries(config, scalar):
        leaf, layered = _get(shapes, entry.leaf), "{}" in entry.names[0]
        part = jax.ShapeDtypeStruct(leaf.shape[1:] if layered else leaf.shape, leaf.dtype)
        tensors = [tensor.shape for tensor in jax.eval_shape(entry.out, part)]
        for layer in range(config.n_layers) if layered else (None,):
            yield entry, layer, dict(zip((name.format(layer) for name in entry.names), tensors, strict=True))


def _get(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


# Writing --------------------------------------------------------------------------------------------------------------


def _write(directory: Path, config: Config, params: Params) -> None:
    """The weights, in files of at most SHARD bytes, one in memory at a time."""
    trunk = params.get("trunk", params)
    width = trunk["embedding"].dtype.itemsize
    parts = [
        (width * sum(map(math.prod, shapes.values())), part) for *part, shapes in _layout(config, "trunk" in params)
    ]
    shards: list[list] = [[]]
    filled = 0
    for size, part in parts:
        if shards[-1] and filled + size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    where: dict[str, str] = {}
    for n, shard in enumerate(shards, start=1):
        tensors = dict(tensor for entry, layer in shard for tensor in _tensors(entry, layer, trunk))
        if n == 1 and "trunk" in params:
            tensors["score.weight"] = np.asarray(params["kernel"])[None]
            if float(params["bias"]) != 0.0:
                tensors["score.bias"] = np.asarray(params["bias"])[None]
        name = f"model-{n:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else files.SINGLE
        safetensors.numpy.save_file(tensors, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _hand_over(config: Config, params: Params) -> None:
    """Pass this process's parts of the parameters on to the first one, which writes them."""
    trunk = params.get("trunk", params)
    for entry, layer, _ in _layout(config, "trunk" in params):
        for _ in _tensors(entry, layer, trunk):
            pass


def _tensors(entry: entries.Entry, layer: int | None, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one part of the parameters, by name."""
    leaf = _get(params, entry.leaf)
    for name, tensor in zip(entry.names, entry.out(hosts.to_host(leaf if layer is None else leaf[layer])), strict=True):
        yield name.format(layer), np.ascontiguousarray(tensor)


# Reading --------------------------------------------------------------------------------------------------------------


# Masks and frequencies in older checkpoints, which are no weights.
_BUFFERS = re.compile(r"attn\.(masked_)?bias|.*\.(attn|attention)\.(masked_)?bias|.*rotary_emb\.inv_freq")


def _read(tensors: files.Tensors, config: Config, scalar: bool, dtype: Any, place: Placement) -> Params:
    return _placed(_values(tensors, config, scalar, dtype), config, dtype, place)


def _values(tensors: files.Tensors, config: Config, scalar: bool, dtype: Any) -> Iterator[_Value]:
    """The parts of the parameters, one in memory at a time, in an order that only `config` and `scalar` decide."""
    tensors.where = {name: file for name, file in tensors.where.items() if not _BUFFERS.fullmatch(name)}
    parts, prefix = [], _prefix(tensors, config, scalar)
    expected = _head(tensors, config, scalar)
    for entry, layer, shapes in _layout(config, scalar):
        found = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
        for name in found:
            tensors.need(name)  # at once: a config may ask for a billion layers
        expected |= found
        parts.append((entry, layer, [*found]))
    tensors.check(expected)
    if config.tie_embeddings and (tied := entries.unembedding(config)) in expected:
        _check_tied(tensors, tied, parts[0][2][0])
    # The largest tensors, those without layers, come first: what a tensor takes on its way adds to what is there.
    for entry, layer, names in sorted(parts, key=lambda part: part[1] is not None):
        value = entry.into(*(tensors.get(name, dtype) for name in names)).astype(dtype, copy=False)
        yield (f"trunk/{entry.leaf}" if scalar else entry.leaf), layer, value
    if scalar:
        yield "kernel", None, tensors.get("score.weight")[0].astype(np.float32)
        bias = tensors.get("score.bias")[0] if "score.bias" in expected else 0.0
        yield "bias", None, np.array(bias, np.float32)


def _placed(values: Iterator[_Value], config: Config, dtype: Any, place: Placement) -> Params:
    """The parameters on their devices."""
    shapes = transformer.parameter_shapes(config)
    params: dict[str, Any] = {}
    for path, layer, value in values:
        leaf = path.removeprefix("trunk/")
        if leaf in ("kernel", "bias"):  # of a score head
            _set(params, path, jnp.asarray(value))
            continue
        shape = _get(shapes, leaf).shape
        sharding = place(leaf, shape)
        if layer is None:
            _set(params, path, hosts.put(value, sharding))
            continue
        whole = _get(params, path) if layer else jnp.zeros(shape, dtype, device=sharding)
        whole = _put(whole, hosts.put(value[None], sharding), layer, 0)
        _set(params, path, jax.block_until_ready(whole))  # or what waits its turn would fill the memory
    return params


def _prefix(tensors: files.Tensors, config: Config, scalar: bool) -> str:
    """The prefix that the names in this checkpoint lack, as in GPT-2's own files; empty for most."""
    prefix = entries.entries(config, scalar)[0].names[0].split(".")[0] + "."
    return "" if any(name.startswith(prefix) for name in tensors.where) else prefix


def _head(tensors: files.Tensors, config: Config, scalar: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a score head, which a reward model must have, or of a tied unembedding, which may be there too."""
    if not scalar:
        name = entries.unembedding(config)
        tied = config.tie_embeddings and name in tensors.where
        return {name: (config.vocab_size, config.d_model)} if tied else {}
    if "score.weight" not in tensors.where:
        raise InputError(f"{tensors.path} has no score head (score.weight): it is not a reward model")
    head: dict[str, tuple[int, ...]] = {"score.weight": (1, config.d_model)}
    return head | ({"score.bias": (1,)} if "score.bias" in tensors.where else {})


# Writes one layer [1, ...] of a leaf in place.
_put = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)


def _check_tied(tensors: files.Tensors, name: str, embedding: str) -> None:
    """Raises InputError where a tied unembedding, which may be in the file too, differs from the embedding."""
    if not np.array_equal(tensors.get(name), tensors.get(embedding)):
        raise InputError(f"{tensors.path}: {name} differs from the embedding, to which config.json ties it")


def _set(tree: dict, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _load_tokenizer(path: Path, config: Config) -> tokenizers.Tokenizer | None:
    """The tokenizer of a directory, None if it has no tokenizer.json."""
    if not files.find(path, "tokenizer.json"):
        return None
    for file in files.find(path, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        settings = files.read_json(file)
        length = settings.get("model_max_length")
        if length is not None and (type(length) not in (int, float) or length <= 0):
            raise InputError(f"{file}: model_max_length={files.shown(length)}: expected a number above 0, or null")
    tokenizer = tokenizers.load(path)
    try:
        tokenizers.check_vocabulary(tokenizer, config.vocab_size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return tokenizer


def _load_generation(path: Path, config: Config, tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any] | None:
    """The generation settings of a directory, whose EOS are ids of its vocabulary."""
    for file in files.find(path, "generation_config.json"):
        settings = files.read_json(file)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            named = settings.get(name)
            for i in named if isinstance(named, list) else [] if named is None else [named]:
                if type(i) is not int or (name == "eos_token_id" and not 0 <= i < config.vocab_size):
                    expected = f"expected an id, or a list of ids, from 0 to {config.vocab_size - 1}"
                    raise InputError(f"{file}: {name}={files.shown(named)}: {expected}")
    generation = tokenizers.generation(path, tokenizer)
    if tokenizer is not None:
        try:
            tokenizers.stop_ids(tokenizer, generation)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return generation
