"""Which model is better: strengths fitted to the games of an arena, and win rates.

A game compares two players' answers to one prompt; it ends in a win or a tie. Strengths follow Bradley and Terry
(1952), or Davidson (1970) where games may tie.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.people.agreement import NORMAL_95, Share, Undefined, wilson

ELO_CENTRE, ELO_SCALE = 1000.0, 400 / math.log(10)  # of the ratings that chess players know
STEPS = 100  # of Newton's method, most
FAR = 30.0  # a difference of strengths that no number of games supports: the fit runs away


@dataclasses.dataclass(frozen=True)
class Games:
    """The games that have been played: `wins[i, j]` times i beat j, `ties[i, j]` = `ties[j, i]` ties of i and j."""

    players: tuple[str, ...]
    wins: np.ndarray  # [P, P]
    ties: np.ndarray  # [P, P], each tie counted once on either side of the diagonal


@dataclasses.dataclass(frozen=True)
class Strengths:
    """Fitted strengths; a standard error is that under the constraint that the log-strengths add up to 0."""

    players: tuple[str, ...]
    log_strength: np.ndarray  # [P]
    standard_error: np.ndarray  # [P]
    standard_error_difference: np.ndarray  # [P, P] of log_strength[i] - log_strength[j]
    log_likelihood: float  # of the games in the order in which they were played
    nu: float | None = None  # Davidson's weight of ties; None without ties
    standard_error_log_nu: float | None = None

    @property
    def elo(self) -> np.ndarray:
        """The strengths on the scale of chess ratings, mean 1000. [P]."""
        return ELO_CENTRE + ELO_SCALE * self.log_strength

    @property
    def elo_standard_error(self) -> np.ndarray:
        """The standard errors of `elo`. [P]."""
        return ELO_SCALE * self.standard_error


def tally(games: Iterable[tuple[str, str, str]]) -> Games:
    """The games by pair of players, from (first player, second player, "first", "second" or "tie").

    Raises ValueError for a player against itself and for an unknown outcome.
    """
    played = collections.Counter(games)
    players = sorted({player for first, second, _ in played for player in (first, second)})
    place = {player: i for i, player in enumerate(players)}
    wins, ties = np.zeros((len(players), len(players))), np.zeros((len(players), len(players)))
    for (first, second, outcome), times in played.items():
        i, j = place[first], place[second]
        if i == j:
            raise ValueError(f"{first} played itself: expected two players")
        if outcome == "tie":
            ties[i, j] += times
            ties[j, i] += times
        elif outcome in ("first", "second"):
            wins[(i, j) if outcome == "first" else (j, i)] += times
        else:
            raise ValueError(f"outcome {outcome!r} of {first} and {second}: expected first, second or tie")
    return Games(tuple(players), wins, ties)


def win_rate(wins: int, ties: int, losses: int, z: float = NORMAL_95) -> Share:
    """The win rate with a tie as half a win, and Wilson's interval. Raises Undefined for no game."""
    if wins + ties + losses == 0:
        raise Undefined("the win rate is undefined: no game has been played")
    return wilson(wins + ties / 2, wins + ties + losses, z)


def fit(games: Games) -> Strengths:
    """The strengths of maximum likelihood, without a prior: Davidson's if a game tied, else Bradley and Terry's.

        P(i wins) : P(j wins) : P(tie) = s_i : s_j : nu sqrt(s_i s_j)

    Newton's method on the log-strengths and ln nu. Raises Undefined, and names the players, where the likelihood has no
    maximum: somebody won or lost every game, or two groups never met.
    """
    wins, ties = np.asarray(games.wins, float), np.asarray(games.ties, float)
    players = games.players
    count = len(players)
    if count < 2:
        raise Undefined("strengths are undefined: they compare at least two players")
    _check(players, wins, ties)
    with_ties = bool(np.any(ties > 0))
    if with_ties and not np.any(wins > 0):
        raise Undefined("strengths are undefined: every game tied")
    theta = np.zeros(count + with_ties)  # log-strengths, then ln nu
    for _ in range(STEPS):
        value, gradient, information = _likelihood(theta, wins, ties)
        step = _covariance(information, count) @ gradient
        # Newton's step, halved until the likelihood does not fall: far from the maximum it may be too long.
        while _likelihood(theta + step, wins, ties)[0] < value - 1e-9 * abs(value):
            step = step / 2
        theta = theta + step
        if np.ptp(theta[:count]) > FAR or np.max(np.abs(theta)) > FAR:
            break
        if np.max(np.abs(step)) < 1e-11:
            value, _, information = _likelihood(theta, wins, ties)
            return _strengths(players, theta, value, _covariance(information, count))
    best, worst = players[int(np.argmax(theta[:count]))], players[int(np.argmin(theta[:count]))]
    raise Undefined(f"strengths are undefined: those of {best} and {worst} grow apart without end; play more games")


def groups(games: Games) -> list[tuple[str, ...]]:
    """The players in groups, within each of which everybody scored against the others, directly or through others.

    A larger group has no finite strengths (`fit`). That with the most players comes first, among such with as many that
    with the most games.
    """
    scored = (np.asarray(games.wins) + np.asarray(games.ties)) > 0
    found = {}
    for start in range(len(games.players)):
        inside = np.flatnonzero(_reached(scored, start) & _reached(scored.T, start))
        played = np.sum((games.wins + games.ties / 2)[np.ix_(inside, inside)])
        found[tuple(games.players[k] for k in inside)] = (len(inside), played)
    return sorted(found, key=lambda group: found[group], reverse=True)


def _strengths(players: tuple[str, ...], theta: np.ndarray, value: float, covariance: np.ndarray) -> Strengths:
    count = len(players)
    variance = np.diag(covariance)
    difference = variance[:count, None] + variance[None, :count] - 2 * covariance[:count, :count]
    return Strengths(
        players=players,
        log_strength=theta[:count],
        standard_error=np.sqrt(variance[:count]),
        standard_error_difference=np.sqrt(np.maximum(difference, 0.0)),
        log_likelihood=value,
        nu=float(np.exp(theta[count])) if len(theta) > count else None,
        standard_error_log_nu=float(np.sqrt(variance[count])) if len(theta) > count else None,
    )


def _likelihood(theta: np.ndarray, wins: np.ndarray, ties: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The log-likelihood, its gradient and the information matrix at log-strengths and, with ties, ln nu."""
    count = len(wins)
    i, j = np.triu_indices(count, 1)
    observed = np.stack([wins[i, j], wins[j, i], ties[i, j]])  # [3, pairs]
    log_s = theta[:count]
    log_nu = theta[count] if len(theta) > count else -np.inf
    exponent = np.stack([log_s[i], log_s[j], log_nu + (log_s[i] + log_s[j]) / 2])
    top = np.max(exponent, axis=0)
    log_p = exponent - (top + np.log(np.sum(np.exp(exponent - top), axis=0)))
    p = np.exp(log_p)
    value = float(np.sum(np.where(observed > 0, observed * np.where(observed > 0, log_p, 0.0), 0.0)))
    # Each outcome's exponent is linear in theta: `slope` [3, pairs, parameters].
    slope = np.zeros((3, len(i), len(theta)))
    pair = np.arange(len(i))
    slope[0, pair, i] = slope[1, pair, j] = 1.0
    slope[2, pair, i] = slope[2, pair, j] = 0.5
    if len(theta) > count:
        slope[2, :, count] = 1.0
    mean = np.einsum("op,opk->pk", p, slope)
    games = observed.sum(axis=0)
    gradient = np.einsum("op,opk->k", observed, slope) - games @ mean
    second = np.einsum("p,op,opk,opl->kl", games, p, slope, slope) - np.einsum("p,pk,pl->kl", games, mean, mean)
    return value, gradient, second


def _covariance(information: np.ndarray, count: int) -> np.ndarray:
    """The inverse of the information matrix under the constraint that the first `count` parameters add up to 0."""
    size = len(information)
    bordered = np.zeros((size + 1, size + 1))
    bordered[:size, :size] = information
    bordered[:count, size] = bordered[size, :count] = 1.0
    try:
        return np.linalg.inv(bordered)[:size, :size]
    except np.linalg.LinAlgError as error:
        raise Undefined("strengths are undefined: the games do not determine them; play more games") from error


def _check(players: Sequence[str], wins: np.ndarray, ties: np.ndarray) -> None:
    """Raise ValueError for what are no games, and Undefined unless every group of players scored against the rest."""
    shape = (len(players), len(players))
    if wins.shape != shape or ties.shape != shape:
        raise ValueError(f"wins of shape {wins.shape} and ties of shape {ties.shape}: expected {shape}")
    if np.any(wins < 0) or np.any(ties < 0) or np.any(np.diag(wins)) or np.any(np.diag(ties)):
        raise ValueError("wins and ties: expected no negative number, and nobody against itself")
    if np.any(ties != ties.T):
        raise ValueError("ties: expected as many of i and j as of j and i")
    scored = (wins + ties) > 0  # [i, j]: i took something from j
    met = scored | scored.T
    group = _reached(met, 0)
    if not np.all(group):
        names = " and ".join(
            ", ".join(player for player, one in zip(players, side, strict=True) if one) for side in (group, ~group)
        )
        raise Undefined(f"strengths are undefined: no game joins {names}")
    for start in range(len(players)):
        above, below = _reached(scored.T, start), _reached(scored, start)
        for side, did in ((above, "won"), (below, "lost")):
            if not np.all(side):
                names = ", ".join(player for player, one in zip(players, side, strict=True) if one)
                raise Undefined(f"strengths are undefined: {names} {did} every game against the others")


def _reached(edges: np.ndarray, start: int) -> np.ndarray:
    """The mask of those that a path of `edges` [P, P] leads to from `start`. [P] bool."""
    reached = np.zeros(len(edges), bool)
    reached[start] = True
    while True:
        wider = reached | np.any(edges[reached], axis=0)
        if np.all(wider == reached):
            return reached
        reached = wider
