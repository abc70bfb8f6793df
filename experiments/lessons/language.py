"""A language of 24 words: guests' reviews of a café. It is so small that everything about it can be known exactly.

    the soup was great and the staff was very kind .
    our table was lovely but our coffee was cold .

A review has one or two clauses. "and" joins two clauses of the same mood, "but" two of different moods; nothing else
is a review. Half of all first clauses praise. So a language model can be compared with the best possible one
(`entropy`), and any text can be judged by a rule (`kindness`), which stands for what people really want.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax.types import Prompts, Rankings, Tokens

PRAISE = ("great", "lovely", "fresh", "kind", "warm")
BLAME = ("awful", "dull", "stale", "rude", "cold")
OWNERS = ("the", "our")
THINGS = ("soup", "bread", "coffee", "cake", "staff", "room", "table")
WORDS = ("", *OWNERS, *THINGS, "was", "very", *PRAISE, *BLAME, "and", "but", ".")  # the first one is padding
NUMBER = {word: number for number, word in enumerate(WORDS)}
END = NUMBER["."]  # ends a review
LENGTH = 12  # tokens of the longest review: two clauses with "very", what joins them, and the end
OPENING = 3  # words of a prompt, such as "the soup was"
ANSWER = LENGTH - OPENING  # tokens of the longest answer
GOES_ON = 0.7  # probability of a second clause
VERY = 0.3  # probability of "very"
TURNS = 0.2  # probability that the second clause has the other mood


def clause(praise: bool, rng: random.Random) -> list[str]:
    """One clause: its opening, perhaps "very", and a word that praises or blames."""
    very = ["very"] if rng.random() < VERY else []
    return [rng.choice(OWNERS), rng.choice(THINGS), "was", *very, rng.choice(PRAISE if praise else BLAME)]


def review(rng: random.Random) -> str:
    """A random review."""
    praise = rng.random() < 0.5
    words = clause(praise, rng)
    if rng.random() < GOES_ON:
        turns = rng.random() < TURNS
        words += ["but" if turns else "and", *clause(praise ^ turns, rng)]
    return " ".join([*words, "."])


def reviews(count: int, seed: int | str) -> list[str]:
    """The first `count` random reviews of a seed."""
    rng = random.Random(f"reviews/{seed}")
    return [review(rng) for _ in range(count)]


def entropy() -> float:
    """The entropy of a review's words after the first, in nats a word: no language model can have a smaller loss."""

    def coin(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    second = math.log(len(OWNERS)) + math.log(len(THINGS)) + coin(VERY) + math.log(len(PRAISE)) + coin(TURNS)
    first = math.log(len(THINGS)) + coin(VERY) + math.log(2 * len(PRAISE)) + coin(GOES_ON)
    words = (4 + VERY) + GOES_ON * (5 + VERY)
    return (first + GOES_ON * second) / words


_CLAUSE = rf"(?:{'|'.join(OWNERS)}) (?:{'|'.join(THINGS)}) was (very )?({'|'.join(PRAISE + BLAME)})"
_REVIEW = re.compile(rf"{_CLAUSE}(?: (and|but) {_CLAUSE})? \.")


def points(text: str) -> list[int] | None:
    """The points of each clause of a review: 1 for praise, -1 for blame, twice that with "very". None: no review."""
    match = _REVIEW.fullmatch(text)
    if match is None:
        return None
    very, word, joint, later_very, later_word = match.groups()
    found = [(2 if very else 1) * (1 if word in PRAISE else -1)]
    if joint:
        found.append((2 if later_very else 1) * (1 if later_word in PRAISE else -1))
        if (joint == "and") != (found[0] * found[1] > 0):
            return None
    return found


def kindness(text: str) -> float:
    """How kind a review is, from 0 to 1: its points, which are from -4 to 4, to that scale. What is no review has 0."""
    found = points(text)
    return 0.0 if found is None else (4 + sum(found)) / 8


# Instructions ---------------------------------------------------------------------------------------------------------


def instruction(number: int) -> str:
    """Instruction number 0 to 69: a thing and a word of praise or blame, as in "cake stale .", to make a review of."""
    thing, word = divmod(number, len(PRAISE + BLAME))
    return f"{THINGS[thing]} {(PRAISE + BLAME)[word]} ."


def is_new(number: int) -> bool:
    """Whether an instruction is kept for measuring: one in five is, and each thing and each word is in others too."""
    thing, word = divmod(number, len(PRAISE + BLAME))
    return (thing + word) % 5 == 0


def instructions(count: int, seed: int | str, new: bool = False) -> list[str]:
    """Random instructions to learn from, or `new` ones, none of which is among the former."""
    rng = random.Random(f"instructions/{seed}")
    numbers = [number for number in range(len(THINGS) * len(PRAISE + BLAME)) if is_new(number) == new]
    return [instruction(number) for number in rng.choices(numbers, k=count)]


def demonstration(asked: str, rng: random.Random) -> str:
    """The answer of a person to an instruction: a review of one clause."""
    thing, word, _ = asked.split()
    very = "very " if rng.random() < VERY else ""
    return f"{rng.choice(OWNERS)} {thing} was {very}{word} ."


def follows(asked: str, answer: str) -> bool:
    """Whether an answer does what was asked: a review of one clause, with this thing and this word."""
    thing, word, end = asked.split()
    words = answer.split()
    return points(answer) is not None and words[1] == thing and words[-2:] == [word, end] and len(words) <= 6


def demonstration_entropy() -> float:
    """The entropy of a demonstration given its instruction, in nats a word: it is free in its owner and in "very"."""
    return (math.log(len(OWNERS)) - VERY * math.log(VERY) - (1 - VERY) * math.log(1 - VERY)) / (5 + VERY)


# Arrays ---------------------------------------------------------------------------------------------------------------


def encode(texts: Sequence[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the words of each text, padded on the right, and a mask of them. [B, T] int32, [B, T] bool."""
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        numbers = [NUMBER[word] for word in text.split()][:length]
        row[: len(numbers)] = numbers
    return tokens, tokens > 0


def decode(tokens: np.ndarray, mask: np.ndarray | None = None) -> list[str]:
    """The text of each row of tokens, [B, T], up to and with its end."""
    mask = np.asarray(tokens) > 0 if mask is None else mask
    return [" ".join(WORDS[i] for i in row[on]) for row, on in zip(np.asarray(tokens), np.asarray(mask), strict=True)]


def documents(texts: Sequence[str]) -> Tokens:
    """A batch to train a language model on: it learns every word of each text but the first."""
    tokens, mask = encode(texts)
    target = mask.copy()
    target[:, 0] = False
    return Tokens(tokens=tokens, segment=mask.astype(np.int32), target=target)


def batches(texts: Sequence[str], size: int, seed: int) -> Iterator[list[str]]:
    """Random batches of the texts, without end."""
    rng = random.Random(f"batches/{seed}")
    while True:
        yield rng.choices(texts, k=size)


def asked(texts: Sequence[str]) -> Prompts:
    """Texts of at most `OPENING` words as prompts, which a model goes on with."""
    tokens, mask = encode(texts, OPENING)
    return Prompts(tokens=tokens, mask=mask, index=np.arange(len(texts), dtype=np.int32))


def openings(count: int, seed: int | str) -> list[str]:
    """Random openings, such as "the soup was"."""
    rng = random.Random(f"prompts/{seed}")
    return [f"{rng.choice(OWNERS)} {rng.choice(THINGS)} was" for _ in range(count)]


def prompts(count: int, seed: int | str) -> Prompts:
    """Random openings as prompts."""
    return asked(openings(count, seed))


# People ---------------------------------------------------------------------------------------------------------------


def rivals(count: int, answers: int, seed: int | str) -> list[list[str]]:
    """So many reviews with the same opening, for each of `count` openings."""
    rng = random.Random(f"rivals/{seed}")
    groups = []
    for _ in range(count):
        opening = [rng.choice(OWNERS), rng.choice(THINGS)]
        groups.append([" ".join([*opening, *review(rng).split()[2:]]) for _ in range(answers)])
    return groups


def rankings(texts: Sequence[Sequence[str]], ranks: Sequence[Sequence[int]]) -> Rankings:
    """A batch to train a reward model on: K whole reviews of the same opening a row, and their ranks (0 is best)."""
    each = [encode(row) for row in texts]
    return Rankings(
        tokens=np.stack([tokens for tokens, _ in each]),
        mask=np.stack([mask for _, mask in each]),
        start=np.full(len(each), OPENING, np.int32),
        rank=np.array(ranks, np.int32),
    )


def rank(texts: Sequence[str], rng: random.Random, slips: float = 0.1) -> list[int]:
    """The ranks that a person gives these reviews: kinder is better, equally kind is a tie.

    With probability `slips` the person's eye slips, and sees a review as half kinder or less kind than it is.
    """
    seen = [kindness(text) + (rng.choice((-0.5, 0.5)) if rng.random() < slips else 0.0) for text in texts]
    return [sum(other > one + 1e-6 for other in seen) for one in seen]
