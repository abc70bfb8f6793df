"""How far people agree: with each other, with themselves, and with answers that are known.

Labels are a table of ratings, a row a person and a column a unit; NaN marks a unit that the person did not rate. Units
of rankings are pairs of responses (`comparisons`), labelled FIRST, SECOND or TIE; ratings from 1 to 7 are a table as
they are.
A measure that these labels leave undefined raises `Undefined`, so that no NaN is ever shown as a number.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

FIRST, SECOND, TIE = 0, 1, 2  # which response of a pair is better
NORMAL_95 = 1.959963984540054  # quantile of the normal distribution at 97.5 %: intervals of 95 %

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["none", "linear", "quadratic"]
Ranks = Sequence[int]  # the rank of each response: smaller is better, equal is a tie, -1 is absent
Rankings = Mapping[str, Mapping[str, Ranks]]  # by person and item
Table = np.ndarray  # [R, U] float: what person r says of unit u, NaN where nothing


class Undefined(ValueError):
    """A measure has no value for these labels. The message is one line: the measure, the reason, what would help."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A share with its interval of 95 %. `n` is the number of cases that it is a share of."""

    value: float
    lower: float
    upper: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.lower:.1f} to {100 * self.upper:.1f} %, n={self.n})"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often two judges say the same of a pair of responses, with ties counted in three ways."""

    without_ties: Share | None  # share of equal labels where neither says tie; None if there is no such case
    ties_as_label: Share  # share of equal labels; a tie equals only a tie
    ties_as_half: Share  # mean of 1 for equal labels, 1/2 where exactly one is a tie, 0 for opposite ones


@dataclasses.dataclass(frozen=True)
class Kappa:
    """Cohen's kappa, with the share of equal labels and the share that chance would give."""

    kappa: float
    observed: float
    chance: float


def wilson(successes: int | float, n: int, z: float = NORMAL_95) -> Share:
    """The share `successes` / `n` with Wilson's score interval (Wilson 1927), without continuity correction.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Half a success, for a tie, goes into the binomial formula as it is; the interval is then a little too wide. It takes
    the cases to be independent: pairs of one ranking are not, so theirs is a little too narrow. Raises Undefined if n
    is 0.
    """
    if n < 1:
        raise Undefined("a share of no cases is undefined: more labels are needed")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected between 0 and {n}")
    p, spread = successes / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), n)


def compare(ranks: Ranks) -> np.ndarray:
    """The label of each pair i < j of responses: FIRST, SECOND, TIE, or NaN where one is absent. [K (K - 1) / 2]."""
    rank = np.asarray(ranks, float)
    i, j = np.triu_indices(len(rank), 1)
    label = np.where(rank[i] == rank[j], TIE, np.where(rank[i] < rank[j], FIRST, SECOND)).astype(float)
    return np.where((rank[i] < 0) | (rank[j] < 0), np.nan, label)


def comparisons(rankings: Rankings) -> tuple[list[str], Table]:
    """The people, and a table of their labels of all pairs of responses. Items ranked by one person are left out.

    Raises ValueError, which names the item, if two people ranked different numbers of responses to it.
    """
    people = list(rankings)
    ranked_by: dict[str, list[int]] = {}
    for row, person in enumerate(people):
        for item in rankings[person]:
            ranked_by.setdefault(item, []).append(row)
    parts = [np.empty((len(people), 0))]
    for item, rows in ranked_by.items():
        if len(rows) < 2:
            continue
        sizes = {people[row]: len(rankings[people[row]][item]) for row in rows}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"item {item}: people ranked different numbers of responses: {sizes}")
        k = next(iter(sizes.values()))
        part = np.full((len(people), k * (k - 1) // 2), np.nan)
        for row in rows:
            part[row] = compare(rankings[people[row]][item])
        parts.append(part)
    return people, np.concatenate(parts, axis=1)


def table(ratings: Sequence[Sequence[Any]] | np.ndarray) -> Table:
    """Ratings by person and unit as a table; None is a missing one."""
    found = np.array(ratings, float)  # None becomes NaN
    if found.ndim != 2:
        raise ValueError(f"ratings of shape {found.shape}: expected a row for each person, all of one length")
    return found


def pairwise_agreement(ratings: Sequence[Sequence[Any]] | np.ndarray, person: int | None = None) -> Agreement:
    """How often two people agree on a pair of responses, over all two people and all pairs that both compared.

    `ratings` [R, U] are labels FIRST, SECOND or TIE, see `comparisons`. With `person`, a row, only the cases of this
    person and one other. Raises Undefined if there is no case.
    """
    labels = table(ratings)
    counts = np.stack([np.sum(labels == label, axis=0) for label in (FIRST, SECOND, TIE)])  # [3, U] people
    if np.sum(counts) != np.sum(~np.isnan(labels)):
        raise ValueError(f"labels of pairs: expected {FIRST} (first), {SECOND} (second), {TIE} (tie) or NaN")
    if person is None:
        same = counts * (counts - 1) // 2  # cases in which both say so
        tied_once = counts[TIE] * (counts[FIRST] + counts[SECOND])
        opposite = counts[FIRST] * counts[SECOND]
    else:
        own = np.stack([labels[person] == label for label in (FIRST, SECOND, TIE)])
        others = counts - own
        same = own * others
        tied_once = own[TIE] * (others[FIRST] + others[SECOND]) + (own[FIRST] | own[SECOND]) * others[TIE]
        opposite = own[FIRST] * others[SECOND] + own[SECOND] * others[FIRST]
    strict, both_tie = int(np.sum(same[[FIRST, SECOND]])), int(np.sum(same[TIE]))
    halves, against = int(np.sum(tied_once)), int(np.sum(opposite))
    n = strict + both_tie + halves + against
    if not n:
        raise Undefined("agreement is undefined: no pair of responses was compared by two people; raise the overlap")
    return Agreement(
        without_ties=wilson(strict, strict + against) if strict + against else None,
        ties_as_label=wilson(strict + both_tie, n),
        ties_as_half=wilson(strict + both_tie + halves / 2, n),
    )


def self_agreement(first: Sequence[Ranks], second: Sequence[Ranks]) -> Agreement:
    """How often one person says the same again: the ranks of each repeated item, the first time and the second.

    Raises Undefined if no item was repeated.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rankings and {len(second)} repeats: expected a repeat of each")
    if not first:
        raise Undefined("self-agreement is undefined: the person was shown no item twice")
    times = {when: {str(item): ranks for item, ranks in enumerate(each)} for when, each in enumerate((first, second))}
    return pairwise_agreement(comparisons({"first": times[0], "second": times[1]})[1])


def gold_accuracy(rankings: Sequence[Ranks], gold: Sequence[Ranks]) -> Share:
    """The share of pairs that a person orders as the known ranking of each item does; a tie counts as half.

    Pairs that the known ranking ties are left out. Raises Undefined if none is left.
    """
    if [len(ranks) for ranks in rankings] != [len(ranks) for ranks in gold]:
        raise ValueError("gold accuracy needs as many ranks of each item as its known ranking has")
    said, known = (np.concatenate([np.empty(0), *map(compare, each)]) for each in (rankings, gold))
    counted = (known != TIE) & ~np.isnan(known) & ~np.isnan(said)
    said, known = said[counted], known[counted]
    if not len(known):
        raise Undefined("gold accuracy is undefined: the person was shown no gold item that orders its responses")
    return wilson(float(np.sum(said == known) + np.sum(said == TIE) / 2), len(known))


def fleiss_kappa(counts: Sequence[Sequence[int]] | np.ndarray) -> float:
    """Fleiss' kappa (Fleiss 1971) from the number of people by unit (row) and category (column).

        (p - p_chance) / (1 - p_chance)

    p is the mean, over units, of the share of pairs of people who agree; p_chance the sum of the squared shares of the
    categories. Units may have different numbers of people; one with fewer than two is left out. Raises Undefined if no
    unit is left, or if all chose one category.
    """
    given = np.array(counts, float)
    if given.ndim != 2:
        raise ValueError(f"counts of shape {given.shape}: expected a row a unit and a column a category")
    given = given[given.sum(axis=1) >= 2]
    if not len(given):
        raise Undefined("Fleiss' kappa is undefined: no unit was rated by two people; raise the overlap")
    people = given.sum(axis=1)
    share = given.sum(axis=0) / people.sum()
    if np.max(share) == 1:
        raise Undefined("Fleiss' kappa is undefined: all ratings are the same")
    observed = np.mean(np.sum(given * (given - 1), axis=1) / (people * (people - 1)))
    chance = float(np.sum(share**2))
    return float((observed - chance) / (1 - chance))


def count_labels(ratings: Sequence[Sequence[Any]] | np.ndarray) -> np.ndarray:
    """The number of people by unit and value, from a table of ratings: what `fleiss_kappa` takes. [U, V]."""
    found = table(ratings)
    values = np.unique(found[~np.isnan(found)])
    return np.sum(found[:, :, None] == values, axis=0)


def krippendorff_alpha(ratings: Sequence[Sequence[Any]] | np.ndarray, level: Level) -> float:
    """Krippendorff's alpha (Krippendorff 2011), 1 - observed / expected disagreement. `ratings` [R, U].

    Disagreement of values c and k: nominal [c != k], interval (c - k)^2, ordinal the squared number of ratings from c
    to k, those of c and k counted half. Units with fewer than two ratings are left out. Raises Undefined if no unit is
    left, or if all ratings are the same.
    """
    counts, values = _rated(ratings)
    return _alpha(counts, values, level)


def alpha_interval(
    ratings: Sequence[Sequence[Any]] | np.ndarray, level: Level, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The interval of 95 % of `krippendorff_alpha`, from units drawn again with replacement (percentiles).

    Draws in which all ratings are the same are left out. Raises Undefined as `krippendorff_alpha` does.
    """
    counts, values = _rated(ratings)
    _alpha(counts, values, level)  # undefined before anything is drawn
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, len(counts), len(counts)), minlength=len(counts))
        try:
            found.append(_alpha(counts, values, level, times))
        except Undefined:
            continue
    lower, upper = np.percentile(found, (2.5, 97.5))
    return float(lower), float(upper)


def cohen_kappa(first: Sequence[int], second: Sequence[int], categories: int, weights: Weights = "none") -> Kappa:
    """Cohen's kappa of two people (Cohen 1960, 1968), 1 - observed / expected disagreement.

    Labels are 0 to `categories` - 1; the disagreement of i and j is [i != j], |i - j| (linear) or (i - j)^2
    (quadratic). What is expected is from each person's own shares. Raises Undefined if both always say the same one.
    """
    a, b = np.asarray(first, int), np.asarray(second, int)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} labels and {len(b)}: expected two people's labels of the same items")
    if not len(a):
        raise Undefined("Cohen's kappa is undefined: the two people share no item")
    joint = np.zeros((categories, categories))
    np.add.at(joint, (a, b), 1 / len(a))
    by_chance = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    difference = np.abs(np.subtract.outer(np.arange(categories), np.arange(categories)))
    weight = {"none": difference > 0, "linear": difference, "quadratic": difference**2}[weights]
    if not np.any(by_chance * weight > 0):
        raise Undefined("Cohen's kappa is undefined: both people gave every item the same label")
    kappa = 1 - float(np.sum(joint * weight)) / float(np.sum(by_chance * weight))
    return Kappa(kappa, float(np.trace(joint)), float(np.trace(by_chance)))


def kendall_tau(first: Ranks, second: Ranks) -> float:
    """Kendall's tau-b of two rankings, (C - D) / sqrt(X Y).

    C and D are the pairs that both order, alike and oppositely; X and Y those that the first and the second order.
    Raises Undefined if a ranking is a single tie.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} ranks and {len(second)}: expected two rankings of the same responses")
    a, b = compare(first), compare(second)
    strict_a, strict_b = np.sum(a != TIE), np.sum(b != TIE)
    if not strict_a or not strict_b:
        raise Undefined("Kendall's tau is undefined: a ranking ties all responses")
    both = (a != TIE) & (b != TIE)
    return float(np.sum(both & (a == b)) - np.sum(both & (a != b))) / math.sqrt(float(strict_a) * float(strict_b))


def least_agreed(rankings: Rankings) -> list[tuple[str, float]]:
    """The items that two people ranked, and the share of cases in which two agree (a tie as half), lowest first."""
    by_item: dict[str, dict[str, dict[str, Ranks]]] = {}
    for person, items in rankings.items():
        for item, ranks in items.items():
            by_item.setdefault(item, {})[person] = {item: ranks}
    found = []
    for item, people in by_item.items():
        if len(people) > 1:
            labels = comparisons(people)[1]
            if np.any(np.sum(~np.isnan(labels), axis=0) > 1):
                found.append((item, pairwise_agreement(labels).ties_as_half.value))
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def _rated(ratings: Sequence[Sequence[Any]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of ratings by unit and value [U, V], of units with two or more, and the values [V] in order."""
    found = table(ratings)
    found = found[:, np.sum(~np.isnan(found), axis=0) >= 2]
    if not found.size:
        raise Undefined("Krippendorff's alpha is undefined: no unit was rated by two people; raise the overlap")
    values = np.unique(found[~np.isnan(found)])
    return np.sum(found[:, :, None] == values, axis=0).astype(float), values


def _alpha(counts: np.ndarray, values: np.ndarray, level: Level, times: np.ndarray | None = None) -> float:
    """Krippendorff's alpha from the number of ratings [U, V], each unit taken so many `times`."""
    weight = (1.0 if times is None else times) / (counts.sum(axis=1) - 1)
    coincidence = (counts * weight[:, None]).T @ counts - np.diag(weight @ counts)
    total = coincidence.sum(axis=1)
    n = total.sum()
    distance = _distance(level)(values, total)
    expected = float(total @ distance @ total) / (n * (n - 1))
    if expected <= 0:
        raise Undefined("Krippendorff's alpha is undefined: all ratings are the same")
    return 1 - float(np.sum(coincidence * distance)) / n / expected


def _distance(level: Level) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The disagreement [V, V] of each two values, as a function of the values and of their numbers of ratings."""

    def ordinal(values: np.ndarray, total: np.ndarray) -> np.ndarray:
        place = np.cumsum(total) - total / 2
        return np.subtract.outer(place, place) ** 2

    return {
        "nominal": lambda values, total: 1.0 - np.eye(len(values)),
        "ordinal": ordinal,
        "interval": lambda values, total: np.subtract.outer(values, values) ** 2,
    }[level]
