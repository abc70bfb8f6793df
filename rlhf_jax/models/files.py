"""The files of a model directory as they are read: JSON objects, and tensors by name from safetensors.

Only safetensors are read: nothing is unpickled. Whatever cannot be used is an InputError that names the file.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from rlhf_jax.types import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
_PIECE = 2**16  # elements of a tensor that are checked at a time: they fit a core's cache


def shown(value: Any) -> str:
    """The value on one line of a message, cut short where it is long."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_directory(path: Path, holds: str) -> None:
    """Raises InputError unless there is a directory at `path` with a file of the name `holds`."""
    hint = "run the experiment that writes it"
    with _readable(path):
        if path.is_dir() and (file := next(iter(sorted(path.glob("*.gguf"))), None)):
            hint = f"name its GGUF file itself, {file}"
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is not a model directory: it is a link to {os.readlink(path)}, which is not there"
            )
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is not a model directory: it is a file; name the directory that holds {holds}")
        if path.is_dir():
            os.listdir(path)  # or PermissionError
        if not (path / holds).is_file():
            raise InputError(f"{path} is not a model directory: it has no {holds}; {hint}")


def find(path: Path, *names: str) -> list[Path]:
    """The files among `names` that a directory has."""
    with _readable(path):
        return [path / name for name in names if os.path.lexists(path / name)]


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for a field that is set twice, or not finite."""
    with _readable(file):
        if not file.is_file():
            raise InputError(f"{file} cannot be read: it is not a file")
        data = file.read_bytes()
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        odd = next(_not_finite(value), None)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not data.strip() else str(error).partition("\n")[0]
        raise InputError(f"{file} cannot be read: {reason}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no object: expected settings by name")
    if odd:
        raise InputError(f"{file}: {odd}: expected a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose names are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{shown(twice)} is set twice in one object: leave one")
    return found


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Each number in a value of JSON that is none or too large, as "name=number"."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name}={value}"
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))


def largest(tensor: np.ndarray) -> float:
    """The largest magnitude in a tensor of floats; NaN or infinite where any element is. 0 if it is empty.

    Magnitudes are ordered as their bits are, those of NaN above all. Compared so, pieces at a time, it costs a tenth of
    reading the tensor and no memory, and bfloat16 is as fast as float32.
    """
    bits = tensor.reshape(-1).view(f"uint{8 * tensor.itemsize}")
    magnitude = np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)  # all bits but the sign
    pieces = (bits[start : start + _PIECE] & magnitude for start in range(0, bits.size, _PIECE))
    top = max((piece.max() for piece in pieces), default=bits.dtype.type(0))
    return float(np.array(top, bits.dtype).view(tensor.dtype))


class Tensors:
    """The tensors of a directory by name, whether in one file or in shards.

    A file is open for one tensor at a time: what is mapped stays in memory until it is closed.
    """

    settings = "config.json"  # what tells which tensors there should be

    def __init__(self, path: Path):
        self.path = path
        if find(path, SINGLE):  # it comes before an index, as in transformers
            with self._open(SINGLE) as file:
                where = dict.fromkeys(file.keys(), SINGLE)
        elif find(path, INDEX):
            where = _read_index(path / INDEX)
        else:
            raise InputError(f"{path} holds no {SINGLE}: other weight formats are not read")
        self.listed, self.where = where, dict(where)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        file = self.path / name
        with _readable(file):
            if not file.is_file():
                raise InputError(f"{file} cannot be read: it is not there, or not a file")
        try:
            with safetensors.safe_open(file, framework="np") as opened:
                yield opened
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error

    def get(self, name: str, dtype: Any = jnp.float32) -> np.ndarray:
        """The tensor as it is in the file. Raises InputError unless all of it is finite, also in the type `dtype`."""
        with self._open(self.where[name]) as file:
            tensor = file.get_tensor(name)
        return self.finite(tensor, self.path / self.where[name], name, dtype)

    def finite(self, tensor: np.ndarray, file: Path, name: str, dtype: Any) -> np.ndarray:
        """The tensor. Raises InputError unless all of it is finite, also in the type `dtype`."""
        if not (most := largest(tensor)) <= (limit := float(jnp.finfo(dtype).max)):
            what = "NaN" if math.isnan(most) else f"{most:g} in magnitude"
            hint = f"{jnp.dtype(dtype).name} ends at {limit:.3g}" if math.isfinite(most) else "expected finite weights"
            raise InputError(f"{file}: {name} has an element that is {what}: {hint}")
        return tensor

    def need(self, name: str) -> None:
        """Raises InputError unless there is this tensor."""
        if name not in self.where:
            raise InputError(f"{self.path} has no tensor {name!r}, which its {self.settings} asks for")

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless there are these tensors, of these shapes, and no others."""
        self.check_names(expected)
        for file in sorted({*self.where.values()}):
            with self._open(file) as opened:
                for name in sorted(opened.keys()):
                    if self.listed.get(name) != file:
                        what = f"a tensor {shown(name)} that the index does not list there"
                        raise InputError(f"{self.path / file} has {what}")
                for name in expected:
                    if self.where[name] == file:
                        self._check_tensor(name, opened.get_slice(name), expected[name])

    def check_names(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless there are tensors of these names, and no others."""
        for name in expected:
            self.need(name)
        if unexpected := sorted(self.where.keys() - expected.keys()):
            more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
            what = ", ".join(map(_plain, unexpected[:3])) + more
            hint = ": it is a reward model" if "score.weight" in unexpected else ""
            raise InputError(f"{self.path} has tensors that its {self.settings} does not ask for ({what}){hint}")

    def _check_tensor(self, name: str, about: Any, shape: tuple[int, ...]) -> None:
        found, kind = tuple(about.get_shape()), about.get_dtype()
        if found != shape:
            asked = f"config.json, which asks for {list(shape)}"
            raise InputError(f"{self.path}: {name} {list(found)} does not fit {asked}")
        if kind not in _FLOATS:
            raise InputError(f"{self.path}: {name} is {kind}: expected {', '.join(_FLOATS)}")


def _plain(name: str) -> str:
    """A tensor's name as messages show it, on one line."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def _read_index(file: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards lists them."""
    index = read_json(file)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{file} cannot be read: it needs an object weight_map of tensor to file")
    if strange := [name for name in where.values() if Path(name).name != name or not name.isprintable()]:
        raise InputError(f"{file}: {shown(strange[0])} is not the name of a file beside it")
    size = index["metadata"].get("total_size", 0) if isinstance(index.get("metadata"), dict) else 0
    if type(size) not in (int, float) or size < 0:
        raise InputError(f"{file}: total_size={shown(size)}: expected a number of bytes")
    return where
