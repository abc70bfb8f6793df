import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, online_dpo, optim, ppo, rloo, updates
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora
from rlhf_jax.types import InputError, Rollout
from tests import tiny
from tests.algorithms.test_ppo import EPISODES, LOGPROBS, N, episodes
from tests.devices import test_shared
from tests.oracles import Case

POLICY = models.part("policy", models.logprobs_fn(tiny.GPT))
TX = optim.adamw(1e-3, optim.Adam(eps=1e-5))
ALGORITHMS = {
    "grpo": (grpo.train_step, grpo.Config(epochs=2, minibatches=2, group=4)),
    "grpo-reward": (
        grpo.train_step,
        grpo.Config(minibatches=2, group=4, kl_in="reward", scale=False, mean="token", entropy_coef=0.1),
    ),
    "gspo": (
        grpo.train_step,
        grpo.Config(minibatches=2, group=4, ratio="response", clip=0.1, clip_high=0.2, mean="constant"),
    ),
    "reinforce++": (
        grpo.train_step,
        grpo.Config(minibatches=2, group=4, baseline="both", kl_in="reward", surrogate="cispo", mean="token"),
    ),
    "rloo": (rloo.train_step, rloo.Config(epochs=2, minibatches=2, group=4)),
    "online_dpo": (online_dpo.train_step, online_dpo.Config(epochs=2, minibatches=2, group=4)),
}
BOTH = pytest.mark.parametrize("name", ALGORITHMS)


def init(cfg):
    return updates.init({"policy": tiny.policy()}, TX, cfg, jax.random.key(0))


def step(name):
    train_step, cfg = ALGORITHMS[name]
    return functools.partial(train_step, policy_fn=POLICY, tx=TX, cfg=cfg), cfg


@functools.cache
def compiled(name):
    return jax.jit(step(name)[0])


@pytest.mark.slow
@BOTH
def test_the_first_pass_has_ratio_one(name):
    _, cfg = step(name)
    logp = LOGPROBS(tiny.policy(), EPISODES.tokens, EPISODES.mask)
    sampled = EPISODES.replace(logp=jnp.where(EPISODES.response_mask, logp, 0.0))
    assert compiled(name)(init(cfg), sampled)[1]["ratio/first_error"] < 1e-4
    off = sampled.replace(logp=sampled.logp.at[0, 0].add(0.1))
    assert compiled(name)(init(cfg), off)[1]["ratio/first_error"] > 0.05


def totals(module, batch, cfg):
    return module.totals(batch, cfg) if module is grpo else module.totals(batch)


def gradient(module, cfg, rollout):
    """Of the loss of a whole rollout, at the policy that sampled it."""
    batch, _ = module.experience(rollout, cfg)
    count = totals(module, batch, cfg)
    loss = lambda p: module.loss({"policy": p}, batch, None, count, policy_fn=POLICY, cfg=cfg)[0]
    return jax.jit(jax.grad(loss))(tiny.policy())


def on_policy(seed: int = 0):
    sampled = episodes(seed)
    logp = LOGPROBS(tiny.policy(), sampled.tokens, sampled.mask)
    return sampled.replace(logp=jnp.where(sampled.response_mask, logp, 0.0))


def reinforce(weight):
    """Gradient of -sum(weight * logp)."""
    sampled = on_policy()

    def objective(params):
        return -jnp.sum(jnp.where(sampled.response_mask, weight * LOGPROBS(params, sampled.tokens, sampled.mask), 0.0))

    return jax.jit(jax.grad(objective))(tiny.policy())


@pytest.mark.slow
def test_rloo_is_reinforce_with_the_others_as_baseline():
    sampled, cfg = on_policy(), rloo.Config(group=4, kl_coef=0.5)
    kl = np.sum((sampled.logp - sampled.logp_ref) * sampled.response_mask, axis=1)
    reward = (np.asarray(sampled.score) - 0.5 * kl).reshape(-1, 4)
    advantage = (reward - (reward.sum(1, keepdims=True) - reward) / 3).reshape(-1, 1)
    tiny.assert_close(gradient(rloo, cfg, sampled), reinforce(advantage / 16), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_grpo_weighs_tokens_as_it_says(scale, mean):
    sampled = on_policy()
    cfg = grpo.Config(group=4, kl_coef=0.0, scale=scale, mean=mean)
    score = np.asarray(sampled.score).reshape(-1, 4)
    advantage = score - score.mean(1, keepdims=True)
    if scale:
        advantage = advantage / (score.std(1, keepdims=True) + 1e-4)
    lengths = np.asarray(sampled.response_mask).sum(1)
    per_token = 1 / (16 * lengths) if mean == "sequence" else np.full(16, 1 / lengths.sum())
    expected = reinforce((advantage.reshape(-1) * per_token)[:, None])
    tiny.assert_close(gradient(grpo, cfg, sampled), expected, atol=1e-5)


def test_grpo_adds_k3_to_the_loss_or_k1_to_the_reward():
    sampled = on_policy()
    d = np.asarray((sampled.logp - sampled.logp_ref) * sampled.response_mask)
    lengths = np.asarray(sampled.response_mask).sum(1)
    for mean, weight in {"sequence": 1 / (16 * lengths[:, None]), "token": 1 / lengths.sum()}.items():
        cfg = grpo.Config(group=4, kl_coef=0.3, mean=mean)
        batch, _ = grpo.experience(sampled, cfg)
        value, metrics = jax.jit(functools.partial(grpo.loss, policy_fn=POLICY, cfg=cfg))(
            {"policy": tiny.policy()}, batch, None, totals(grpo, batch, cfg)
        )
        k3 = np.sum((np.exp(-d) - 1 + d) * weight)
        np.testing.assert_allclose(metrics["loss/kl"], k3, rtol=1e-4)
        np.testing.assert_allclose(value, metrics["loss/policy"] + 0.3 * k3, rtol=1e-4)
    batch, _ = grpo.experience(sampled, grpo.Config(group=4, kl_coef=0.3, kl_in="reward", scale=False))
    reward = (np.asarray(sampled.score) - 0.3 * d.sum(1)).reshape(-1, 4)
    np.testing.assert_allclose(batch.advantage, (reward - reward.mean(1, keepdims=True)).reshape(-1), atol=1e-5)


def test_rloo_clips_the_ratio_of_whole_responses():
    sampled = on_policy()
    cfg = rloo.Config(group=2, kl_coef=0.0, clip=0.2)
    # The policy that sampled is off by .1 a token: responses of two tokens or more are beyond the clip.
    off = sampled.replace(logp=jnp.where(sampled.response_mask, sampled.logp - 0.1, 0.0))
    batch, _ = rloo.experience(off, cfg)
    _, metrics = jax.jit(functools.partial(rloo.loss, policy_fn=POLICY, cfg=cfg))(
        {"policy": tiny.policy()}, batch, None, totals(rloo, batch, cfg)
    )
    lengths = np.asarray(off.response_mask).sum(1)
    beyond = (np.exp(0.1 * lengths) > 1.2) & (np.asarray(batch.advantage) > 0)
    np.testing.assert_allclose(metrics["policy/clip_fraction"], beyond.mean(), atol=1e-6)


@pytest.mark.parametrize("clip", [0.2, 0.5])
@pytest.mark.parametrize("module", [grpo, rloo])
def test_the_clip_bounds_the_ratio(module, clip):
    """The policy that sampled is off by .3 a token, up or down: GRPO clips each token's ratio, RLOO the response's."""
    sampled = on_policy()
    shift = np.where(np.arange(16) % 2, 0.3, -0.3)
    sampled = sampled.replace(logp=sampled.logp - jnp.array(shift[:, None], jnp.float32) * sampled.response_mask)
    cfg = module.Config(group=4, kl_coef=0.0, clip=clip)
    batch, _ = module.experience(sampled, cfg)
    value, _ = jax.jit(functools.partial(module.loss, policy_fn=POLICY, cfg=cfg))(
        {"policy": tiny.policy()}, batch, None, totals(module, batch, cfg)
    )
    ratio = np.exp(shift if module is grpo else shift * np.asarray(sampled.response_mask).sum(axis=1))
    advantage = np.asarray(batch.advantage)
    expected = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize(("module", "group"), [(grpo, 1), (rloo, 1)])
def test_a_group_of_one_is_refused(module, group):
    with pytest.raises(InputError, match="group=1"):
        module.Config(group=group)


def test_episodes_that_do_not_divide_into_groups():
    with pytest.raises(InputError, match="16 episodes do not divide into groups of 5"):
        rloo.experience(EPISODES, rloo.Config(group=5))


def test_unfinished_responses_are_scored_as_told():
    cfg = grpo.Config(group=4, unfinished_score=-2.0, scale=False)
    _, metrics = grpo.experience(EPISODES, cfg)
    expected = np.where(EPISODES.ended, EPISODES.score, -2.0).mean()
    np.testing.assert_allclose(metrics["reward/score"], expected, rtol=1e-5)


@pytest.mark.slow
def test_ppo_without_value_or_lambda_is_a_policy_gradient_too():
    """With a critic that knows nothing, lambda 1 and no whitening, PPO's first gradient is REINFORCE's."""
    sampled = on_policy().replace(value=jnp.zeros((16, N)))
    cfg = ppo.Config(lam=1.0, whiten_advantages=None, kl_coef=0.0, value_coef=0.0)
    batch, _ = ppo.experience(sampled, jnp.float32(0.0), cfg)
    critic_fn = lambda params, tokens, mask, start: jnp.zeros_like(tokens[:, start:-1], jnp.float32)
    loss = functools.partial(ppo.loss, policy_fn=POLICY, critic_fn=critic_fn, cfg=cfg)
    grad = jax.jit(jax.grad(lambda p: loss({"policy": p, "critic": ()}, batch, None, ppo.totals(batch))[0]))(
        tiny.policy()
    )
    count = np.asarray(sampled.response_mask).sum()
    tiny.assert_close(grad, reinforce(np.asarray(sampled.score)[:, None] / count), atol=1e-5)
    assert optax.tree.norm(grad) > 0


def on_shared_prompts() -> Rollout:
    """Two groups of eight responses of up to 5 tokens, to prompts of up to 6."""
    tokens, mask = tiny.arrays(test_shared.rows_that_share(0, rows=16, group=8, prompt=6, answer=N))
    rng = np.random.default_rng(0)
    logp, _ = models.logprobs_fn(tiny.GPT)(tiny.policy(), tokens, mask, start=5)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
    return tiny.arrays(
        Rollout(
            tokens=tokens,
            mask=mask,
            response_mask=mask[:, 6:],
            logp=jnp.where(mask[:, 6:], logp + 0.1 * draw(16, N), 0.0),
            logp_ref=jnp.where(mask[:, 6:], logp + 0.1 * draw(16, N), 0.0),
            ended=rng.random(16) < 0.5,
            index=np.arange(16),
            score=draw(16),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "rank", "devices", "buckets", "microbatches"),
    [(rloo, None, parallel.Config(), 1, 2), (grpo, 2, parallel.Config(fsdp=2), 2, 1)],
    ids=["pmap", "mesh"],
)
def test_prompts_that_a_group_shares_change_nothing(module, rank, devices, buckets, microbatches):
    """Two minibatches of a group each, on devices and parts that each have some of it; also of adapters."""
    tx, found, adapters = optax.sgd(0.1), [], lora.Config(rank=rank)
    trained, base = lora.split(tiny.policy(), adapters, jax.random.key(1))
    if rank:
        trained = jax.tree.map(lambda x: x + 0.1, trained)
    layout = parallel.layout(devices, jax.devices()[:2])
    for place, share, settings, parts in (
        (parallel.Pmap(tuple(jax.devices()[:1])), False, {}, 1),
        (layout, True, {"buckets": buckets}, microbatches),
    ):
        cfg = module.Config(minibatches=2, group=8, whole_groups=True, entropy_coef=0.1, **settings)
        config = dataclasses.replace(tiny.GPT, compute=models.Compute(share_prompts=share))
        make = lambda on, config=config, cfg=cfg, parts=parts: functools.partial(
            module.train_step,
            policy_fn=models.part("policy", on(models.logprobs_fn(config))),
            tx=tx,
            cfg=cfg,
            microbatches=parts,
        )
        state = place.state(updates.init({"policy": trained}, tx, cfg, jax.random.key(0)))
        step = place.step(lora.on_base(adapters, make))
        state, metrics = step(state, place.state(base), place.rows(on_shared_prompts()))
        found.append(jax.tree.map(np.asarray, place.get((state.params, metrics))))
    tiny.assert_close(found[1], found[0], atol=5e-5)
    assert found[0][1]["grad_norm/policy"] > 0.05


@pytest.mark.parametrize(
    ("prompt", "settings", "kept"),
    [
        (6, {}, 8),  # one minibatch has them all
        (6, {"minibatches": 2}, 1),  # a short prompt
        (6, {"minibatches": 2, "whole_groups": True}, 8),
        (64, {"minibatches": 2}, 8),
        (64, {"minibatches": 2, "whole_groups": False}, 1),
        (64, {"minibatches": 4}, 1),  # among which two groups do not divide
    ],
)
def test_minibatches_of_whole_groups(prompt, settings, kept):
    sampled, cfg = on_shared_prompts(), grpo.Config(group=8, **settings)
    wider = sampled.replace(tokens=jnp.pad(sampled.tokens, ((0, 0), (prompt - 6, 0))))
    assert updates.shared_group(wider, cfg, cfg.group, cfg.whole_groups) == kept


def test_groups_that_do_not_divide_into_minibatches():
    cfg = grpo.Config(group=8, minibatches=4, whole_groups=True)
    with pytest.raises(InputError, match="2 groups of episodes do not divide into 4 minibatches"):
        grpo.train_step(init(cfg), on_shared_prompts(), policy_fn=POLICY, tx=TX, cfg=cfg)


def test_what_padding_holds_reaches_no_gradient():
    """After the end of a response stands a token that the policy all but excludes: its k3 would overflow."""
    sampled = on_policy()
    cfg = grpo.Config(group=4, kl_coef=1.0)

    def policy_fn(params, tokens, mask, **kwargs):
        logp, entropy = POLICY(params, tokens, mask, **kwargs)
        return jnp.where(sampled.response_mask, logp, logp - 200.0), entropy

    batch, _ = grpo.experience(sampled, cfg)
    count = totals(grpo, batch, cfg)
    loss = lambda p: grpo.loss({"policy": p}, batch, None, count, policy_fn=policy_fn, cfg=cfg)[0]
    assert jnp.isfinite(optax.tree.norm(jax.jit(jax.grad(loss))(tiny.policy())))


# Its kin --------------------------------------------------------------------------------------------------------------


def surrogate(case, cfg):
    """The loss of a case's log-probabilities by `grpo.loss`, as a function of them, and its metrics."""
    mask = case["mask"]
    wide = 12 if cfg.mean == "constant" else mask.shape[1]  # the constant denominator is rows times max_tokens
    pad = lambda x: jnp.pad(x, ((0, 0), (0, wide - mask.shape[1])))
    advantage = case["advantage"]
    rollout = episodes(0).replace(
        logp=pad(case["logp_old"]),
        response_mask=pad(mask),
        logp_ref=pad(case["logp_ref" if "logp_ref" in case else "logp_old"]),
    )
    batch = grpo.Experience(rollout=rollout, advantage=pad(advantage) if advantage.ndim == 2 else advantage)
    totals = grpo.totals(batch, cfg)

    def loss(logp):
        given = lambda *args, **kwargs: (pad(logp), None)
        return grpo.loss({}, batch, None, totals, policy_fn=given, cfg=cfg)

    return jax.value_and_grad(loss, has_aux=True)(case["logp"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("policy_token_mean", {"clip_high": 0.28, "mean": "token"}),
        ("policy_token_mean_token_advantage", {"clip_high": 0.28, "mean": "token"}),
        ("policy_sequence_mean", {}),
        ("policy_sequence_mean_kl", {"kl_coef": 0.04}),
        ("policy_sequence_mean_kl_padding_overflow", {"kl_coef": 0.04}),
        ("policy_constant_denominator", {"mean": "constant"}),
        ("gspo", {"ratio": "response", "clip": 0.04, "clip_high": 0.07}),
        ("gspo_padding_overflow", {"ratio": "response", "clip": 0.04, "clip_high": 0.07}),
        ("gspo_token", {"ratio": "response", "clip": 0.04, "clip_high": 0.07}),
        ("cispo", {"surrogate": "cispo", "clip": 1.0, "clip_high": 0.6, "mean": "token"}),
        ("cispo_two_sided", {"surrogate": "cispo", "clip": 0.35, "clip_high": 0.6, "mean": "token"}),
        ("cispo_two_sided_padding_overflow", {"surrogate": "cispo", "clip": 0.35, "clip_high": 0.6, "mean": "token"}),
    ],
)
def test_surrogates_are_the_oracles(name, settings):
    case = Case(name)
    cfg = grpo.Config(**{"kl_coef": 0.0, "clip": 0.2, **settings})
    assert case["eps_low"] == cfg.clip and case["eps_high"] == (cfg.clip_high or cfg.clip)
    (value, metrics), gradient = surrogate(case, cfg)
    case.check(loss=value, grad_logp=gradient)
    if not name.startswith("gspo") or name == "gspo_token":  # theirs counts rows
        case.check(clip_fraction=metrics["policy/clip_fraction"])


def test_advantages_over_the_whole_batch_are_the_oracles():
    case = Case("reinforce_pp_advantage")
    rollout = episodes(0).replace(
        logp=case["logp_old"], logp_ref=case["logp_ref"], response_mask=case["mask"], score=case["score"]
    )
    cfg = grpo.Config(baseline="batch", kl_in="reward", kl_coef=case["beta"])
    case.check(advantage=grpo.token_advantages(rollout, case["score"], cfg))


def test_advantages_by_hand():
    """Two groups of two, of lengths 1 and 2: minus the group's mean, then over all tokens."""
    rollout = episodes(0).replace(
        logp=jnp.zeros((4, 2)),
        logp_ref=jnp.array([[0.0, 0.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]),
        response_mask=jnp.array([[1, 0], [1, 1], [1, 0], [1, 0]], bool),
    )
    score = jnp.array([1.0, 3.0, 5.0, 5.0])
    raw = np.array([-1.0, 1.0, 1.0, 0.0, 0.0])
    expected = (raw - raw.mean()) / raw.std()
    found = grpo.token_advantages(rollout, score, grpo.Config(group=2, baseline="both"))
    np.testing.assert_allclose(found[rollout.response_mask], expected, rtol=1e-5)
    assert found[0, 1] == 0
    raw = np.array([1.0, 3.0 - 2 * 0.5, 3.0 - 0.5, 5.0, 5.0])  # minus the KL that is still to come
    expected = (raw - raw.mean()) / raw.std()
    found = grpo.token_advantages(rollout, score, grpo.Config(baseline="batch", kl_in="reward", kl_coef=0.5))
    np.testing.assert_allclose(found[rollout.response_mask], expected, rtol=1e-5)
    with pytest.raises(InputError, match="scale=False has no effect with baseline=both"):
        grpo.Config(baseline="both", scale=False)


def test_long_responses_lose_score():
    case = Case("overlong_penalty")
    case.check(penalty=updates.overlong_penalty(case["length"], case["max_length"], case["cache"]))
    np.testing.assert_allclose(updates.overlong_penalty(jnp.array([2, 3, 4, 5, 6]), 5, 2), [0, 0, -0.5, -1, -1])
    with pytest.raises(InputError, match=f"soft_limit=99: expected at most max_new_tokens, {N}"):
        grpo.experience(EPISODES, grpo.Config(group=4, soft_limit=99))


@pytest.mark.slow
def test_flat_groups_make_room():
    """Groups 0 and 2 are flat; the first of the fresh ones is, too."""
    first = EPISODES.replace(score=jnp.array([1, 1, 1, 2, 0, 0, 3, 4], jnp.float32).repeat(2))
    fresh = EPISODES.replace(
        score=10 + jnp.array([7, 7, 8, 9, 5, 5, 5, 5], jnp.float32).repeat(2), index=EPISODES.index + 16
    )
    refill = functools.partial(grpo.refill, group=4, cfg=grpo.Config())
    kept, flat = refill(first, fresh)
    assert flat == 1 and kept.score.reshape(4, 4)[:, 0].tolist() == [1, 3, 18, 1]
    np.testing.assert_array_equal(kept.index[8:12], fresh.index[4:8])
    ordered, flat = refill(first, None)
    assert flat == 2 and ordered.score.reshape(4, 4)[:, 0].tolist() == [1, 3, 1, 0]
