"""Examples in the prompt (few-shot, arXiv:2005.14165): which are drawn, and how they stand before the question."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.data.tokenizer import Message

Pair = tuple[str, str]  # a prompt and its target, as `task.in_words` makes them

_LISTED = re.compile(r"- |\([A-Z]\) ")  # begins the line of an option


def order(rows: int, seed: int) -> Iterator[int]:
    """Yield the numbers of all rows in an order drawn by seed: the first usable ones are the examples of a prompt."""
    return map(int, np.random.default_rng(seed).permutation(rows))


def answered(prompt: str, answer: str) -> str:
    """An answer as it follows its prompt in a text: after a space, or on a line of its own below a list of options."""
    return f"\n{answer}" if _LISTED.match(prompt.rpartition("\n")[2]) else f" {answer}"


def text(pairs: Sequence[Pair], prompt: str) -> str:
    """The examples and the question as one text, an empty line between; an answer follows it as of `answered`."""
    return "\n\n".join([*(question + answered(question, answer) for question, answer in pairs), prompt])


def messages(pairs: Sequence[Pair], prompt: str) -> list[Message]:
    """The examples and the question as a conversation, in which each example is a turn of its own."""
    turns: list[Message] = []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": prompt}]
