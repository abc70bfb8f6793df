"""The average of the weights of several models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer
from rlhf_jax.types import InputError
from tests import tiny
from tests.models.directories import model


def fine_tuned(path, config, seed, scalar=True, tok=None):
    """A model that was trained from `tiny`'s, as a directory; returns its parameters."""
    rng = np.random.default_rng(seed)
    params = tiny.scalar(config) if scalar else tiny.policy(config)
    params = jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.05, x.shape), x.dtype), params)
    models.save(dataclasses.replace(model(config), tokenizer=tok), params, path)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("scalar", [True, False], ids=["reward", "language"])
def test_the_average_of_models_is_their_average(scalar, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    each = [fine_tuned(path, tiny.LLAMA, seed, scalar) for seed, path in enumerate(paths)]
    found = models.load_average(paths)
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x).astype(np.float64), axis=0), *each)
    tiny.assert_close(found.params, mean, atol=1e-7)
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    models.save(found, found.params, tmp_path / "average")
    saved = (models.load_reward if scalar else models.load)(tmp_path / "average")
    outputs = [jax.jit(found.apply)(params, tokens, mask) for params in (saved.params, found.params, *each)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert all(np.abs(outputs[0] - other).max() > 0.01 for other in outputs[2:])


@pytest.mark.slow
def test_models_that_cannot_be_averaged_are_named(tmp_path):
    tok = tokenizer.train(["a few words"], 300, tmp_path)
    config = dataclasses.replace(tiny.GPT, vocab_size=300)
    other_tok = tokenizer.load(tmp_path)
    other_tok.eos_token = "!"
    first = tmp_path / "first"
    fine_tuned(first, config, 0, tok=tok)
    fine_tuned(tmp_path / "language", config, 1, scalar=False, tok=tok)
    fine_tuned(tmp_path / "wide", dataclasses.replace(config, d_ff=72, max_length=20), 2, tok=tok)
    fine_tuned(tmp_path / "eos", config, 3, tok=other_tok)
    models.save(dataclasses.replace(model(config), tokenizer=tok), tiny.scalar(config, seed=9), tmp_path / "stranger")
    for name, said in {
        "language": "first is a reward model and .*language is a language model: average models of one kind",
        "wide": r"first and .*wide differ in max_length \(24, 20\), d_ff \(64, 72\): average models of one init",
        "eos": r"first and .*eos differ in EOS \('<\|endoftext\|>', '!'\): average models of one init",
        "stranger": "stranger was trained from another init: the cosine .* and those of .*first is -?0.0",
    }.items():
        with pytest.raises(InputError, match=said):
            models.load_average([first, tmp_path / name])
