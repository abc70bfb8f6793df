"""How far people agree: with each other, with themselves, and with answers that are known.

Labels are a table of ratings, a row a person and a column a unit; NaN marks a unit that the person did not rate. Units
of rankings are pairs of responses (`comparisons`), labelled FIRST, SECOND or TIE; ratings from 1 to 7 are a table as
they are. A table has a cell for each person and unit, so a large store is summed up in counts instead, the number of
people by unit and value [U, V] (`agreement_of`, `estimate_alpha`, `estimate_kappa`). These measures come from sums over
units, so counts that are too many for one array are added up a few at a time (`cases`, `alpha_sums`, `kappa_sums`).
A measure that these labels leave undefined raises `Undefined`, so that no NaN is ever shown as a number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

FIRST, SECOND, TIE = 0, 1, 2  # which response of a pair is better
NORMAL_95 = 1.959963984540054  # quantile of the normal distribution at 97.5 %: intervals of 95 %
GROUPS = 500  # at most, that are drawn again for an interval, so that its cost does not grow with the labels
_AT_ONCE = 100  # draws, so that little memory is needed

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["none", "linear", "quadratic"]
Ranks = Sequence[int]  # the rank of each response: smaller is better, equal is a tie, -1 is absent
Rankings = Mapping[str, Mapping[str, Ranks]]  # by person and item
Table = np.ndarray  # [R, U] float: what person r says of unit u, NaN where nothing
Why = Literal["no_overlap", "all_same", "no_repeat", "no_gold", "no_cases", "not_rated"]  # a measure is undefined


class Undefined(ValueError):
    """A measure has no value for these labels. The message is one line: the measure, the reason, what would help."""

    def __init__(self, message: str, why: Why = "no_cases"):
        super().__init__(message)
        self.why = why


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
class Estimate:
    """A coefficient, 1 at full agreement and 0 at that of chance, with its interval of 95 %."""

    value: float
    lower: float
    upper: float


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


def compare(ranks: Ranks | np.ndarray) -> np.ndarray:
    """The label of each pair i < j of responses: FIRST, SECOND, TIE, or NaN where one is absent. [..., K (K - 1) / 2].

    `ranks` are those of one ranking, or of many, [..., K].
    """
    rank = np.asarray(ranks, float)
    i, j = np.triu_indices(rank.shape[-1], 1)
    first, second = rank[..., i], rank[..., j]
    label = np.where(first == second, TIE, np.where(first < second, FIRST, SECOND))
    return np.where((first < 0) | (second < 0), np.nan, label)


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
    counts = np.stack([np.sum(labels == label, axis=0) for label in (FIRST, SECOND, TIE)], axis=1)  # [U, 3] people
    if np.sum(counts) != np.sum(~np.isnan(labels)):
        raise ValueError(f"labels of pairs: expected {FIRST} (first), {SECOND} (second), {TIE} (tie) or NaN")
    if person is None:
        return agreement_of(counts)
    said = ~np.isnan(labels[person])
    return agreement_of(counts[said], labels[person, said].astype(int))


def agreement_of(counts: np.ndarray, own: np.ndarray | None = None) -> Agreement:
    """`pairwise_agreement` from the number of people by pair of responses and label, [U, 3].

    With `own` [U], one person's labels, which the counts include, only the cases of this person and one other.
    """
    return agreement_from(cases(counts, own).sum(axis=0))


def agreement_from(found: np.ndarray) -> Agreement:
    """`agreement_of` from the sums of `cases` [4]."""
    strict, both_tie, halves, against = map(int, found)
    n = strict + both_tie + halves + against
    if not n:
        raise Undefined(
            "agreement is undefined: no pair of responses was compared by two people; raise the overlap", "no_overlap"
        )
    return Agreement(
        without_ties=wilson(strict, strict + against) if strict + against else None,
        ties_as_label=wilson(strict + both_tie, n),
        ties_as_half=wilson(strict + both_tie + halves / 2, n),
    )


def agreement_by(counts: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """The share of cases in which two people agree, a tie as half, by item [I]; NaN where there is no case.

    `counts` [U, 3] are of pairs of responses, `item` [U] is the number of the item of each.
    """
    strict, both_tie, halves, against = cases(counts).T
    agreed = np.bincount(item, strict + both_tie + halves / 2, items)
    total = np.bincount(item, strict + both_tie + halves + against, items)
    return np.divide(agreed, total, out=np.full(items, np.nan), where=total > 0)


def cases(counts: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """The cases by unit in which two people choose the same, both tie, exactly one ties, choose opposite ones. [U, 4].

    With `own` [U], as in `agreement_of`.
    """
    first, second, tie = np.asarray(counts).T
    if own is None:
        same, both_tie = (first * (first - 1) + second * (second - 1)) // 2, tie * (tie - 1) // 2
        return np.stack([same, both_tie, tie * (first + second), first * second], axis=1)
    theirs = np.where(own == FIRST, first, np.where(own == SECOND, second, tie)) - 1  # others who say the same
    ties = own == TIE
    strict = np.where(own == FIRST, second, first)  # others who choose the opposite
    found = (
        np.where(ties, 0, theirs),
        np.where(ties, theirs, 0),
        np.where(ties, first + second, tie),
        np.where(ties, 0, strict),
    )
    return np.stack(found, axis=1)


def self_agreement(first: Sequence[Ranks], second: Sequence[Ranks]) -> Agreement:
    """How often one person says the same again: the ranks of each repeated item, the first time and the second.

    Raises Undefined if no item was repeated.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rankings and {len(second)} repeats: expected a repeat of each")
    if not first:
        raise Undefined("self-agreement is undefined: the person was shown no item twice", "no_repeat")
    times = {when: {str(item): ranks for item, ranks in enumerate(each)} for when, each in enumerate((first, second))}
    return pairwise_agreement(comparisons({"first": times[0], "second": times[1]})[1])


def matched(known: Ranks, said: Ranks, ties: bool) -> tuple[float, int]:
    """How many pairs of responses are ordered as is known, a tie on one side as half, and out of how many.

    Pairs that the known ranking ties count only with `ties`.
    """
    if len(known) != len(said):
        raise ValueError(f"{len(said)} ranks, {len(known)} are known: expected as many ranks as the known ranking has")
    wanted, given = compare(known), compare(said)
    counted = ~np.isnan(wanted) & ~np.isnan(given) & (ties | (wanted != TIE))
    wanted, given = wanted[counted], given[counted]
    halves = (wanted == TIE) ^ (given == TIE)
    return float(np.sum(wanted == given) + np.sum(halves) / 2), len(wanted)


def gold_accuracy(rankings: Sequence[Ranks], gold: Sequence[Ranks]) -> Share:
    """The share of pairs that a person orders as the known ranking of each item does; a tie counts as half.

    Pairs that the known ranking ties are left out. Raises Undefined if none is left.
    """
    found = [matched(known, said, ties=False) for said, known in zip(rankings, gold, strict=True)]
    pairs = sum(n for _, n in found)
    if not pairs:
        raise Undefined(
            "gold accuracy is undefined: the person was shown no gold item that orders its responses", "no_gold"
        )
    return wilson(sum(agreed for agreed, _ in found), pairs)


def fleiss_kappa(counts: Sequence[Sequence[int]] | np.ndarray) -> float:
    """Fleiss' kappa (Fleiss 1971) from the number of people by unit (row) and category (column).

        (p - p_chance) / (1 - p_chance)

    p is the mean, over units, of the share of pairs of people who agree; p_chance the sum of the squared shares of the
    categories. Units may have different numbers of people; one with fewer than two is left out. Raises Undefined if no
    unit is left, or if all chose one category.
    """
    given = _counts(counts)
    return _kappa(kappa_sums(given, np.zeros(len(given), int), 1))


def estimate_kappa(
    counts: Sequence[Sequence[int]] | np.ndarray,
    cluster: np.ndarray | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`fleiss_kappa` with the interval that `estimate_alpha` describes."""
    given = _counts(counts)
    kept = given.sum(axis=1) >= 2
    group, groups = _groups(np.arange(len(given)) if cluster is None else cluster, kept, seed)
    return kappa_from(kappa_sums(given[kept], group, groups), draws, seed)


def kappa_from(sums: np.ndarray, draws: int = 1000, seed: int = 0) -> Estimate:
    """`estimate_kappa` from the sums of each group [G, 2 + V], see `kappa_sums`."""
    return Estimate(_kappa(sums), *_interval(_kappas(_drawn(sums, draws, seed))))


def kappa_sums(counts: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """The terms of Fleiss' kappa by group of units: the units, the shares of agreeing pairs, the counts. [G, 2 + V].

    Units with fewer than two people are left out.
    """
    people = counts.sum(axis=1)
    counts, group, people = counts[people >= 2], group[people >= 2], people[people >= 2]
    share = np.sum(counts * (counts - 1), axis=1) / (people * (people - 1))
    terms = (np.ones(len(counts)), share, *counts.T)
    return np.stack([np.bincount(group, term, groups) for term in terms], axis=1)


def _counts(counts: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    given = np.asarray(counts, float)
    if given.ndim != 2:
        raise ValueError(f"counts of shape {given.shape}: expected a row a unit and a column a category")
    return given


def _kappa(sums: np.ndarray) -> float:
    """Fleiss' kappa from the sums of each group [G, 2 + V]."""
    total = sums.sum(axis=0)
    if not total[0]:
        raise Undefined("Fleiss' kappa is undefined: no unit was rated by two people; raise the overlap", "no_overlap")
    kappa = _kappas(total[None])[0]
    if np.isnan(kappa):
        raise Undefined("Fleiss' kappa is undefined: all ratings are the same", "all_same")
    return float(kappa)


def _kappas(sums: np.ndarray) -> np.ndarray:
    """Fleiss' kappa from each of [D, 2 + V] sums; NaN where all ratings are the same."""
    observed, total = sums[:, 1] / sums[:, 0], sums[:, 2:]
    chance = np.sum((total / total.sum(axis=1, keepdims=True)) ** 2, axis=1)
    varied = np.count_nonzero(total, axis=1) > 1
    return np.where(varied, (observed - chance) / np.where(varied, 1 - chance, 1), np.nan)


def count_labels(ratings: Sequence[Sequence[Any]] | np.ndarray) -> np.ndarray:
    """The number of people by unit and value, from a table of ratings: what `fleiss_kappa` takes. [U, V]."""
    return _rated(ratings)[0]


def krippendorff_alpha(ratings: Sequence[Sequence[Any]] | np.ndarray, level: Level) -> float:
    """Krippendorff's alpha (Krippendorff 2011), 1 - observed / expected disagreement. `ratings` [R, U].

    Disagreement of values c and k: nominal [c != k], interval (c - k)^2, ordinal the squared number of ratings from c
    to k, those of c and k counted half. Units with fewer than two ratings are left out. Raises Undefined if no unit is
    left, or if all ratings are the same.
    """
    counts, values = _rated(ratings)
    return _alpha(alpha_sums(counts, np.zeros(len(counts), int), 1), values, level)


def alpha_interval(
    ratings: Sequence[Sequence[Any]] | np.ndarray, level: Level, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The interval of 95 % of `krippendorff_alpha`, see `estimate_alpha`. Raises Undefined as that does."""
    found = estimate_alpha(*_rated(ratings), level, draws=draws, seed=seed)
    return found.lower, found.upper


def estimate_alpha(
    counts: np.ndarray,
    values: np.ndarray,
    level: Level,
    cluster: np.ndarray | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`krippendorff_alpha` from the number of ratings by unit and value [U, V] and the values [V], with an interval.

    The interval is that of a bootstrap: clusters of units are drawn again with replacement, and their percentiles
    taken, those left out in which all ratings are the same. `cluster` [U] numbers what is drawn as one, such as the
    item that pairs belong to, because pairs of one ranking depend on each other; without it, each unit by itself. Of
    more than GROUPS clusters, GROUPS sums over clusters are drawn, which have the same spread. Raises Undefined as
    `krippendorff_alpha` does.
    """
    counts = np.asarray(counts, float)
    kept = counts.sum(axis=1) >= 2
    group, groups = _groups(np.arange(len(counts)) if cluster is None else cluster, kept, seed)
    return alpha_from(alpha_sums(counts[kept], group, groups), values, level, draws, seed)


def alpha_from(sums: np.ndarray, values: np.ndarray, level: Level, draws: int = 1000, seed: int = 0) -> Estimate:
    """`estimate_alpha` from the sums of each group [G, V (V + 1) / 2], see `alpha_sums`."""
    return Estimate(_alpha(sums, values, level), *_interval(_alphas(_drawn(sums, draws, seed), values, level)))


def alpha_sums(counts: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """How often two people's ratings of a unit are v and w, v <= w, by group of units. [G, V (V + 1) / 2].

    A unit with m ratings adds 1 / (m - 1) for each ordered pair of them; one with fewer than two is left out.
    """
    people = counts.sum(axis=1)
    counts, group, weight = counts[people >= 2], group[people >= 2], 1 / (people[people >= 2] - 1)
    pairs = np.transpose(np.triu_indices(counts.shape[1]))
    found = np.empty((groups, len(pairs)))
    for n, (v, w) in enumerate(pairs):
        found[:, n] = np.bincount(group, weight * (counts[:, v] * (counts[:, w] - (v == w))), groups)
    return found


def deal(clusters: int, seed: int = 0) -> np.ndarray:
    """The group of each cluster: one of its own for the first GROUPS, one at random for each that follows."""
    more = np.random.default_rng(seed).integers(0, GROUPS, max(0, clusters - GROUPS), np.int16)
    return np.concatenate([np.arange(min(clusters, GROUPS), dtype=np.int16), more])


def _groups(cluster: np.ndarray, kept: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """The group of each unit that is kept, to which its cluster is dealt, and the number of groups.

    Clusters without a unit that is kept are none.
    """
    found, number = np.unique(cluster[kept], return_inverse=True)
    return deal(len(found), seed)[number], min(len(found), GROUPS)


def _drawn(sums: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums over as many groups as there are, drawn with replacement, from the sums of each group. [D, F]."""
    times = _times(len(sums), draws, seed)
    return np.concatenate([times[n : n + _AT_ONCE].astype(float) @ sums for n in range(0, draws, _AT_ONCE)])


@functools.lru_cache(maxsize=16)  # all who judged many items have the same number of groups
def _times(groups: int, draws: int, seed: int) -> np.ndarray:
    """How often each group is drawn, by draw. [D, G]."""
    rng, times = np.random.default_rng(seed), np.empty((draws, groups), np.int16)
    for draw in times:
        draw[:] = np.bincount(rng.integers(0, groups, groups), minlength=groups)
    times.setflags(write=False)
    return times


def _interval(found: np.ndarray) -> tuple[float, float]:
    lower, upper = np.percentile(found[~np.isnan(found)], (2.5, 97.5))
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
    """The number of ratings by unit and value [U, V], and the values [V] in order."""
    found = table(ratings)
    values = np.unique(found[~np.isnan(found)])
    return np.sum(found[:, :, None] == values, axis=0), values


def _alpha(sums: np.ndarray, values: np.ndarray, level: Level) -> float:
    """Krippendorff's alpha from the sums of each group [G, V (V + 1) / 2]."""
    total = sums.sum(axis=0)
    if not total.any():
        raise Undefined(
            "Krippendorff's alpha is undefined: no unit was rated by two people; raise the overlap", "no_overlap"
        )
    alpha = _alphas(total[None], values, level)[0]
    if np.isnan(alpha):
        raise Undefined("Krippendorff's alpha is undefined: all ratings are the same", "all_same")
    return float(alpha)


def _alphas(sums: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    """Krippendorff's alpha from each of [D, V (V + 1) / 2] sums; NaN where all ratings are the same."""
    first, second = np.triu_indices(len(values))
    coincidence = np.empty((len(sums), len(values), len(values)))
    coincidence[:, first, second] = coincidence[:, second, first] = sums
    total = coincidence.sum(axis=2)
    n = total.sum(axis=1)
    distance = _distance(level)(values, total)
    expected = np.einsum("dv,dvw,dw->d", total, distance, total) / (n * (n - 1))
    observed = np.sum(coincidence * distance, axis=(1, 2)) / n
    varied = expected > 0
    return np.where(varied, 1 - observed / np.where(varied, expected, 1), np.nan)


def _distance(level: Level) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The disagreement [D, V, V] of each two values, from the values [V] and their numbers of ratings [D, V]."""

    def ordinal(values: np.ndarray, total: np.ndarray) -> np.ndarray:
        place = np.cumsum(total, axis=1) - total / 2
        return (place[:, :, None] - place[:, None, :]) ** 2

    def same(distance: np.ndarray, total: np.ndarray) -> np.ndarray:
        return np.broadcast_to(distance, (len(total), *distance.shape))

    return {
        "nominal": lambda values, total: same(1.0 - np.eye(len(values)), total),
        "ordinal": ordinal,
        "interval": lambda values, total: same(np.subtract.outer(values, values) ** 2, total),
    }[level]
