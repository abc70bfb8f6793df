"""The files of a model directory: whatever is wrong in one of them is said on one line that names it."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer
from rlhf_jax.models import directory, files
from rlhf_jax.types import InputError
from tests import tiny

VALUES = (
    None,
    True,
    0,
    -1,
    2,
    2**31,
    10**30,
    0.5,
    1e-300,
    float("nan"),
    float("inf"),
    "",
    "é\n",
    [],
    [[]],
    {},
    {"a": 1},
)


def written(path, name, monkeypatch):
    """The files of a model directory with a tokenizer, by name; Llama's weights are in shards."""
    tok = tokenizer.train(["a few words of text"], 300, path / "tokenizer")
    config = models.gpt(1, 8, 2, vocab_size=300, max_length=8) if name == "gpt" else SMALL
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), models.parameter_shapes(config))
    monkeypatch.setattr(directory, "SHARD", 12000 if name == "llama" else 2**40)
    models.save(models.Model(config, params, tok, models.bind, {"eos_token_id": [0, 7]}), params, path / "whole")
    return {file.name: file.read_bytes() for file in (path / "whole").iterdir()}


SMALL = models.llama(1, 8, 2, 1, 8, vocab_size=300, max_length=8)


def fields(value, at=()):
    """The way to each field in a value of JSON."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from fields(value[key], (*at, key))


def mutated_json(data, rng):
    whole = json.loads(data)
    *parents, last = rng.choice([way for way in fields(whole) if way][:300])
    inner = whole
    for key in parents:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = rng.choice(VALUES)
    return json.dumps(whole).encode()


def mutated(name, data, rng):
    if name.endswith(".json") and rng.random() < 0.7:
        return mutated_json(data, rng)
    if name.endswith(".safetensors") and rng.random() < 0.7:
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutated_json(data[8:end], rng)
        return len(header).to_bytes(8, "little") + header + data[end:]
    start, length = rng.randrange(len(data)), rng.randrange(20)
    return data[:start] + rng.randbytes(rng.randrange(4)) + data[start + length :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_whatever_is_wrong_is_said_on_one_line(name, tmp_path, monkeypatch):
    whole = written(tmp_path, name, monkeypatch)
    rng = random.Random(name)
    path, refused = tmp_path / "broken", 0
    path.mkdir()
    for file, data in whole.items():
        (path / file).write_bytes(data)
    for _ in range(50):
        file = rng.choice([*whole, "config.json", "config.json"])
        (path / file).write_bytes(mutated(file, whole[file], rng))
        try:
            models.stop_ids(models.load(path))
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 600
            refused += 1
        (path / file).write_bytes(whole[file])
    assert refused > 15
    models.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read: it is empty"),
        ("  \n", "cannot be read: it is empty"),
        ("{", "cannot be read: Expecting property name"),
        ("[" * 100000, "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ("[1]", "holds no object"),
        ("3", "holds no object"),
        ('{"a": {"b": [0, NaN]}}', r"a\.b\.1=nan: expected a finite number"),
        ('{"a": -Infinity}', "a=-inf: expected a finite number"),
        ('{"a": 1e999}', "a=inf: expected a finite number"),
        ('{"a": {"size": 1, "size": 2}}', "'size' is set twice"),
    ],
    ids=range(11),
)
def test_json_that_is_refused(text, message, tmp_path):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        files.read_json(tmp_path / "some.json")
    assert "\n" not in str(error.value) and "some.json" in str(error.value) and len(str(error.value)) < 400


def test_json_is_read_as_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *args: "ascii")
    (tmp_path / "some.json").write_bytes('{"name": "é"}'.encode())
    assert files.read_json(tmp_path / "some.json") == {"name": "é"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_largest_magnitude(dtype):
    x = np.random.default_rng(0).normal(size=(3, 50_000)).astype(dtype)
    assert files.largest(x) == float(np.abs(x.astype(np.float64)).max())
    for odd in (np.nan, -np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[2, -1] = odd
        np.testing.assert_equal(abs(files.largest(spoiled)), abs(odd))
    assert files.largest(x[:0]) == 0.0 and files.largest(np.array([-0.5], dtype)) == 0.5


def test_nothing_but_a_directory_is_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    for name, message in {
        "file": "it is a file",
        "dangling": "it is a link to .*gone, which is not there",
        "loop": "it is a link to .*loop, which is not there|too many levels",
        "odd": "it has no config.json",
        "a" * 300: "cannot be read: File name too long",
        "file/model": "Not a directory|it has no config.json",
    }.items():
        for load in (models.load, models.load_reward):
            with pytest.raises(InputError, match=message) as error:
                load(tmp_path / name)
            assert "\n" not in str(error.value)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    models.save(models.Model(tiny.GPT, tiny.policy(), None, models.bind), tiny.policy(), tmp_path / "model")
    monkeypatch.setattr(files.os, "listdir", refuse)
    with pytest.raises(InputError, match="model cannot be read: Permission denied"):
        models.load(tmp_path / "model")
