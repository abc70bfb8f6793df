"""Losses of ranked responses without a reference model, and whole orders: by hand, by oracle, in a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import optim, orpo, preferences, reward, simpo, slic
from rlhf_jax.types import InputError, Rankings
from tests import tiny
from tests.algorithms.test_dpo import POLICY, TX, batch
from tests.oracles import Case

PAIR = jnp.array([[0, 1]])


def pairs(rows: int) -> Rankings:
    """Rankings of two, the first preferred, for losses that read the ranks alone."""
    return Rankings(tokens=None, mask=None, start=None, rank=jnp.tile(PAIR, (rows, 1)))


def means(case: Case, chosen: jax.Array, rejected: jax.Array) -> list[jax.Array]:
    both = ((chosen, "chosen_mask"), (rejected, "rejected_mask"))
    return [preferences.mean_logprobs(logp, case[mask]) for logp, mask in both]


def test_simpo():
    np.testing.assert_allclose(simpo.terms(jnp.array([0.5]), 2.0, 1.0), [np.log(2.0)], rtol=1e-6)
    case = Case("simpo")

    def loss(chosen, rejected):
        better, worse = means(case, chosen, rejected)
        return jnp.mean(simpo.terms(better - worse, case["beta"], case["gamma"]))

    value, (chosen, rejected) = jax.value_and_grad(loss, (0, 1))(case["policy_chosen"], case["policy_rejected"])
    case.check(loss=value, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


@pytest.mark.slow
def test_orpo_by_hand():
    logp = jnp.log(jnp.array([[0.5, 0.2, 0.8]]))
    rows = Rankings(tokens=None, mask=None, start=None, rank=jnp.array([[0, 1, -1]]))
    likelihood, odds = orpo.losses(logp, rows)
    np.testing.assert_allclose(likelihood, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(odds, np.log1p(np.exp(-np.log(1.0 / 0.25))), rtol=1e-6)  # odds 1 against 1/4
    assert np.isfinite(jax.grad(lambda x: orpo.losses(x, rows)[1])(jnp.zeros((1, 3)))).all()


def test_orpo_oracle():
    case = Case("orpo")

    def loss(chosen, rejected):
        better, worse = means(case, chosen, rejected)
        likelihood, odds = orpo.losses(jnp.stack([better, worse], axis=1), pairs(len(better)))
        return likelihood + case["lambda"] * odds, (likelihood, odds)

    (value, (likelihood, odds)), (chosen, rejected) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        case["policy_chosen"], case["policy_rejected"]
    )
    case.check(loss=value, nll=likelihood, odds_loss=odds, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


def test_slic_oracle():
    case = Case("slic_hf")

    def loss(chosen, rejected, target):
        calibration = jnp.mean(slic.terms(chosen - rejected, case["delta"]))
        return calibration - case["lambda"] * jnp.mean(target)

    value, (chosen, rejected, target) = jax.value_and_grad(loss, (0, 1, 2))(
        *(case[f"policy_{which}"] for which in ("chosen", "rejected", "target"))
    )
    case.check(loss=value, grad_policy_chosen=chosen, grad_policy_rejected=rejected, grad_policy_target=target)


@pytest.mark.parametrize("name", ["plackett_luce", "plackett_luce_ties"])
def test_plackett_luce_oracle(name):
    case = Case(name)
    loss, grad = jax.value_and_grad(reward.plackett_luce_loss)(case["scores"], case["ranks"])
    case.check(loss=loss, grad_scores=grad)


@pytest.mark.slow
def test_plackett_luce_by_hand():
    score = jnp.array([[1.0, 0.0, -1.0, 9.0]])
    ranked = -np.log(np.exp(1) / (np.exp(1) + 1 + np.exp(-1))) - np.log(1 / (1 + np.exp(-1)))
    np.testing.assert_allclose(reward.plackett_luce_loss(score, jnp.array([[0, 1, 2, -1]])), ranked, rtol=1e-6)
    other = -np.log(1 / (np.exp(1) + 1 + np.exp(-1))) - np.log(np.exp(1) / (np.exp(1) + np.exp(-1)))
    tied = reward.plackett_luce_loss(score, jnp.array([[3, 3, 5, -1]]))  # the mean of both orders
    np.testing.assert_allclose(tied, (ranked + other) / 2, rtol=1e-6)
    flat = jax.grad(reward.plackett_luce_loss)(score, jnp.array([[2, 2, 2, 2]]))
    np.testing.assert_array_equal(flat, 0.0)
    with pytest.raises(InputError, match="at most 12 responses"):
        reward.plackett_luce_loss(jnp.zeros((1, 13)), jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(InputError, match="no effect with loss=plackett_luce"):
        reward.Config(loss="plackett_luce", margin=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "cfg", "name"),
    [
        (simpo.train_step, simpo.Config(), "simpo"),
        (orpo.train_step, orpo.Config(), "orpo"),
        (slic.train_step, slic.Config(), "slic"),
    ],
    ids=["simpo", "orpo", "slic"],
)
def test_a_step_averages_pairs_then_prompts(step, cfg, name):
    rows, policy = batch(1), tiny.policy()
    reduce = preferences.sequence_logprobs if name == "slic" else preferences.mean_logprobs
    logp = np.asarray(
        jax.jit(functools.partial(preferences.response_logprobs, logprobs_fn=POLICY, reduce=reduce))(policy, rows)
    )
    losses = []
    for score, rank in zip(logp, rows.rank, strict=True):
        found = [(i, j) for i in range(4) for j in range(4) if 0 <= rank[i] < rank[j]]
        if not found:
            continue
        match name:
            case "simpo":
                terms = [np.log1p(np.exp(1 - 2 * (score[i] - score[j]))) for i, j in found]
            case "orpo":
                odds = [np.exp(x) / -np.expm1(x) if x else 0.0 for x in score]  # absent ones are in no pair
                terms = [-score[i] + 0.1 * np.log1p(odds[j] / odds[i]) for i, j in found]
            case "slic":
                best = min((r, k) for k, r in enumerate(rank) if r >= 0)[1]
                terms = [max(0.0, 1 - score[i] + score[j]) - 0.1 * score[best] for i, j in found]
        losses.append(np.mean(terms))
    state = optim.init(policy, TX, jax.random.key(0))
    _, metrics = jax.jit(functools.partial(step, logprobs_fn=POLICY, tx=TX, cfg=cfg))(state, rows)
    np.testing.assert_allclose(metrics[f"loss/{name}"], np.mean(losses), rtol=1e-4)
