"""Strengths and win rates: by hand, and against values computed elsewhere."""

import numpy as np
import pytest

from rlhf_jax.people.agreement import Undefined
from rlhf_jax.people.strengths import Games, fit, groups, tally, win_rate
from tests.oracles import Case


def games(wins, ties=None):
    wins = np.array(wins, float)
    return Games(tuple("abcdefgh"[: len(wins)]), wins, np.zeros_like(wins) if ties is None else np.array(ties, float))


def test_two_players_by_hand():
    """Three wins of four: log odds ln 3, whose variance is 1/3 + 1/1."""
    found = fit(games([[0, 3], [1, 0]]))
    np.testing.assert_allclose(found.log_strength, [np.log(3) / 2, -np.log(3) / 2], atol=1e-12)
    np.testing.assert_allclose(found.standard_error_difference[0, 1], np.sqrt(4 / 3), atol=1e-12)
    np.testing.assert_allclose(found.standard_error, np.sqrt(4 / 3) / 2, atol=1e-12)
    np.testing.assert_allclose(found.log_likelihood, 3 * np.log(0.75) + np.log(0.25), atol=1e-12)
    np.testing.assert_allclose(found.elo[0] - found.elo[1], 400 * np.log10(3))
    np.testing.assert_allclose(found.elo_standard_error, 400 / np.log(10) * found.standard_error)
    assert found.nu is None and found.standard_error_log_nu is None


def test_two_players_with_ties_by_hand():
    """Shares 4 : 1 : 5 of wins, losses and ties fit exactly: s_a / s_b = 4, nu = 5 / sqrt(4)."""
    found = fit(games([[0, 4], [1, 0]], [[0, 5], [5, 0]]))
    np.testing.assert_allclose(found.log_strength, [np.log(4) / 2, -np.log(4) / 2], atol=1e-12)
    assert found.nu == pytest.approx(2.5)
    assert found.log_likelihood == pytest.approx(4 * np.log(0.4) + np.log(0.1) + 5 * np.log(0.5))
    # The variance of ln 4 - ln 1 of multinomial counts is 1/4 + 1/1.
    assert found.standard_error_difference[0, 1] == pytest.approx(np.sqrt(1.25))


@pytest.mark.parametrize("name", ["bradley_terry_fit", "davidson_fit"])
def test_oracle(name):
    raw = Case(name).raw
    found, expected = fit(games(raw["inputs"]["wins"], raw["inputs"].get("ties"))), raw["expected"]
    for key, value in expected.items():
        np.testing.assert_allclose(getattr(found, key), value, atol=1e-8, err_msg=key)


def test_tally():
    found = tally(
        [("b", "a", "first"), ("a", "b", "first"), ("a", "b", "second"), ("c", "a", "tie"), ("a", "c", "tie")]
    )
    assert found.players == ("a", "b", "c")
    np.testing.assert_array_equal(found.wins, [[0, 1, 0], [2, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.ties, [[0, 0, 2], [0, 0, 0], [2, 0, 0]])
    with pytest.raises(ValueError, match="a played itself"):
        tally([("a", "a", "tie")])
    with pytest.raises(ValueError, match="outcome 'bad' of a and b"):
        tally([("a", "b", "bad")])


def test_strong_players_are_fitted():
    """Newton's full step overshoots where nearly all games are won."""
    found = fit(games([[0, 999, 0], [1, 0, 500], [0, 1, 0]]))
    np.testing.assert_allclose(found.log_strength[0] - found.log_strength[1], np.log(999), rtol=1e-9)
    np.testing.assert_allclose(found.log_strength[1] - found.log_strength[2], np.log(500), rtol=1e-9)


def test_groups_are_those_that_have_strengths():
    assert groups(games([[0, 1], [0, 0]])) == [("a",), ("b",)]
    assert groups(games([[0, 1], [0, 0]], [[0, 1], [1, 0]])) == [("a", "b")]
    # a beat all; b, c and d beat one another in a circle, and e, f are apart, with more games.
    wins = np.zeros((6, 6))
    wins[0, 1] = wins[1, 2] = wins[2, 3] = wins[3, 1] = 1
    wins[4, 5] = wins[5, 4] = 9
    assert groups(games(wins)) == [("b", "c", "d"), ("e", "f"), ("a",)]
    wins[3, 1] = 0
    assert groups(games(wins))[0] == ("e", "f")
    assert groups(tally([])) == []


@pytest.mark.parametrize(
    ("wins", "ties", "said"),
    [
        ([[0]], None, "at least two players"),
        ([[0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], None, "no game joins a, b and c, d"),
        ([[0, 3, 2], [0, 0, 1], [0, 1, 0]], None, "a won every game against the others|b, c lost every game"),
        ([[0, 3, 0], [3, 0, 0], [1, 1, 0]], None, "a, b lost every game against the others"),
        ([[0, 0], [0, 0]], None, "no game joins a and b"),
        ([[0, 0], [0, 0]], [[0, 2], [2, 0]], "every game tied"),
        ([[0, 5], [0, 0]], [[0, 5], [5, 0]], "those of a and b grow apart without end"),
    ],
)
def test_games_without_strengths(wins, ties, said):
    with pytest.raises(Undefined, match=rf"^strengths are undefined: .*({said})") as error:
        fit(games(wins, ties))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wins", "ties", "said"),
    [
        ([[0, -1], [1, 0]], None, "no negative number"),
        ([[1, 1], [1, 0]], None, "nobody against itself"),
        ([[0, 1], [1, 0]], [[0, 1], [2, 0]], "as many of i and j"),
        ([[0, 1], [1, 0]], [[0]], "of shape"),
    ],
)
def test_what_are_no_games(wins, ties, said):
    with pytest.raises(ValueError, match=said):
        fit(games(wins, ties))


def test_win_rate_oracle():
    raw = Case("win_rate_wilson").raw
    inputs, expected = raw["inputs"], raw["expected"]
    for n, row in enumerate(zip(inputs["wins"], inputs["ties"], inputs["losses"], strict=True)):
        if expected["win_rate"][n] is None:
            with pytest.raises(Undefined, match="no game has been played"):
                win_rate(*row)
        else:
            found = win_rate(*row, z=inputs["z"])
            assert found.value == pytest.approx(expected["win_rate"][n], abs=1e-12)
            assert found.lower == pytest.approx(expected["lower"][n], abs=1e-12)
            assert found.upper == pytest.approx(expected["upper"][n], abs=1e-12)
