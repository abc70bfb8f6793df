"""Rows of words, batches of every kind that are made of them, and what a test reads in a batch."""

import functools

import numpy as np
import pytest

from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib

WORDS = "the cat sat on a mat and ate two fish while nobody was looking at it".split()  # noqa: SIM905


def says(n, words):
    """Some words that no other row says."""
    return f"{n}: " + " ".join(WORDS[(n + k) % len(WORDS)] for k in range(words))


TEXTS = [{"text": says(n, 1 + n % 13)} for n in range(40)]
DEMONSTRATIONS = [{"prompt": says(n, 1 + n % 3), "completion": says(100 + n, 1 + n % 5)} for n in range(20)] + [
    {"messages": [{"role": "user", "content": says(n, 2)}, {"role": "assistant", "content": says(100 + n, n % 4 + 1)}]}
    for n in range(20, 40)
]
RANKINGS = [
    {
        "prompt": says(n, 2),
        "responses": [says(100 * n + k, 1 + k) for k in range(2 + n % 3)],
        "ranks": [(n + k) % 3 for k in range(2 + n % 3)],
    }
    for n in range(13)
]
PROMPTS = [{"prompt": says(n, 1 + n % 5)} for n in range(13)]
MAKE = {
    "text": functools.partial(pipeline.text, TEXTS, length=24, batch=4, seed=3),
    "demonstrations": functools.partial(pipeline.demonstrations, DEMONSTRATIONS, length=64, batch=4, seed=3),
    "rankings": functools.partial(pipeline.rankings, RANKINGS, length=64, batch=4, seed=3),
    "prompts": functools.partial(pipeline.prompts, PROMPTS, length=32, batch=4, seed=3),
    "prompts of several widths": functools.partial(pipeline.prompts, PROMPTS, length=32, batch=4, seed=3, widths=4),
}
KINDS = pytest.mark.parametrize("kind", MAKE)


def leaves(batch):
    named = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: x for name, x in named.items() if isinstance(x, np.ndarray)}


def same(one, other):
    return all(np.array_equal(x, leaves(other)[name]) for name, x in leaves(one).items())


def segments(batches):
    """(ids, targets) of each segment."""
    for batch in batches:
        for tokens, segment, target in zip(batch.tokens, batch.segment, batch.target, strict=True):
            assert (np.diff(segment[segment > 0]) >= 0).all() and not target[segment == 0].any()
            for number in range(1, segment.max() + 1):
                assert (segment == number).any()
                yield tokens[segment == number].tolist(), target[segment == number].tolist()


def turns(roles, words=2):
    """Messages by the first letters of their roles, each of as many words."""
    role = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": role[letter], "content": says(n, words)} for n, letter in enumerate(roles)]


def prompt_length(tokenizer, messages):
    return len(tokenizer_lib.render_prompt(tokenizer, messages))
