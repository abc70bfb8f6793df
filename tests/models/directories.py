"""Model directories to test with, and to break."""

import json

import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.types import InputError
from tests import tiny


def model(config):
    return models.Model(config, tiny.policy(config), None, models.bind(models.Transformer(config)))


def saved(path, config=tiny.LLAMA, params=None):
    """A model directory, and the config and tensors in it, to break."""
    models.save(model(config), tiny.policy(config) if params is None else params, path)
    return json.loads((path / "config.json").read_text()), safetensors.numpy.load_file(path / "model.safetensors")


def refused(path, message, load=models.load):
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
