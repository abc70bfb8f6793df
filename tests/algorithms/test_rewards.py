"""Several rewards in one: by hand, against values computed elsewhere, on one device and eight, in every algorithm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, optim, ppo, rewards, rloo, updates
from rlhf_jax.algorithms.advantages import gae
from rlhf_jax.algorithms.rewards import Config
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.types import InputError
from tests import tiny
from tests.algorithms.test_ppo import episodes
from tests.oracles import Case

TX = optim.adamw(1e-3, optim.Adam(eps=1e-5))
POLICY = models.part("policy", models.logprobs_fn(tiny.GPT))
RNG = np.random.default_rng(0)
SCORES = RNG.normal(2.0, 3.0, (16, 2)).astype(np.float32)
COST = RNG.normal(-0.5, 1.0, 16).astype(np.float32)


def test_lagrangian_by_hand():
    found = rewards.lagrangian(jnp.array([3.0, -1.0, 9.0]), jnp.array([0.5, -2.0, 9.0]), 0.5)
    np.testing.assert_allclose(found, [2.75 / 1.5, 0.0, 4.5 / 1.5], rtol=1e-6)


def test_lagrangian_oracle():
    case = Case("lagrangian_advantage")
    found = rewards.lagrangian(case["reward_advantage"], case["cost_advantage"], case["multiplier"], case["mask"])
    case.check(advantage=found)


def test_the_advantage_of_the_combination_is_the_combination_of_advantages():
    """So one critic of the combined score serves where the paper has one for the reward and one for the cost."""
    score, cost, value, cost_value = jnp.array(RNG.normal(size=(4, 3, 5)), jnp.float32)
    mask, multiplier = jnp.arange(5)[None] < jnp.array([[5], [3], [1]]), 0.7
    combine = functools.partial(rewards.lagrangian, multiplier=multiplier)
    whole, _ = gae(combine(score, cost), combine(value, cost_value), mask, 0.97, 0.9)
    parts = gae(score, value, mask, 0.97, 0.9)[0], gae(cost, cost_value, mask, 0.97, 0.9)[0]
    np.testing.assert_allclose(whole, rewards.lagrangian(*parts, multiplier, mask), atol=1e-6)


def test_multiplier_by_hand():
    cfg = Config(threshold=0.5, multiplier=2.0, multiplier_lr=0.1, multiplier_max=3.0)
    np.testing.assert_allclose(rewards.update_multiplier(2.0, 1.5, cfg), 2 * np.exp(0.2), rtol=1e-6)
    np.testing.assert_allclose(rewards.update_multiplier(2.0, -0.5, cfg), 2 * np.exp(-0.2), rtol=1e-6)
    np.testing.assert_allclose(rewards.update_multiplier(2.0, 9.0, cfg), 3.0, rtol=1e-6)
    fixed = Config(threshold=0.5, multiplier=0.3, multiplier_lr=0.0)
    assert rewards.update_multiplier(jnp.float32(0.3), 7.0, fixed) == jnp.float32(0.3)


def test_multiplier_oracle():
    case = Case("lagrange_multiplier")
    cfg = Config(
        threshold=case["threshold"],
        multiplier=case["multiplier_init"],
        multiplier_lr=case["lr"],
        multiplier_max=case["max"],
    )
    multiplier, found = jnp.float32(cfg.multiplier), []
    for cost in case["cost"]:
        multiplier = rewards.update_multiplier(multiplier, cost, cfg)
        found.append(multiplier)
    case.check(multiplier=found)


def test_weighted_sum_by_hand():
    scores = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    moments = rewards.update_moments(rewards.init(Config(weights=(1.0, 0.5))).moments, scores)
    np.testing.assert_allclose(moments.mean, [2.0, 20.0])
    np.testing.assert_allclose(rewards.normalize(scores, moments), [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-6)
    found = rewards.weighted_sum(rewards.normalize(scores, moments), (1.0, -0.5))
    np.testing.assert_allclose(found, [-0.5, 0.5], rtol=1e-6)


def test_running_moments_are_those_of_all_scores():
    moments = rewards.init(Config(weights=(1.0, 1.0))).moments
    for part in np.split(SCORES, [3, 4, 10]):
        moments = rewards.update_moments(moments, jnp.array(part))
    assert moments.count == 16
    np.testing.assert_allclose(moments.mean, SCORES.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.squares / 16, SCORES.var(axis=0), rtol=1e-5)


def test_equal_scores_are_normalised_to_nothing():
    scores = jnp.full((6, 1), 0.7)
    moments = rewards.update_moments(rewards.init(Config(weights=(1.0,))).moments, scores)
    assert np.all(np.abs(rewards.normalize(scores, moments)) < 1e-2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": (0.0, 0.0)}, r"weights=\(0.0, 0.0\): expected at least one that is not 0"),
        ({"weights": (1.0,), "normalize": True}, "normalize has no effect on scores that weights add up"),
        ({"multiplier": 2.0}, "multiplier has no effect without threshold"),
        ({"multiplier_lr": 0.5}, "multiplier_lr has no effect without threshold"),
        ({"multiplier_max": 2.0}, "multiplier_max has no effect without threshold"),
        ({"threshold": 0.0, "multiplier": 3.0, "multiplier_max": 2.0}, "multiplier=3.0: expected at most"),
    ],
)
def test_settings_without_effect_are_refused(changes, said):
    with pytest.raises(InputError, match=f"^{said}"):
        Config(**changes)


@pytest.mark.parametrize(
    ("cfg", "models", "said"),
    [
        (Config(weights=(1.0, 2.0)), (1, False, 0.0), "a weight for each of the 1 models"),
        (Config(weights=(1.0, 2.0)), (2, False, 0.5), "pessimism has no effect on scores that weights add up"),
        (Config(), (1, True, 0.0), "the cost model has no effect without a threshold"),
        (Config(threshold=0.0), (1, False, 0.0), "name one by --cost"),
    ],
)
def test_settings_suit_the_models(cfg, models, said):
    with pytest.raises(InputError, match=said):
        cfg.check(*models)


def test_combine():
    cfg = Config(weights=(1.0, 0.5), threshold=0.25, multiplier=0.5)
    sampled = episodes(0).replace(scores=jnp.array(SCORES), cost=jnp.array(COST))
    rollout, state, metrics = rewards.combine(sampled, rewards.init(cfg), cfg)
    normal = (SCORES - SCORES.mean(axis=0)) / SCORES.std(axis=0)
    np.testing.assert_allclose(rollout.score, (normal @ [1.0, 0.5] - 0.5 * COST) / 1.5, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.multiplier, 0.5 * np.exp(0.05 * (COST.mean() - 0.25)), rtol=1e-5)
    np.testing.assert_allclose(metrics["cost/mean"], COST.mean(), rtol=1e-5)
    assert metrics["cost/multiplier"] == 0.5
    np.testing.assert_allclose([metrics["reward/score_0"], metrics["reward/score_1"]], SCORES.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/running_std_1"], SCORES[:, 1].std(), rtol=1e-5)
    assert rollout.scores is None and rollout.cost is None
    for missing in ({"scores": None}, {"cost": None}):
        with pytest.raises(InputError, match="expected"):
            rewards.combine(sampled.replace(**missing), rewards.init(cfg), cfg)


def scored(score, length):
    """A rollout of responses of these lengths, with these scores."""
    mask = jnp.arange(4)[None] < jnp.array(length)[:, None]
    return episodes(0, len(score)).replace(score=jnp.array(score), response_mask=mask)


def test_a_score_is_normalised_clipped_and_lowered_by_length():
    cfg = Config(normalize=True, clip=1.2, length_penalty=0.25)
    first, state, metrics = rewards.combine(scored([1.5, -0.5], [4, 1]), rewards.init(cfg), cfg)
    np.testing.assert_allclose(first.score, [1.0 - 4 * 0.25, -1.0 - 0.25], atol=1e-6)
    assert metrics["reward/clipped"] == 0 and metrics["reward/score_0"] == 0.5
    np.testing.assert_allclose(metrics["reward/length_penalty"], 0.625)
    # Of 1.5, -0.5, 4.5, 0.5 the mean is 1.5 and the variance 14 / 4: 3 / sqrt(3.5) is clipped, -1 / sqrt(3.5) is not.
    second, state, metrics = rewards.combine(scored([4.5, 0.5], [2, 3]), state, cfg)
    np.testing.assert_allclose(second.score, [1.2 - 0.5, -1 / np.sqrt(3.5) - 0.75], rtol=1e-5)
    assert metrics["reward/clipped"] == 0.5 and state.moments.count == 4
    np.testing.assert_allclose([metrics["reward/running_mean_0"], metrics["reward/running_std_0"]], [1.5, 3.5**0.5])


def test_clip_and_length_need_no_state():
    cfg = Config(clip=0.5, length_penalty=0.1)
    assert rewards.init(cfg) is None
    found, _, metrics = rewards.combine(scored([-3.25, 0.25], [1, 2]), rewards.Rewards(), cfg)
    np.testing.assert_allclose(found.score, [-0.6, 0.05], rtol=1e-6)
    assert metrics["reward/clipped"] == 0.5
    untouched, _, nothing = rewards.combine(scored([-3.25, 0.25], [1, 2]), rewards.Rewards(), Config())
    np.testing.assert_array_equal(untouched.score, [-3.25, 0.25])
    assert not nothing


def test_a_length_penalty_needs_responses_that_end():
    with pytest.raises(InputError, match="length_penalty has no effect with stop_at_eos=False"):
        ppo.Config(rewards=Config(length_penalty=0.1), stop_at_eos=False)


def test_running_statistics_are_the_same_on_one_device_and_eight():
    cfg = grpo.Config(rewards=Config(normalize=True, clip=1.0, length_penalty=0.02))

    def step(state, rollout, axis=None):
        state, rollout, metrics = updates.combine_rewards(state, parallel.all_gather(rollout, axis), cfg)
        return state, (rollout.score, metrics)

    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        layout = parallel.layout(devices=devices)
        compiled, state = (
            layout.step(step),
            layout.state(updates.init({"policy": jnp.zeros(1)}, TX, cfg, jax.random.key(0))),
        )
        for seed in (0, 1):
            state, found = compiled(state, layout.rows(episodes(seed)))
        results.append(jax.tree.map(np.asarray, layout.get((state.opt_state["rewards"], found))))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0][0].moments.count == 32 and 0 < results[0][1][1]["reward/clipped"] < 1


ALGORITHMS = {"ppo": ppo.Config, "grpo": grpo.Config, "rloo": rloo.Config}


def train_step(name, cfg):
    fixed = {"policy_fn": POLICY, "tx": TX, "cfg": cfg}
    if name == "ppo":
        return functools.partial(ppo.train_step, critic_fn=heads.critic(tiny.GPT), **fixed)
    return functools.partial({"grpo": grpo, "rloo": rloo}[name].train_step, **fixed)


def start(name, cfg):
    if name == "ppo":
        return ppo.init({"policy": tiny.policy(), "critic": tiny.scalar()}, TX, cfg, jax.random.key(0))
    return updates.init({"policy": tiny.policy()}, TX, cfg, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_from_the_combination_on_one_device_and_eight(name):
    group = {} if name == "ppo" else {"group": 4}
    plain = ALGORITHMS[name](minibatches=2, **group)
    several = dataclasses.replace(plain, rewards=Config(weights=(1.0, 0.5), threshold=0.0, multiplier=2.0))
    sampled = episodes(0).replace(scores=SCORES, cost=COST)
    state = start(name, several)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        layout = parallel.layout(devices=devices)
        step = layout.step(train_step(name, several))
        state, rows = layout.state(start(name, several)), layout.rows(sampled)
        for _ in range(2):  # the second with the multiplier and the moments that the first has left
            state, metrics = step(state, rows)
        results.append(jax.tree.map(np.asarray, layout.get((state.params, state.opt_state["rewards"], metrics))))
    tiny.assert_close(*results, atol=1e-5)
    _, remembered, metrics = results[0]
    assert remembered.moments.count == 32 and metrics["cost/multiplier"] == np.float32(2 * np.exp(0.2 * COST.mean()))
    alone = jax.jit(train_step(name, plain))(start(name, plain), sampled.replace(scores=None, cost=None))[0]
    assert "rewards" not in alone.opt_state
    with pytest.raises(AssertionError):
        tiny.assert_close(alone.params, results[0][0], atol=1e-5)
