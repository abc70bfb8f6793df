"""Random multiple-choice questions in token ids, for us and for peers that have only NumPy in common with us."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the questions."""

    questions: int = 32
    examples: int = 5  # in front of each question, its own ones
    question: int = 48  # tokens of a question and of an example, on average; half of it less or more
    options: int = 4  # of a question
    option: int = 6  # tokens of an option, on average; from 1 to nearly twice as many


def draw(sizes: Sizes, first: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """The context and continuation of each option of each question."""
    rng = np.random.default_rng(0)
    ids = lambda size: rng.integers(first, vocabulary, size).tolist()
    near = lambda size: int(rng.integers(size // 2, size + size // 2 + 1))
    requests = []
    for _ in range(sizes.questions):
        context = [i for _ in range(sizes.examples + 1) for i in ids(near(sizes.question))]
        requests += [(context, ids(int(rng.integers(1, 2 * sizes.option)))) for _ in range(sizes.options)]
    return requests
