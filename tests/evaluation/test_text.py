"""Predicted text: each token once, and bits a byte by hand."""

import math

import jax
import numpy as np
import pytest

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.evaluation import text
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.likelihood import Likelihood
from rlhf_jax.types import InputError
from tests.evaluation.models import model


def test_windows():
    found = [tuple(map(list, pair)) for pair in text.windows(np.arange(1, 9), [0], 3)]
    assert found == [([0], [1, 2, 3]), ([3], [4, 5, 6]), ([5, 6], [7, 8])]  # the last reads as much as it can
    assert [tuple(map(list, pair)) for pair in text.windows(np.arange(1, 3), [0], 3)] == [([0], [1, 2])]


def test_bits_per_byte(monkeypatch):
    """A model that gives each token a probability of 1/8."""
    asked = []

    def loglikelihoods(model, requests, *, layout, batch):
        asked.extend(requests)
        return [Likelihood(-len(request.continuation) * math.log(8), False) for request in requests]

    monkeypatch.setattr(likelihood, "loglikelihoods", loglikelihoods)
    found = text.evaluate(model(), ["é?", "", "zz" * 100])
    tokens = sum(len(ids) for ids in tokenizers.documents(model().tokenizer, ["é?", "zz" * 100]))
    assert found.tokens == tokens and found.bytes == 203 and found.perplexity == pytest.approx(8.0)
    assert found.bits_per_byte.value == pytest.approx(3 * tokens / 203)
    assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte.value)
    assert all(len(request.context) + len(request.continuation) - 1 <= 128 for request in asked) and len(asked) > 2
    with pytest.raises(InputError, match="no text to predict"):
        text.evaluate(model(), [""])


@pytest.mark.slow
def test_perplexity_is_that_of_the_network():
    one, words = model(), "Is ice cold?"
    (ids,) = tokenizers.documents(one.tokenizer, [words])
    read = np.concatenate([[one.tokenizer.eos_token_id], ids]).astype(np.int32)[None]
    logp = jax.nn.log_softmax(jax.jit(one.apply)(one.params, read, np.ones_like(read, bool))[0, :-1])
    nll = -float(np.asarray(logp)[np.arange(len(ids)), ids].sum())
    found = text.evaluate(one, [words], batch=8)
    assert found.perplexity == pytest.approx(math.exp(nll / len(ids)), rel=1e-4)
