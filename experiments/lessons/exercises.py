"""The exercises of the lessons: an answer is right if it agrees with the library on all inputs of its exercise."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax import logprobs
from rlhf_jax.algorithms import advantages, dpo, ppo, reward


@dataclasses.dataclass(frozen=True)
class Exercise:
    """An exercise: the right function, and the inputs on which an answer has to agree with it."""

    right: Callable[..., Any]
    inputs: Sequence[tuple]
    hint: str


def _float(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _row(x: Sequence[float]) -> jnp.ndarray:
    """The numbers as the one row of a batch."""
    return jnp.array([x], float)


def _log_probability(logits: Sequence[float], word: int) -> float:
    return float(logprobs.token_logprobs(jnp.array([[logits]], float), jnp.array([[word]]))[0, 0])


def _loss_of_text(logp: Sequence[float], counts: Sequence[bool]) -> float:
    return float(logprobs.masked_mean(-jnp.array(logp), jnp.array(counts)))


def _pair_loss(better: float, worse: float) -> float:
    return _ranking_loss([better, worse], [0, 1])


def _ranking_loss(scores: Sequence[float], ranks: Sequence[int]) -> float:
    return float(reward.bradley_terry_loss(jnp.array([scores], float), jnp.array([ranks])))


def _probability_better(better: float, worse: float) -> float:
    return 1 / (1 + math.exp(worse - better))


def _leave_one_out(rewards: Sequence[float]) -> np.ndarray:
    return _float(advantages.leave_one_out(_row(rewards))[0])


def _group_normalize(rewards: Sequence[float]) -> np.ndarray:
    return _float(advantages.group_normalize(_row(rewards))[0])


def _without_scale(rewards: Sequence[float]) -> np.ndarray:
    return _float(advantages.subtract_mean(_row(rewards))[0])


def _reinforce_loss(logp: Sequence[float], advantage: Sequence[float]) -> float:
    return float(-np.mean(np.array(logp) * np.array(advantage)))


def _gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> np.ndarray:
    mask = jnp.ones((1, len(rewards)), bool)
    return _float(advantages.gae(_row(rewards), _row(values), mask, gamma, lam)[0][0])


def _clipped_loss(logp: float, logp_old: float, advantage: float, clip: float) -> float:
    one = jnp.ones((1, 1), bool)
    return float(ppo.policy_loss(_row([logp]), _row([logp_old]), _row([advantage]), one, clip)[0])


def _value_target(advantage: Sequence[float], value: Sequence[float]) -> np.ndarray:
    return _float(advantage) + _float(value)


def _token_rewards(score: float, logp: Sequence[float], logp_ref: Sequence[float], kl_coef: float) -> np.ndarray:
    kl = logprobs.kl_estimate(_row(logp), _row(logp_ref))
    mask = jnp.ones(kl.shape, bool)
    return _float(advantages.token_rewards(jnp.array([score], float), kl, mask, kl_coef)[0])


def _k3(logp: float, logp_ref: float) -> float:
    return float(logprobs.kl_estimate(_row([logp]), _row([logp_ref]), "k3")[0, 0])


def _next_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    return float(ppo.adapt_kl_coef(kl_coef, kl, episodes, target, horizon))


def _dpo_loss(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float) -> float:
    each = [jnp.array([x], float) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    return float(dpo.loss(each[0], each[1], each[2], each[3], beta))


def _implicit_reward(logp: Sequence[float], logp_ref: Sequence[float], beta: float) -> float:
    return beta * float(np.sum(_float(logp) - _float(logp_ref)))


EXERCISES = {
    "log_probability": Exercise(
        _log_probability,
        [([0.0, 1.0, -2.0], 1), ([3.5, 3.5], 0), ([1000.0, 998.5, 997.0], 2)],
        "logits[word] less the log of the sum of exp(logits); subtract the largest logit first, or exp overflows",
    ),
    "loss_of_text": Exercise(
        _loss_of_text,
        [([-0.5, -1.5, -9.0], [True, True, False]), ([-0.2, -0.4], [True, True])],
        "the mean over the words that count, not over all",
    ),
    "perplexity": Exercise(math.exp, [(0.0,), (1.2,), (3.178,)], "the loss is a logarithm: undo it"),
    "probability_better": Exercise(
        _probability_better,
        [(1.0, 0.0), (-0.5, 2.0), (3.0, 3.0)],
        "the sigmoid of the difference of the scores",
    ),
    "pair_loss": Exercise(_pair_loss, [(1.5, 0.2), (-1.0, 2.5), (0.0, 0.0)], "-ln of the probability that you wrote"),
    "ranking_loss": Exercise(
        _ranking_loss,
        [([0.3, 1.2, -0.7], [1, 0, 2]), ([0.5, 0.5, 2.0, -1.0], [0, 0, 1, 2])],
        "the mean of pair_loss over all pairs with different ranks; equal ranks are no pair",
    ),
    "reinforce_loss": Exercise(
        _reinforce_loss,
        [([-3.0, -5.5], [0.4, -0.4]), ([-1.0, -2.0, -4.0], [1.0, 0.0, -0.5])],
        "minus the mean of log-probability times advantage",
    ),
    "leave_one_out": Exercise(
        _leave_one_out,
        [([1.0, 0.0, 0.5, 0.0],), ([0.2, 0.9],)],
        "for each reward, the mean of the others, without itself",
    ),
    "group_normalize": Exercise(
        _group_normalize,
        [([1.0, 0.0, 0.5, 0.0],), ([0.2, 0.9],)],
        "subtract the mean, divide by the standard deviation (of the group, not of a sample) plus 1e-4",
    ),
    "without_scale": Exercise(
        _without_scale,
        [([1.0, 0.0, 0.5, 0.0],), ([0.2, 0.9],)],
        "subtract the mean of the group, and no more",
    ),
    "flat_probability": Exercise(
        lambda p, group: p**group + (1 - p) ** group,
        [(0.5, 2), (0.1, 8), (0.9, 8)],
        "all right: p to the power of group; all wrong: the same of 1 - p",
    ),
    "sequence_mean": Exercise(
        lambda losses: float(np.mean([np.mean(one) for one in losses])),
        [([[1.0, 2.0, 3.0], [4.0]],), ([[0.5, -0.5]],)],
        "a mean of means: a short answer weighs as much as a long one",
    ),
    "gae": Exercise(
        _gae,
        [([0.0, 0.0, 1.0], [0.2, 0.5, 0.4], 1.0, 0.95), ([0.1, -0.3], [0.0, 0.7], 0.9, 0.5)],
        "go from the last token to the first; the value after the last one is 0",
    ),
    "clipped_loss": Exercise(
        _clipped_loss,
        [(-1.0, -1.0, 0.5, 0.2), (-0.5, -1.0, 1.0, 0.2), (-1.5, -1.0, -1.0, 0.2), (-0.5, -1.0, -1.0, 0.2)],
        "the larger of two losses: -A ratio, and -A times the ratio clipped to [1 - clip, 1 + clip]",
    ),
    "value_target": Exercise(
        _value_target,
        [(np.array([0.5, -0.25]), np.array([0.1, 0.4]))],
        "what the critic should have said: what it said, plus by how much that was too little",
    ),
    "token_rewards": Exercise(
        _token_rewards,
        [(1.0, [-1.0, -0.5, -2.0], [-1.5, -0.5, -1.0], 0.1), (-0.5, [-0.2], [-0.9], 0.5)],
        "-kl_coef (logp - logp_ref) for each token, and the score added to the last one",
    ),
    "k3": Exercise(_k3, [(-1.0, -1.5), (-2.0, -0.5), (-1.0, -1.0)], "exp(-d) - 1 + d, with d = logp - logp_ref"),
    "next_kl_coef": Exercise(
        _next_kl_coef,
        [(0.1, 6.0, 3.0, 64, 1000), (0.1, 2.9, 3.0, 64, 1000), (0.2, 0.0, 3.0, 64, 1000)],
        "kl_coef (1 + error episodes / horizon), where error is kl / target - 1, clipped to [-0.2, 0.2]",
    ),
    "implicit_reward": Exercise(
        _implicit_reward,
        [([-1.0, -0.5], [-1.5, -0.75], 0.1), ([-3.0, -1.0, -0.1], [-1.0, -1.0, -0.2], 0.5)],
        "beta times the sum over the words of logp - logp_ref",
    ),
    "first_loss": Exercise(
        lambda: _dpo_loss(-4.0, -6.0, -4.0, -6.0, 0.1),
        [()],
        "policy and reference are the same, so both implicit rewards are 0",
    ),
    "dpo_loss": Exercise(
        _dpo_loss,
        [(-4.0, -6.0, -5.0, -5.0, 0.1), (-4.0, -3.0, -4.5, -4.0, 0.5)],
        "-ln sigmoid of the difference of the two implicit rewards",
    ),
}


def check(name: str, answer: Callable[..., Any]) -> bool:
    """Print whether an answer is right, and if not, on which input it is wrong and a hint; returns whether it is."""
    exercise = EXERCISES[name]
    for given in exercise.inputs:
        shown = ", ".join(str(x.tolist() if isinstance(x, np.ndarray) else x) for x in given)
        expected = exercise.right(*given)
        try:
            found = answer(*given)
            right = np.allclose(_float(found), _float(expected), rtol=1e-4, atol=1e-5)
        except NotImplementedError:
            print(f"{name}: not yet. Hint: {exercise.hint}.")
            return False
        except Exception as error:
            print(f"{name}({shown}) raised {type(error).__name__}: {error}. Hint: {exercise.hint}.")
            return False
        if not right:
            print(f"{name}({shown}) should be {_shown(expected)}, and yours is {_shown(found)}. Hint: {exercise.hint}.")
            return False
    print(f"{name}: right")
    return True


def _shown(x: Any) -> str:
    try:
        return str(np.round(_float(x), 4).tolist())
    except (TypeError, ValueError):
        return repr(x)
