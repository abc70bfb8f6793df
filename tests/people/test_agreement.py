"""How far people agree: by hand, and against values computed elsewhere."""

import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.people.agreement import (
    FIRST,
    GROUPS,
    SECOND,
    TIE,
    Undefined,
    agreement_by,
    agreement_of,
    alpha_interval,
    cohen_kappa,
    compare,
    comparisons,
    count_labels,
    estimate_alpha,
    estimate_kappa,
    fleiss_kappa,
    gold_accuracy,
    kendall_tau,
    krippendorff_alpha,
    least_agreed,
    matched,
    pairwise_agreement,
    self_agreement,
    wilson,
)
from tests.oracles import Case, cases

NAN = np.nan


def test_no_jax_is_imported():
    """The pages start on a machine without an accelerator, in a second."""
    code = "import sys, rlhf_jax.people.agreement, rlhf_jax.people.strengths; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compare():
    np.testing.assert_array_equal(compare([0, 2, 0, 1]), [FIRST, TIE, FIRST, SECOND, SECOND, FIRST])
    np.testing.assert_array_equal(compare([5, -1, 2]), [NAN, SECOND, NAN])
    assert compare([1]).shape == (0,)


def test_comparisons():
    people, table = comparisons(
        {"ann": {"x": [0, 1, 1], "y": [0, 1], "alone": [0, 1]}, "bob": {"x": [1, 0, 0]}, "cy": {"y": [0, 0]}}
    )
    assert people == ["ann", "bob", "cy"]
    np.testing.assert_array_equal(table, [[FIRST, FIRST, TIE, FIRST], [SECOND, SECOND, TIE, NAN], [NAN, NAN, NAN, TIE]])
    with pytest.raises(
        ValueError, match=r"^item x: people ranked different numbers of responses: .*'ann': 2, 'bob': 3"
    ):
        comparisons({"ann": {"x": [0, 1]}, "bob": {"x": [0, 1, 2]}})


def test_pairwise_agreement_by_hand():
    # Pairs of people, a column: (F F), (F S), (F T), (T T), and three people (F F S), of whom one pair agrees.
    table = [[FIRST, FIRST, FIRST, TIE, FIRST], [FIRST, SECOND, TIE, TIE, FIRST], [NAN, NAN, NAN, NAN, SECOND]]
    found = pairwise_agreement(table)
    assert (found.without_ties.value, found.without_ties.n) == (2 / 5, 5)
    assert (found.ties_as_label.value, found.ties_as_label.n) == (3 / 7, 7)
    assert (found.ties_as_half.value, found.ties_as_half.n) == (3.5 / 7, 7)
    third = pairwise_agreement(table, person=2)  # meets the two others once
    assert (third.without_ties.value, third.ties_as_half.n) == (0.0, 2)
    first = pairwise_agreement(table, person=0)
    assert (first.without_ties.value, first.without_ties.n) == (2 / 4, 4)
    assert (first.ties_as_half.value, first.ties_as_half.n) == (3.5 / 6, 6)


def test_agreement_over_all_is_the_mean_over_people():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (5, 40)).astype(float)
    table[rng.random(table.shape) < 0.3] = NAN
    found, each = pairwise_agreement(table), [pairwise_agreement(table, person) for person in range(5)]
    for name in ("without_ties", "ties_as_label", "ties_as_half"):
        share, shares = getattr(found, name), [getattr(one, name) for one in each]
        assert 2 * share.n == sum(one.n for one in shares)  # each case is of two people
        assert 2 * share.n * share.value == pytest.approx(sum(one.n * one.value for one in shares))


def test_agreement_that_is_undefined():
    with pytest.raises(Undefined, match="no pair of responses was compared by two people"):
        pairwise_agreement([[FIRST, NAN], [NAN, TIE]])
    with pytest.raises(Undefined, match="compared by two people"):
        pairwise_agreement(comparisons({"ann": {"x": [0, 1]}})[1])
    with pytest.raises(Undefined, match="compared by two people"):
        pairwise_agreement([[FIRST, NAN, TIE], [NAN, TIE, TIE], [FIRST, NAN, NAN]], person=2).ties_as_label  # noqa: B018
        pairwise_agreement([[NAN], [TIE], [TIE]], person=0)
    assert pairwise_agreement([[TIE], [FIRST]]).without_ties is None
    with pytest.raises(ValueError, match=r"expected 0 \(first\)"):
        pairwise_agreement([[3], [3]])


def test_pairwise_agreement_oracle():
    case = Case("pairwise_agreement_ties")
    found = pairwise_agreement([case.raw["inputs"]["judge_a"], case.raw["inputs"]["judge_b"]])
    for name in ("without_ties", "ties_as_label", "ties_as_half"):
        assert getattr(found, name).value == pytest.approx(case.raw["expected"][name], abs=1e-12)
    assert found.without_ties.n == case.raw["expected"]["n_without_ties"]
    assert found.ties_as_label.n == case.raw["expected"]["n"]


@cases("annotator_rankings", "annotator_rankings_varying")
def test_rankings_oracle(case):
    raw = case.raw
    prompts, expected = raw["inputs"]["ranks"], raw["expected"]
    people = {
        str(p): {str(item): ranks[p] for item, ranks in enumerate(prompts) if p < len(ranks)}
        for p in range(max(map(len, prompts)))
    }
    table = comparisons(people)[1]
    found = pairwise_agreement(table)
    assert found.without_ties.value == pytest.approx(expected["agreement_without_ties"], abs=1e-12)
    assert found.ties_as_label.value == pytest.approx(expected["agreement_with_ties"], abs=1e-12)
    if "kappa" in expected:
        assert fleiss_kappa(count_labels(table)) == pytest.approx(expected["kappa"], abs=1e-12)


def test_self_agreement():
    found = self_agreement([[0, 1, 2], [0, 0]], [[0, 1, 1], [1, 1]])  # FFF T, then FFT T
    assert (found.without_ties.value, found.ties_as_label.value, found.ties_as_half.value) == (1.0, 0.75, 0.875)
    with pytest.raises(Undefined, match="shown no item twice"):
        self_agreement([], [])
    with pytest.raises(ValueError, match="expected a repeat of each"):
        self_agreement([[0, 1]], [])


def test_gold_accuracy():
    found = gold_accuracy([[0, 1, 1], [1, 0], [0, 1]], [[0, 1, 2], [0, 1], [2, 2]])
    assert (found.value, found.n) == ((2 + 0.5 + 0) / 4, 4)  # the tie of the known ranking is left out
    with pytest.raises(Undefined, match="no gold item that orders"):
        gold_accuracy([[0, 1]], [[0, 0]])
    with pytest.raises(Undefined, match="no gold item"):
        gold_accuracy([], [])
    with pytest.raises(ValueError, match="as many ranks"):
        gold_accuracy([[0, 1]], [[0, 1, 2]])


def test_matched():
    assert matched([0, 1, 2], [0, 1, 1], ties=False) == (2.5, 3)
    assert matched([0, 0, 1], [0, 1, 2], ties=False) == (2.0, 2)
    assert matched([0, 0, 1], [0, 1, 2], ties=True) == (2.5, 3)
    assert matched([0, 0], [1, 1], ties=True) == (1.0, 1) and matched([0, 0], [1, 1], ties=False) == (0.0, 0)
    with pytest.raises(ValueError, match="as many ranks"):
        matched([0, 1], [0, 1, 2], ties=True)


def test_counts_say_what_the_table_says():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((7, 60)) < 0.4, rng.integers(0, 3, (7, 60)).astype(float), NAN)
    counts = np.stack([np.sum(labels == label, axis=0) for label in (FIRST, SECOND, TIE)], axis=1)
    assert agreement_of(counts) == pairwise_agreement(labels)
    for person in range(7):
        pairs = [agreement_of(counts_of(labels[[person, other]])) for other in range(7) if other != person]
        found = pairwise_agreement(labels, person)
        n = [pair.ties_as_half.n for pair in pairs]
        assert found.ties_as_half.n == sum(n)
        mean = sum(pair.ties_as_half.value * m for pair, m in zip(pairs, n, strict=True)) / sum(n)
        assert found.ties_as_half.value == pytest.approx(mean)
    by_item = agreement_by(counts, np.arange(60) // 6, 10)
    assert by_item[3] == pytest.approx(pairwise_agreement(labels[:, 18:24]).ties_as_half.value)
    assert np.isnan(agreement_by(counts, np.zeros(60, int), 2)[1])


def counts_of(labels: np.ndarray) -> np.ndarray:
    return np.stack([np.sum(labels == label, axis=0) for label in (FIRST, SECOND, TIE)], axis=1)


def test_intervals_draw_clusters_and_their_cost_is_bounded():
    """Units that repeat each other say nothing new: drawn by cluster, the interval stays as wide."""
    rng = np.random.default_rng(2)
    truth = rng.integers(1, 8, 300)
    counts = count_labels(truth + rng.integers(-1, 2, (2, 300)))
    values, item = np.arange(counts.shape[1]), np.arange(300)
    for estimate in (lambda counts, cluster: estimate_alpha(counts, values, "ordinal", cluster), estimate_kappa):
        once, twice = estimate(counts, item), estimate(np.repeat(counts, 4, axis=0), np.repeat(item, 4))
        assert once.lower < once.value < once.upper
        assert twice.upper - twice.lower == pytest.approx(once.upper - once.lower, rel=0.01)
        alone = estimate(np.repeat(counts, 4, axis=0), None)
        assert alone.upper - alone.lower == pytest.approx((once.upper - once.lower) / 2, rel=0.15)
    many = np.tile(counts, (10, 1))  # more clusters than are drawn
    assert len(many) > GROUPS
    found = estimate_alpha(many, values, "ordinal")
    assert found.value == pytest.approx(estimate_alpha(counts, values, "ordinal").value, abs=1e-3)
    once = estimate_alpha(counts, values, "ordinal")
    assert found.upper - found.lower == pytest.approx((once.upper - once.lower) / 10**0.5, rel=0.15)


def test_the_reason_of_what_is_undefined_has_a_name():
    for why, measure in (
        ("no_overlap", lambda: agreement_of(np.array([[1, 0, 0]]))),
        ("no_overlap", lambda: estimate_alpha(np.array([[1, 0]]), np.arange(2), "ordinal")),
        ("no_overlap", lambda: estimate_kappa([[0, 1]])),
        ("all_same", lambda: estimate_alpha(np.array([[2, 0]]), np.arange(2), "nominal")),
        ("all_same", lambda: estimate_kappa([[2, 0]])),
        ("no_gold", lambda: gold_accuracy([], [])),
        ("no_repeat", lambda: self_agreement([], [])),
    ):
        with pytest.raises(Undefined) as caught:
            measure()
        assert caught.value.why == why


def test_wilson_by_hand():
    found = wilson(1, 2, z=2.0)
    assert found.value == 0.5
    half = 2 / 3 * np.sqrt(1 / 8 + 4 / 16)  # z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4 n^2)
    assert (found.lower, found.upper) == pytest.approx((0.5 - half, 0.5 + half))
    assert str(wilson(7.5, 10)) == "75.0 % (44.2 to 91.9 %, n=10)"
    with pytest.raises(Undefined, match="no cases"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="between 0 and 3"):
        wilson(4, 3)


def test_fleiss_by_hand():
    assert fleiss_kappa([[2, 0], [0, 2]]) == 1
    assert fleiss_kappa([[1, 1], [1, 1]]) == -1
    # Three people, then two, and one alone who is left out: p = (1/3 + 1) / 2; shares 2/5 and 3/5.
    assert fleiss_kappa([[2, 1], [0, 2], [1, 0]]) == pytest.approx((2 / 3 - 13 / 25) / (12 / 25))
    with pytest.raises(Undefined, match="all ratings are the same"):
        fleiss_kappa([[2, 0], [3, 0]])
    with pytest.raises(Undefined, match="no unit was rated by two people"):
        fleiss_kappa([[1, 0], [0, 1]])
    with pytest.raises(Undefined, match="no unit"):
        fleiss_kappa(np.zeros((0, 3)))


@cases("fleiss_kappa_counts")
def test_fleiss_oracle(case):
    case = case.raw
    assert fleiss_kappa(case["inputs"]["counts"]) == pytest.approx(case["expected"]["kappa"], abs=1e-12)


def test_count_labels():
    np.testing.assert_array_equal(count_labels([[1, 7, None], [1, 3, 3]]), [[2, 0, 0], [0, 1, 1], [0, 1, 0]])


def test_alpha_by_hand():
    # Coincidences of two people: (1,1) twice, (1,2) and (2,1) once each: n = 4, n_1 = 3, n_2 = 1.
    # observed = 2/4, expected = 2 * 3 * 1 / (4 * 3) = 1/2.
    assert krippendorff_alpha([[1, 1], [1, 2]], "nominal") == pytest.approx(0.0)
    # Values 1, 1, 2 | 1, 2, 4: interval. Pairs (1,1) (1,2) (2,4): observed = 2 (0 + 1 + 4) / 6 = 10/6;
    # expected over ordered pairs of 1,1,1,2,2,4: (6 * 1 + 3 * 9 + 2 * 4) * 2 / 30 = 82/30.
    assert krippendorff_alpha([[1, 1, 2], [1, 2, 4]], "interval") == pytest.approx(1 - (10 / 6) / (82 / 30))
    # Ordinal, n_1 = 3, n_2 = 2, n_4 = 1: d(1,2) = 2.5^2, d(2,4) = 1.5^2, d(1,4) = 4^2.
    observed = 2 * (2.5**2 + 1.5**2) / 6
    expected = 2 * (6 * 2.5**2 + 3 * 4**2 + 2 * 1.5**2) / 30
    assert krippendorff_alpha([[1, 1, 2], [1, 2, 4]], "ordinal") == pytest.approx(1 - observed / expected)


def test_alpha_oracle():
    raw = Case("krippendorff_alpha").raw
    for level in ("nominal", "ordinal", "interval"):
        found = krippendorff_alpha(raw["inputs"]["ratings"], level)
        assert found == pytest.approx(raw["expected"][f"alpha_{level}"], abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_that_is_undefined(level):
    with pytest.raises(Undefined, match="all ratings are the same"):
        krippendorff_alpha([[2, 2, None, 2], [2, None, 2, 2]], level)  # the oracle's constant case
    for ratings in ([[1, 2, 3]], [[1, None], [None, 2]], [[None], [None]]):
        with pytest.raises(Undefined, match="no unit was rated by two people"):
            krippendorff_alpha(ratings, level)
    with pytest.raises(Undefined, match="the same"):
        alpha_interval([[2, 2], [2, 2]], level)


def test_alpha_interval():
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 8, 200)
    ratings = truth + rng.integers(-1, 2, (3, 200))
    alpha, (lower, upper) = krippendorff_alpha(ratings, "interval"), alpha_interval(ratings, "interval", draws=200)
    assert lower < alpha < upper
    wider = alpha_interval(ratings[:, :20], "interval", draws=200)
    assert wider[1] - wider[0] > 2 * (upper - lower)
    assert alpha_interval(ratings, "interval", draws=50, seed=3) == alpha_interval(
        ratings, "interval", draws=50, seed=3
    )


def test_cohen_by_hand():
    found = cohen_kappa([0, 0, 1, 1], [0, 1, 1, 1], 2)  # chance: 1/2 * 1/4 + 1/2 * 3/4
    assert (found.kappa, found.observed, found.chance) == pytest.approx((0.5, 0.75, 0.5))
    with pytest.raises(Undefined, match="same label"):
        cohen_kappa([1, 1, 1], [1, 1, 1], 3)
    with pytest.raises(Undefined, match="share no item"):
        cohen_kappa([], [], 3)


def test_cohen_oracle():
    raw = Case("cohen_kappa").raw
    for weights, name in (("none", "kappa"), ("linear", "kappa_linear"), ("quadratic", "kappa_quadratic")):
        found = cohen_kappa(raw["inputs"]["rater_a"], raw["inputs"]["rater_b"], raw["inputs"]["n_categories"], weights)
        assert found.kappa == pytest.approx(raw["expected"][name], abs=1e-12)
        assert (found.observed, found.chance) == pytest.approx((raw["expected"]["observed"], raw["expected"]["chance"]))


def test_kendall():
    assert kendall_tau([0, 1, 2], [2, 1, 0]) == -1
    assert kendall_tau([0, 1, 1], [0, 1, 2]) == pytest.approx(2 / np.sqrt(2 * 3))
    with pytest.raises(Undefined, match="ties all responses"):
        kendall_tau([1, 1, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="same responses"):
        kendall_tau([1, 2], [1, 2, 3])


def test_kendall_oracle():
    raw = Case("kendall_tau_b").raw
    for first, second, tau in zip(raw["inputs"]["first"], raw["inputs"]["second"], raw["expected"]["tau"], strict=True):
        if tau is None:
            with pytest.raises(Undefined):
                kendall_tau(first, second)
        else:
            assert kendall_tau(first, second) == pytest.approx(tau, abs=1e-12)


def test_least_agreed():
    found = least_agreed(
        {
            "ann": {"same": [0, 1, 2], "other": [0, 1], "half": [0, 0], "alone": [0, 1], "absent": [0, -1]},
            "bob": {"same": [0, 1, 2], "other": [1, 0], "half": [0, 1], "absent": [0, -1]},
        }
    )
    assert found == [("other", 0.0), ("half", 0.5), ("same", 1.0)]


def test_agreement_is_fast():
    """The administrator's page shows it live: 40 people, 2,000 items of six answers that five of them ranked."""
    rng = np.random.default_rng(0)
    table = np.full((40, 30_000), NAN)
    for start in range(0, 30_000, 15):
        table[rng.choice(40, 5, replace=False), start : start + 15] = rng.integers(0, 3, (5, 15))
    assert pairwise_agreement(table).ties_as_label.n == 30_000 * 10
    assert abs(krippendorff_alpha(table, "nominal")) < 0.01
