"""A model small enough to evaluate in a test, and its tokenizer."""

import functools
import tempfile

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from tests import tiny


@functools.cache
def model(length: int = 128, seed: int = 0) -> models.Model:
    """A model of random parameters whose tokens are mostly bytes."""
    tokenizer = tokenizers.train(["Is ice cold? yes no"], 270, tempfile.mkdtemp())
    config = models.gpt(1, 16, 2, vocab_size=270, max_length=length)
    return models.Model(config, tiny.policy(config, seed), tokenizer, models.bind(models.Transformer(config)))
