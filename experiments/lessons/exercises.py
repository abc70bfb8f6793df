"""The exercises of the lessons: an answer is right if it agrees with the library on all inputs of its exercise."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax import logprobs
from rlhf_jax.algorithms import advantages, best_of_n, dpo, ppo, reward
from rlhf_jax.data import pipeline
from rlhf_jax.people import agreement, forms
from rlhf_jax.types import Tokens


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


def _laid_out(sequences: Sequence[tuple[int, int]], length: int) -> Tokens:
    """A row of sequences, each of so many words, of which those from the second number on count."""
    row = [(np.zeros(words, np.int32), np.arange(words) >= first) for words, first in sequences]
    return pipeline.lay_out([row], length, pad=0)


def _mask_of_answer(asked: int, answer: int, length: int) -> np.ndarray:
    return _float(_laid_out([(asked + answer, asked)], length).target[0])


def _loss_of_answers(logp: Sequence[Sequence[float]], masks: Sequence[Sequence[int]]) -> float:
    return float(logprobs.masked_mean(-jnp.array(logp), jnp.array(masks, bool)))


def _segments(lengths: Sequence[int], length: int) -> np.ndarray:
    return _float(_laid_out([(words, 0) for words in lengths], length).segment[0])


def _pairs(ranks: Sequence[int]) -> np.ndarray:
    return np.argwhere(reward.pair_mask(jnp.array([ranks]))[0])


def _agreement_of_two(first: Sequence[int], second: Sequence[int]) -> float:
    _, labels = agreement.comparisons({"first": {"item": first}, "second": {"item": second}})
    share = agreement.pairwise_agreement(labels).without_ties
    assert share is not None
    return share.value


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


def _gold_of_best(scores: Sequence[float], golds: Sequence[float]) -> float:
    return best_of_n.expected(np.array([scores]), np.array([golds]), len(scores))


def _restored(ranks: Sequence[int], shown: Sequence[int]) -> list[int]:
    return forms.restored({"ranks": ranks}, shown)["ranks"]


def _normalized(scores: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    head = reward.normalize({"kernel": 1.0, "bias": 0.0}, float(np.mean(reference)), float(np.std(reference)))
    return head["kernel"] * _float(scores) + head["bias"]


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
    "mask_of_answer": Exercise(
        _mask_of_answer,
        [(2, 3, 7), (1, 1, 2), (3, 4, 7)],
        "a 0 for each word of the instruction, a 1 for each of the answer, and 0 for padding",
    ),
    "loss_of_answers": Exercise(
        _loss_of_answers,
        [
            ([[-9.0, -0.5, -1.5], [-9.0, -9.0, -0.25]], [[0, 1, 1], [0, 0, 1]]),
            ([[-0.5, -0.75]], [[0, 1]]),
        ],
        "minus the sum of all that counts in the batch, divided by how many words count in the batch",
    ),
    "segments": Exercise(
        _segments,
        [([3, 2], 6), ([1, 1, 2], 4), ([2], 5)],
        "so many ones, then so many twos, and zeros at the end",
    ),
    "pairs": Exercise(
        _pairs,
        [([1, 0, 2],), ([0, 0, 1],), ([2, 1, 0, 1],)],
        "all (i, j) with ranks[i] < ranks[j]; equal ranks are no pair",
    ),
    "agreement_of_two": Exercise(
        _agreement_of_two,
        [([0, 1, 2], [0, 2, 1]), ([0, 0, 1], [1, 0, 2]), ([0, 1, 2, 3], [3, 2, 0, 1])],
        "count the pairs that neither of them ties, and among these the ones with the same winner",
    ),
    "chance_to_agree": Exercise(
        lambda p: p**2 + (1 - p) ** 2,
        [(0.5,), (0.9,), (1.0,)],
        "both are right, or both are wrong",
    ),
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
    "kl_of_best": Exercise(best_of_n.kl, [(1,), (2,), (64,)], "ln n - (n - 1) / n"),
    "gold_of_best": Exercise(
        _gold_of_best,
        [([0.3, 1.2, -0.7], [0.1, 0.4, 0.9]), ([2.0, -1.0], [0.25, 0.5])],
        "find the place of the largest score; gold has no say in the choice",
    ),
    "best_distance": Exercise(
        lambda alpha, beta: alpha / (2 * beta),
        [(0.6, 0.3), (0.5, 0.2)],
        "where the derivative of d (alpha - beta d) is 0",
    ),
    "restored": Exercise(
        _restored,
        [([0, 1, 2], [2, 0, 1]), ([1, 0], [1, 0]), ([2, 0, 1, 0], [3, 1, 0, 2])],
        "the rank in place n belongs to the answer shown[n]",
    ),
    "normalized": Exercise(
        _normalized,
        [([3.0, 1.0], [1.0, 2.0, 6.0]), ([0.0], [-1.0, 1.0])],
        "subtract the mean of reference, divide by its standard deviation",
    ),
    "standard_error": Exercise(
        lambda p, n: math.sqrt(p * (1 - p) / n),
        [(0.8, 100), (0.5, 20)],
        "the square root of p (1 - p) / n",
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
    if name not in EXERCISES:
        raise ValueError(f"{name!r} is no exercise; there are {', '.join(EXERCISES)}")
    exercise = EXERCISES[name]
    for given in exercise.inputs:
        shown = ", ".join(str(x.tolist() if isinstance(x, np.ndarray) else x) for x in given)
        expected = exercise.right(*given)
        try:
            found, wanted = answer(*given), _float(expected)
            right = np.shape(found) == wanted.shape and np.allclose(_float(found), wanted, rtol=1e-4, atol=1e-5)
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
