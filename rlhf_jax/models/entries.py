"""How the tensors of a checkpoint lie in the parameters, by the row of its family."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from rlhf_jax.models.config import Config
from rlhf_jax.models.families import FAMILIES, Family, family
from rlhf_jax.models.transformer import parameter_shapes


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf of the parameters, and the tensors of a checkpoint that it is made of.

    `into` takes numpy's arrays; `out` takes theirs, and jax's for their shapes alone.
    """

    leaf: str  # path in the parameters
    names: tuple[str, ...]  # of the tensors; {} stands for the layer, in a leaf with an axis of layers
    into: Callable[..., Any] = lambda tensor: tensor  # tensors (of one layer) -> leaf
    out: Callable[[Any], tuple[Any, ...]] = lambda leaf: (leaf,)  # its inverse


def entries(config: Config, scalar: bool) -> list[Entry]:
    """The entries of a language model or, without its unembedding, of a `heads.ScalarModel`'s trunk."""
    row = FAMILIES[family(config)]
    leaves = {path: x.shape for path, x in flatten_dict(parameter_shapes(config), sep="/").items()}
    if scalar:
        leaves.pop("unembedding", None)

    def place(path: str) -> tuple[int, bool]:
        module = path if path in row.names else path.removeprefix("blocks/").rpartition("/")[0]
        return list(row.names).index(module), path.endswith("/bias")

    paths = sorted(leaves, key=place)
    whole = [path for path in paths if not path.startswith("blocks/")]
    blocks = [path for path in paths if path.startswith("blocks/")]
    return [
        *(_entry(row, config, path, leaves[path]) for path in whole),
        *(_block_entry(row, config, path, leaves[path][1:]) for path in blocks),
    ]


def unembedding(config: Config) -> str:
    """The name of the tensor that an untied unembedding is, and a tied one may be."""
    (name,) = FAMILIES[family(config)].names["unembedding"]
    return f"{name}.weight"


_INPUTS = {"attention/out": 3}  # axes of a kernel that are inputs, where they are several


def _block_entry(row: Family, config: Config, path: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a leaf in blocks; where its first axis is that of experts, each has tensors of its own."""
    if "/experts/" not in path:
        return _entry(row, config, path, shape)
    one, count = _entry(row, config, path, shape[1:]), shape[0]
    each = len(one.names)

    def into(*tensors: np.ndarray) -> np.ndarray:
        return np.stack([one.into(*tensors[n * each : (n + 1) * each]) for n in range(count)])

    def out(leaf: Any) -> tuple[Any, ...]:
        return tuple(tensor for n in range(count) for tensor in one.out(leaf[n]))

    return Entry(path, tuple(name.replace("*", str(n)) for n in range(count) for name in one.names), into, out)


def _entry(row: Family, config: Config, path: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a leaf of this shape, without an axis of layers."""
    if path in row.names:  # a table of vectors
        return Entry(path, tuple(f"{name}.weight" for name in row.names[path]))
    module, parameter = path.removeprefix("blocks/").rsplit("/", 1)
    before = row.layer if path.startswith("blocks/") else ""
    names = tuple(f"{before}{name}.{'bias' if parameter == 'bias' else 'weight'}" for name in row.names[module])
    rows = (math.prod(shape[: _INPUTS.get(module, 1)]),) if parameter == "kernel" else ()
    turned = row.transposed and parameter == "kernel"
    parts = _parts(row, config, module)
    ends = np.cumsum(parts).tolist()
    shapes = [(*shape[:-2], part, shape[-1]) for part in parts] or [shape]

    def into(*tensors: np.ndarray) -> np.ndarray:
        flat = [tensor.T if turned else tensor for tensor in tensors]
        if len(flat) < len(shapes):
            sizes = [math.prod(part) // math.prod(rows) for part in shapes]
            flat = np.split(flat[0], np.cumsum(sizes)[:-1], axis=-1)
        found = [tensor.reshape(part) for tensor, part in zip(flat, shapes, strict=True)]
        return np.concatenate(found, axis=-2) if parts else found[0]

    def out(leaf: Any) -> tuple[Any, ...]:
        found = [leaf[..., end - part : end, :] for part, end in zip(parts, ends, strict=True)] or [leaf]
        flat = [part.reshape(*rows, -1) for part in found]
        if len(names) < len(flat):
            flat = [flat[0].__array_namespace__().concat(flat, axis=-1)]
        return tuple(tensor.T if turned else tensor for tensor in flat)

    return Entry(path, names, into, out)


def _parts(row: Family, config: Config, module: str) -> tuple[int, ...]:
    """Sizes, along the last axis but one, of parts of a leaf that are apart in the file; none where it is all one."""
    if module == "attention/qkv" and not row.by_head:
        return config.n_heads // config.n_kv_heads, 1, 1
    return (1, 1) if module in ("mlp/up", "mlp/experts/up") and config.gated else ()
