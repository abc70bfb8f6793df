"""Scalings of RoPE, each a class: how a model reads further than the context that its RoPE was trained for.

A scaling replaces the angles by which one token more rotates each pair of features, slowest pair last, and may multiply
cosine and sine by a number, `magnitude`.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from rlhf_jax.settings import Count, Positive, Settings


@dataclasses.dataclass(frozen=True)
class LinearScaling(Settings):
    """Position interpolation (arXiv:2306.15595): every wavelength grows by one factor."""

    factor: Positive

    magnitude: ClassVar[float] = 1.0

    def frequencies(self, unscaled: np.ndarray, theta: float, columns: int) -> np.ndarray:
        return unscaled / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Settings):
    """Llama 3's: wavelengths beyond the context that RoPE was trained for grow, those well inside stay."""

    factor: Positive  # by which the longest are
    low: Positive  # from original_length / low on, wavelengths are the longest,
    high: Positive  # up to original_length / high they are as they were, and in between they go from one to the other
    original_length: Count  # tokens

    magnitude: ClassVar[float] = 1.0

    def frequencies(self, unscaled: np.ndarray, theta: float, columns: int) -> np.ndarray:
        rotations = self.original_length * unscaled / (2 * np.pi)  # within the original context
        kept = np.clip((rotations - self.low) / (self.high - self.low), 0.0, 1.0)
        return unscaled * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(Settings):
    """YaRN (arXiv:2309.00071): a ramp over the pairs of features, from those that stay to those that grow."""

    factor: Positive  # by which the longest wavelengths grow
    original_length: Count  # tokens
    beta_fast: Positive = 32.0  # pairs that turn more often within the original context stay as they are
    beta_slow: Positive = 1.0  # pairs that turn less often grow by the whole factor
    attention_factor: Positive | None = None  # the magnitude; None is 0.1 ln(factor) + 1
    truncate: bool = True  # the ramp's bounds are rounded down and up to whole pairs

    @property
    def magnitude(self) -> float:
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    def frequencies(self, unscaled: np.ndarray, theta: float, columns: int) -> np.ndarray:
        pairs = len(unscaled)

        def pair(turns: float) -> float:
            """The pair of features, not a whole number, that turns so often within the original context."""
            return pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)  # as published: the last feature, not the last pair
        ramp = np.clip((np.arange(pairs) - first) / (last - first or 0.001), 0.0, 1.0)
        return unscaled * ((1 - ramp) + ramp / self.factor)


@dataclasses.dataclass(frozen=True)
class LongScaling(Settings):
    """LongRoPE (arXiv:2402.13753): a factor for each pair of features, found by search; one set serves short texts.

    Which set serves is decided by how many columns a row or a cache has, and not by how many of them are real: then a
    token's logits do not depend on what follows it. A model is to be sampled from, scored and trained with columns on
    one side of original_length.
    """

    short: tuple[Positive, ...]  # by which wavelengths grow where there are at most original_length columns
    long: tuple[Positive, ...]  # and beyond
    original_length: Count  # tokens
    attention_factor: Positive  # the magnitude, for either set

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def frequencies(self, unscaled: np.ndarray, theta: float, columns: int) -> np.ndarray:
        return unscaled / np.array(self.long if columns > self.original_length else self.short)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling
