"""A model directory in the Hugging Face layout (config.json, *.safetensors, tokenizer), in and out.

Weights stream from disk tensor by tensor into the stacked parameters of `transformer.Transformer`, straight to where
those shall lie: the host never holds a second copy of the model. Only safetensors are read: nothing is unpickled, and
no code that comes with a checkpoint runs.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import hosts
from rlhf_jax.devices.compute import Compute
from rlhf_jax.models import families, heads, transformer
from rlhf_jax.models.config import Config
from rlhf_jax.types import InputError, Params

SHARD = 5 * 2**30  # bytes of a file of weights at most, unless one tensor is larger

# Where a parameter shall lie, from its path ("blocks/mlp/up/kernel") and shape; None is the default device. Layers, the
# first axis of a block's parameters, are not to be spread.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Model:
    """A language model or a reward model, ready to be applied."""

    config: Config
    params: Params
    tokenizer: tokenizers.Tokenizer | None
    apply: Callable  # (params, tokens [B, T], mask [B, T]) -> logits [B, T, V], or score [B] for a reward model
    generation: dict[str, Any] | None = None  # generation_config.json, which `save` passes on


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


def check_length(config: Config, **lengths: int) -> None:
    """Raises InputError for a length, by name, beyond a table of positions; warns where RoPE was trained for less."""
    for name, length in lengths.items():
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
    """A language model from a directory. Parameters have the type `dtype`, whatever the type of the file.

    Raises InputError when the directory, its architecture or a tensor is not what it should be.
    """
    path = Path(path)
    config = dataclasses.replace(families.load_config(path), compute=compute)
    params = _read(path, config, scalar=False, dtype=dtype, place=place)
    apply = transformer.bind(transformer.Transformer(config))
    return Model(config, params, _tokenizer(path, config), apply, tokenizers.generation(path))


def load_reward(
    path: str | Path,
    dtype: Any = jnp.float32,
    compute: Compute = Compute(),
    place: Placement = lambda path, shape: None,
) -> Model:
    """A reward model from a directory: a trunk and a score head of one output, read at the last real token."""
    path = Path(path)
    config = dataclasses.replace(families.load_config(path), compute=compute)
    params = _read(path, config, scalar=True, dtype=dtype, place=place)
    apply = heads.score_fn(config)
    return Model(config, params, _tokenizer(path, config), apply)


def save(model: Model, params: Params, path: str | Path) -> None:
    """Write `params`, with what else `model` came with, as a directory that `transformers` loads.

    Parameters of a `heads.ScalarModel` become a sequence classifier with one label. Its bias, which that layout has no
    place for, is kept in a tensor `score.bias` that only `load_reward` reads. The directory appears whole or not at
    all. The first process writes it, and the others wait until it is there.
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
    config = families.hf_config(model.config, "trunk" in params, str(trunk["embedding"].dtype), model.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*"):  # by an export that was killed
        if re.fullmatch(rf"\.{re.escape(path.name)}-[a-z0-9_]{{8}}(-former)?", left.name):
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        config.save_pretrained(partial)
        _write(partial, model.config, params)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(partial)
        if model.generation is not None and "trunk" not in params:
            said = tokenizers.stopping(model.generation, model.tokenizer)
            (partial / "generation_config.json").write_text(json.dumps(said, indent=2) + "\n")
        os.chmod(partial, 0o755)
        former = partial.with_name(f"{partial.name}-former")
        if path.exists():
            path.rename(former)  # at once, where deleting it could be stopped half way
        partial.rename(path)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _layout(config: Config, scalar: bool) -> Iterator[tuple[families.Entry, int | None, dict[str, tuple[int, ...]]]]:
    """The parts that parameters are made of, a layer at a time: entry, layer, and the tensors' shapes by name.

    The layer is None where a leaf has none.
    """
    shapes = transformer.parameter_shapes(config)
    for entry in families.entries(config, scalar):
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
    files: list[list] = [[]]
    filled = 0
    for size, part in parts:
        if files[-1] and filled + size > SHARD:
            files.append([])
            filled = 0
        files[-1].append(part)
        filled += size
    where: dict[str, str] = {}
    for n, held in enumerate(files, start=1):
        tensors = dict(tensor for entry, layer in held for tensor in _tensors(entry, layer, trunk))
        if n == 1 and "trunk" in params:
            tensors["score.weight"] = np.asarray(params["kernel"])[None]
            if float(params["bias"]) != 0.0:
                tensors["score.bias"] = np.asarray(params["bias"])[None]
        name = f"model-{n:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        safetensors.numpy.save_file(tensors, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _hand_over(config: Config, params: Params) -> None:
    """What another process does while the first one writes parameters of which it has parts."""
    trunk = params.get("trunk", params)
    for entry, layer, _ in _layout(config, "trunk" in params):
        for _ in _tensors(entry, layer, trunk):
            pass


def _tensors(entry: families.Entry, layer: int | None, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one part of the parameters, by name."""
    leaf = _get(params, entry.leaf)
    for name, tensor in zip(entry.names, entry.out(hosts.whole(leaf if layer is None else leaf[layer])), strict=True):
        yield name.format(layer), np.ascontiguousarray(tensor)


# Reading --------------------------------------------------------------------------------------------------------------


class _Files:
    """The tensors of a directory by name, whether in one file or in shards.

    A file is open for one tensor at a time: what is mapped stays in memory until it is closed.
    """

    def __init__(self, path: Path):
        self.path = path
        index, single = path / "model.safetensors.index.json", "model.safetensors"
        if (path / single).exists():  # it comes before an index, as in transformers
            with self._open(single) as file:
                where = dict.fromkeys(file.keys(), single)
        elif index.exists():
            try:
                where = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index} cannot be read: it needs an object weight_map of tensor to file") from error
            if strange := [file for file in where.values() if Path(file).name != file]:
                raise InputError(f"{index}: {strange[0]!r} is not the name of a file beside it")
        else:
            raise InputError(f"{path} holds no model.safetensors: other weight formats are not read")
        self.listed, self.where = where, dict(where)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self.path / name, framework="np") as file:
                yield file
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{self.path / name} cannot be read: {error}") from error

    def get(self, name: str) -> np.ndarray:
        with self._open(self.where[name]) as file:
            return file.get_tensor(name)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises InputError unless there are these tensors, of these shapes, and no others."""
        for name in expected:
            if name not in self.where:
                raise InputError(f"{self.path} has no tensor {name!r}, which its config.json asks for")
        if unexpected := sorted(self.where.keys() - expected.keys()):
            more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
            what = ", ".join(unexpected[:3]) + more
            hint = ": it is a reward model" if "score.weight" in unexpected else ""
            raise InputError(f"{self.path} has tensors that its config.json does not ask for ({what}){hint}")
        for file in sorted({*self.where.values()}):
            with self._open(file) as held:
                for name in sorted(held.keys()):
                    if self.listed.get(name) != file:
                        raise InputError(f"{self.path / file} has a tensor {name!r} that the index does not list there")
                for name in expected:
                    if self.where[name] == file:
                        about = held.get_slice(name)
                        found, kind = tuple(about.get_shape()), about.get_dtype()
                        if found != expected[name]:
                            asked = f"config.json, which asks for {list(expected[name])}"
                            raise InputError(f"{self.path}: {name} {list(found)} does not fit {asked}")
                        if kind not in _FLOATS:
                            raise InputError(f"{self.path}: {name} is {kind}: expected {', '.join(_FLOATS)}")


_FLOATS = ("F32", "F16", "BF16")
_BUFFERS = re.compile(r"attn\.(masked_)?bias|.*\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq")  # of older checkpoints


def _read(path: Path, config: Config, scalar: bool, dtype: Any, place: Placement) -> Params:
    files = _Files(path)
    parts = list(_layout(config, scalar))
    probe = next(iter(parts[0][2]))
    prefix = probe.split(".")[0] + "."
    if any(name.startswith(prefix) for name in files.where):  # which GPT-2's own files lack
        prefix = ""
    files.where = {name: file for name, file in files.where.items() if not _BUFFERS.fullmatch(name)}
    embedding = probe.removeprefix(prefix)
    if config.tie_embeddings and "lm_head.weight" in files.where and embedding in files.where:
        _check_tied(files, embedding)
    head: dict[str, tuple[int, ...]] = {"score.weight": (1, config.d_model)} if scalar else {}
    if scalar and "score.weight" not in files.where:
        raise InputError(f"{path} has no score head (score.weight): it is not a reward model")
    if scalar and "score.bias" in files.where:
        head["score.bias"] = (1,)
    expected = {name.removeprefix(prefix): shape for *_, shapes in parts for name, shape in shapes.items()}
    files.check(expected | head)
    shapes = transformer.parameter_shapes(config)
    params: dict[str, Any] = {}
    # The largest tensors, those without layers, come first: what a tensor takes on its way adds to what is there.
    for entry, layer, names in sorted(parts, key=lambda part: part[1] is not None):
        value = entry.into(*(files.get(name.removeprefix(prefix)) for name in names)).astype(dtype, copy=False)
        shape = _get(shapes, entry.leaf).shape
        sharding = place(entry.leaf, shape)
        if layer is None:
            _set(params, entry.leaf, hosts.put(value, sharding))
            continue
        leaf = _get(params, entry.leaf) if layer else jnp.zeros(shape, dtype, device=sharding)
        leaf = _put(leaf, hosts.put(value[None], sharding), layer, 0)
        _set(params, entry.leaf, jax.block_until_ready(leaf))  # or what waits its turn would fill the memory
    if not scalar:
        return params
    weight = files.get("score.weight")[0].astype(np.float32)
    bias = np.float32(files.get("score.bias")[0] if "score.bias" in files.where else 0.0)
    return {"trunk": params, "kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}


# Writes one layer [1, ...] of a leaf in place.
_put = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0)


def _check_tied(files: _Files, embedding: str) -> None:
    """An unembedding that is tied may be there too, but not otherwise than the embedding."""
    if not np.array_equal(files.get("lm_head.weight"), files.get(embedding)):
        raise InputError(f"{files.path}: lm_head.weight differs from the embedding, to which config.json ties it")
    del files.where["lm_head.weight"]


def _set(tree: dict, path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = leaf


def _tokenizer(path: Path, config: Config) -> tokenizers.Tokenizer | None:
    if not (path / "tokenizer.json").exists():
        return None
    tokenizer = tokenizers.load(path)
    try:
        tokenizers.check_vocabulary(tokenizer, config.vocab_size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return tokenizer
