"""How answers are measured: each measure as it is published, so that its numbers can be put beside others'.

Measures of one answer are numbers from 0 to 1. Measures of a whole evaluation are made of them by `score`, which adds
a standard error and an interval.
"""

import collections
import dataclasses
import math
import re
import string
from collections.abc import Hashable, Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhf_jax.data import gsm8k
from rlhf_jax.types import InputError

Numbers = Sequence[int | float] | np.ndarray

# -- options, by log-probability ---------------------------------------------------------------------------------------


def best(logp: Numbers) -> int:
    """The number of the option with the highest log-probability, the first of equal ones."""
    return int(np.argmax(logp))


def best_by_characters(logp: Numbers, options: Sequence[str]) -> int:
    """`best` of the log-probabilities divided by the characters of the options as listed, without the joining space."""
    return best([total / len(option) for total, option in zip(logp, options, strict=True)])


# -- text --------------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """The text as SQuAD compares it (arXiv:1606.05250): lower case, without punctuation, articles and double spaces.

    Where nothing would be left, articles stay, as of the option "(A)", and then punctuation, as of the answer "+".
    """
    lower = text.lower()
    plain = lower.translate(_PUNCTUATION)
    kept = (" ".join(one.split()) for one in (_ARTICLES.sub(" ", plain), plain, lower))
    return next(filter(None, kept), "")


def exact(text: str, answers: Sequence[str]) -> float:
    """Whether the text is any of the answers, all of them normalised."""
    return float(normalize(text) in map(normalize, answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the normalised words, for the answer with which it is highest."""
    return max(_f1(normalize(text).split(), normalize(answer).split()) for answer in answers)


def _f1(said: list[str], answer: list[str]) -> float:
    common = sum((collections.Counter(said) & collections.Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def rouge(text: str, answers: Sequence[str]) -> float:
    """The F-measure of the longest common subsequence, ROUGE-L with stemming, highest of all answers."""
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(answer, text)["rougeL"].fmeasure for answer in answers)


def bleu(text: str, answers: Sequence[str]) -> float:
    """The BLEU of one text against all its answers, smoothed as sacreBLEU does for sentences."""
    return _library("sacrebleu", "sacrebleu").sentence_bleu(text, list(answers)).score / 100


def _library(module: str, package: str) -> Any:
    import importlib  # here, like what it imports: few evaluations measure a summary or a translation

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this metric needs {package}: pip install 'rlhf_jax[eval]'") from error


# -- what an answer says -----------------------------------------------------------------------------------------------

_STATED = re.compile(r"answer is:?\s+(.+?)(?=\.?\s*(?:\n|\Z)|\.\s)", re.IGNORECASE | re.DOTALL)
_MARKED = re.compile(r"(?:####|answer is:?)\s*\$?([-\N{MINUS SIGN}]?\$?[\d.,]+)", re.IGNORECASE)


def stated(text: str) -> str | None:
    """The words after the last "answer is" of a text, to the end of the sentence; None if the text does not say it."""
    found = _STATED.findall(text)
    return found[-1].strip().strip("*\"'") if found else None


def named(text: str, options: Sequence[str]) -> str | None:
    """The option that a text names last, as whole words; None if it names none."""
    places = {
        option: max((match.start() for match in _whole(option).finditer(text)), default=-1)
        for option in sorted(options, key=len)
    }
    option = max(places, key=lambda one: (places[one], len(one)))
    return option if places[option] >= 0 else None


def option(text: str, options: Sequence[str]) -> str | None:
    """The option that a text is, normalised, or else the one that it names last."""
    same = (one for one in options if normalize(one) == normalize(text))
    return next(same, None) or named(text, options)


def _whole(option: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)


def number(text: str, form: Literal["strict", "flexible"]) -> Decimal | None:
    """The number that is the answer: what stands behind the last "####" or "answer is", or flexibly the last of all.

    "1,000", "$1000" and "1000.0" are the same number. None if there is no such number.
    """
    if form == "flexible":
        return gsm8k.final_number(text.replace(gsm8k.MARK, " "))
    marked = _MARKED.findall(text)
    return gsm8k.final_number(marked[-1]) if marked else None


# -- several samples ---------------------------------------------------------------------------------------------------


def majority(votes: Sequence[Hashable | None], gold: Sequence[Hashable], tie: Literal["random", "first"]) -> float:
    """Whether the answer with the most votes is right (self-consistency, arXiv:2203.11171); None does not vote.

    Among several with as many votes, "random" is the expectation of drawing one, "first" takes that first voted for.
    """
    counts = collections.Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    modes = [vote for vote, count in counts.items() if count == most]  # in the order of their first votes
    return float(modes[0] in gold) if tie == "first" else sum(mode in gold for mode in modes) / len(modes)


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k samples is right, estimated without bias from more of them (arXiv:2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


# -- probabilities -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy agree (arXiv:1706.04599), over bins ((m - 1) / M, m / M]; 0 is in the first."""

    count: Int[np.ndarray, "M"]
    accuracy: Float[np.ndarray, "M"]  # the mean of each bin, NaN where it is empty
    confidence: Float[np.ndarray, "M"]  # likewise

    @property
    def expected_error(self) -> float:
        """The mean distance of a bin's accuracy from its confidence, each answer counting once."""
        gap = np.abs(self.accuracy - self.confidence)[self.count > 0]
        return float(gap @ self.count[self.count > 0] / self.count.sum())

    @property
    def largest_error(self) -> float:
        """The largest distance in a bin that is not empty."""
        return float(np.nanmax(np.abs(self.accuracy - self.confidence)))


def calibration(confidence: Float[np.ndarray, "B"], correct: Bool[np.ndarray, "B"], bins: int = 10) -> Calibration:
    """How the confidence in each answer agrees with how many are correct."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights, bins) for weights in (correct.astype(float), confidence))
    accuracy, mean = (np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for total in sums)
    return Calibration(count=count, accuracy=accuracy, confidence=mean)


def brier(confidence: Float[np.ndarray, "B"], correct: Bool[np.ndarray, "B"]) -> float:
    """The mean squared distance of confidence from correctness."""
    return float(np.mean((confidence - correct) ** 2))


def bits_per_byte(nll: Sequence[float], texts: Sequence[str]) -> float:
    """The bits that a model needs for a byte of UTF-8, over all texts together; `nll` is of whole texts, in nats."""
    return math.fsum(nll) / (math.log(2) * sum(len(text.encode()) for text in texts))


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over questions, and how far it would vary with other questions."""

    value: float
    error: float  # standard error
    low: float  # the interval of 95 %
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


RESAMPLES = 2000


def score(total: Numbers, count: Numbers | None = None, seed: int = 0) -> Score:
    """The sum of `total` by that of `count` (default: one a question), with errors by bootstrap over the questions.

    What belongs to one question, such as several samples, is drawn together: `total` is its sum, `count` their number.
    """
    totals = np.asarray(total, float)
    counts = np.ones(len(totals)) if count is None else np.asarray(count, float)
    rng, size = np.random.default_rng(seed), len(totals)
    means = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        drawn = rng.integers(0, size, size)
        means[n] = totals[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return Score(float(totals.sum() / counts.sum()), float(means.std()), float(low), float(high))
