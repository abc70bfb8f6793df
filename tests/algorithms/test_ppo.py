import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import advantages, optim, ppo, updates
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.types import InputError, Rollout, Tokens
from tests import tiny
from tests.oracles import Case, cases

POLICY = models.part("policy", models.logprobs_fn(tiny.GPT))
LOGITS = models.bind(models.Transformer(tiny.GPT))
CRITIC = heads.critic(tiny.GPT)
CFG = ppo.Config(epochs=2, minibatches=2, kl_coef=0.1, ptx_coef=0.7)
N = 5


def optimizer():
    # The gradient of a key's bias is 0 but for rounding, and with a smaller eps Adam would make that an update.
    return ppo.optimizer(*(optim.adamw(lr, optim.Adam(eps=1e-5)) for lr in (1e-3, 3e-3)))


def step(cfg=CFG, **kwargs):
    return functools.partial(ppo.train_step, policy_fn=POLICY, critic_fn=CRITIC, tx=optimizer(), cfg=cfg, **kwargs)


@functools.cache
def compiled(cfg=CFG):
    return jax.jit(step(cfg))


def state(cfg=CFG):
    return ppo.init({"policy": tiny.policy(), "critic": tiny.scalar()}, optimizer(), cfg, jax.random.key(0))


def episodes(seed: int, rows: int = 16) -> Rollout:
    """A rollout with ragged prompts and responses; its log-probabilities are those of `state()`, slightly perturbed."""
    rng = np.random.default_rng(seed)
    tokens = jnp.array(tiny.random_tokens(seed, rows, 4 + N))
    response_mask = jnp.array(tiny.ragged(seed + 1, rows, N))
    mask = jnp.concatenate([jnp.array(tiny.ragged(seed, rows, 4, left=True)), response_mask], 1)
    logp = LOGPROBS(tiny.policy(), tokens, mask)
    noise = lambda scale: jnp.array(rng.normal(0, scale, (rows, N)), jnp.float32)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=response_mask,
        logp=jnp.where(response_mask, logp, 0.0),
        logp_ref=jnp.where(response_mask, logp + noise(0.3), 0.0),
        value=jnp.where(response_mask, noise(1.0), 0.0),
        score=jnp.array(rng.normal(0, 1, rows), jnp.float32),
        ended=jnp.array(rng.random(rows) < 0.7),
        index=jnp.arange(rows),
    )


def text(seed: int, updates: int, rows: int = 8) -> Tokens:
    segment = tiny.ragged(seed, updates * rows, 7).reshape(updates, rows, 7)
    tokens = tiny.random_tokens(seed, updates, rows, 7)
    return tiny.arrays(Tokens(tokens=tokens, segment=segment.astype(np.int32), target=segment))


def response_logprobs(params, tokens, mask):
    start = tokens.shape[1] - N - 1
    return models.logprobs_fn(tiny.GPT)(params, tokens, mask, start=start, temperature=CFG.temperature)[0]


LOGPROBS = jax.jit(response_logprobs)
MASK = jnp.array([[True, True, False]])
EPISODES = episodes(0)


# The maths ------------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    logp_old = jnp.zeros((1, 3))
    logp = jnp.log(jnp.array([[1.5, 0.5, 9.0]]))
    advantage = jnp.array([[2.0, -1.0, 5.0]])
    loss, metrics = ppo.policy_loss(logp, logp_old, advantage, MASK, 0.2)
    # max(-3, -2.4) and max(.5, .8): both are clipped.
    np.testing.assert_allclose(loss, (-2.4 + 0.8) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"], 1.0)
    np.testing.assert_allclose(metrics["approx_kl"], (np.log(1.5) ** 2 + np.log(0.5) ** 2) / 4, rtol=1e-6)


def test_clip_binds_only_where_it_makes_the_loss_larger():
    logp = jnp.log(jnp.array([[1.5, 0.5, 9.0]]))
    loss, metrics = ppo.policy_loss(logp, jnp.zeros((1, 3)), jnp.array([[-2.0, 1.0, 5.0]]), MASK, 0.2)
    np.testing.assert_allclose(loss, (3.0 - 0.5) / 2, rtol=1e-6)
    assert metrics["clip_fraction"] == 0


@cases("ppo_policy_loss", "ppo_policy_first_step", "ppo_policy_padding_overflow")
def test_policy_loss_oracle(case):
    args = (case["logp_old"], case["advantage"], case["mask"], case["eps"])
    (loss, metrics), grad = jax.value_and_grad(ppo.policy_loss, has_aux=True)(case["logp"], *args)
    case.check(loss=loss, grad_logp=grad, **metrics)
    assert np.isfinite(grad).all()


@cases("ppo_penalty_loss")
def test_penalty_policy_loss_oracle(case):
    args = (case["logp_old"], case["advantage"], case["mask"], case["beta"])
    (loss, metrics), grad = jax.value_and_grad(ppo.penalty_policy_loss, has_aux=True)(case["logp"], *args)
    case.check(loss=loss, grad_logp=grad, **metrics)


@cases("ppo_value_loss")
def test_value_loss_oracle(case):
    args = (case["value_old"], case["return"], case["mask"], case["eps_v"])
    (loss, metrics), grad = jax.value_and_grad(ppo.value_loss, has_aux=True)(case["value"], *args)
    case.check(loss=loss, grad_value=grad, **metrics)


def test_value_loss_by_hand():
    value, old, target = jnp.array([[1.5, 0.25, 9.0]]), jnp.array([[0.5, 0.0, 9.0]]), jnp.array([[2.0, -1.0, 0.0]])
    loss, metrics = ppo.value_loss(value, old, target, MASK, 0.5)
    # clip(1.5, 0..1) = 1: max(.25, 1); .25 stays: 1.5625.
    np.testing.assert_allclose(loss, 0.5 * (1.0 + 1.5625) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_fraction"], 0.5)


@cases("kl_controller", "kl_controller_varying_n")
def test_adapt_kl_coef_oracle(case):
    coef, history = case["beta_init"], []
    for kl, n in zip(case["kl"], case["n"], strict=True):
        coef = ppo.adapt_kl_coef(coef, kl, n, case["target"], case["horizon"])
        history.append(coef)
    case.check(beta=history)


# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_first_pass_ratio_is_one():
    assert compiled()(state(), episodes(0))[1]["ratio/first_error"] < 1e-5
    stale = episodes(0)
    stale = stale.replace(logp=stale.logp.at[:, 0].add(0.5))
    assert compiled()(state(), stale)[1]["ratio/first_error"] > 0.3


def run(cfg=CFG, mix=None, rollout_seed=0, steps=1):
    current, train = state(cfg), compiled(cfg)
    for _ in range(steps):
        current, metrics = train(current, episodes(rollout_seed), mix)
    return current, metrics


def difference(a, b) -> float:
    return max(float(np.max(np.abs(np.subtract(*xs)))) for xs in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# What each setting does. A change is undone by the test's own arithmetic, or seen in what the function returns; that it
# reaches the step is seen in `test_the_step_follows_its_settings`.


def rewards(cfg=CFG, **changes) -> np.ndarray:
    """Token rewards of `EPISODES`, read back from value targets: with values of 0, gamma 0 and lam 0 they are equal."""
    dull = EPISODES.replace(value=jnp.zeros_like(EPISODES.value))
    cfg = dataclasses.replace(cfg, gamma=0.0, lam=0.0, **changes)
    return np.asarray(ppo.experience(dull, jnp.float32(cfg.kl_coef), cfg)[0].target)


def test_the_score_lands_on_the_last_token_or_the_first_pad():
    lengths = np.asarray(EPISODES.response_mask).sum(axis=1)
    assert len(set(lengths)) > 2
    assert N in lengths
    score = np.asarray(EPISODES.score)
    at_last, at_pad = rewards(kl_coef=0.0), rewards(kl_coef=0.0, score_at="first_pad")
    rows = np.arange(16)
    np.testing.assert_allclose(at_last[rows, lengths - 1], score, rtol=1e-6)
    np.testing.assert_allclose(at_pad[rows, np.minimum(lengths, N - 1)], score, rtol=1e-6)  # a full row has no pad
    for array in (at_last, at_pad):
        assert np.count_nonzero(array) == 16
    batch, _ = ppo.experience(EPISODES, jnp.float32(0.1), dataclasses.replace(CFG, score_at="first_pad"))
    np.testing.assert_array_equal(np.sum(batch.value_mask, axis=1), np.minimum(lengths + 1, N))
    np.testing.assert_array_equal(batch.rollout.response_mask, EPISODES.response_mask)


def test_kl_in_the_reward():
    mask, d = np.asarray(EPISODES.response_mask), np.asarray(EPISODES.logp - EPISODES.logp_ref)
    score = rewards(kl_coef=0.0)
    np.testing.assert_allclose(rewards(kl_coef=2.0), np.where(mask, score - 2.0 * d, 0.0), atol=1e-5)
    k3 = np.expm1(-d) + d
    np.testing.assert_allclose(rewards(kl_kind="k3"), np.where(mask, score - 0.1 * k3, 0.0), atol=1e-5)
    clamped = np.clip(d, -0.2, 0.2)
    assert np.any(clamped[mask] != d[mask])
    np.testing.assert_allclose(rewards(kl_clamp=0.2), np.where(mask, score - 0.1 * clamped, 0.0), atol=1e-5)
    np.testing.assert_allclose(rewards(kl_in="loss", kl_kind="k2"), score, atol=1e-6)


def test_responses_without_an_end():
    ended, plain = np.asarray(EPISODES.ended), rewards(kl_coef=0.0).sum(axis=1)
    assert 0 < ended.sum() < 16
    replaced = rewards(kl_coef=0.0, unfinished_score=-3.0).sum(axis=1)
    np.testing.assert_allclose(replaced, np.where(ended, plain, -3.0), rtol=1e-6)
    less = rewards(kl_coef=0.0, unfinished_penalty=0.5).sum(axis=1)
    np.testing.assert_allclose(less, np.where(ended, plain, plain - 0.5), rtol=1e-5)


def test_whitening_of_rewards_and_advantages():
    mask = np.asarray(EPISODES.response_mask)
    plain, white = rewards()[mask], rewards(whiten_rewards=True)[mask]
    np.testing.assert_allclose(white, (plain - plain.mean()) / plain.std() + plain.mean(), rtol=1e-4, atol=1e-5)
    advantages = lambda kind: np.asarray(
        ppo.experience(EPISODES, jnp.float32(0.1), dataclasses.replace(CFG, whiten_advantages=kind))[0].advantage
    )[mask]
    raw = advantages(None)
    for kind, ddof in (("biased", 0), ("bessel", 1)):
        np.testing.assert_allclose(advantages(kind), (raw - raw.mean()) / raw.std(ddof=ddof), rtol=1e-4, atol=1e-5)


def test_discount_and_lambda():
    targets = lambda **changes: np.asarray(
        ppo.experience(EPISODES, jnp.float32(0.1), dataclasses.replace(CFG, **changes))[0].target
    )
    for changes in ({"gamma": 0.5}, {"lam": 0.3}):
        cfg = dataclasses.replace(CFG, **changes)
        reward, value, mask = rewards(), np.asarray(EPISODES.value), np.asarray(EPISODES.response_mask)
        expected = np.zeros_like(reward)
        for b in range(16):
            advantage = 0.0
            for t in reversed(range(int(mask[b].sum()))):
                after = value[b, t + 1] if t + 1 < mask[b].sum() else 0.0
                advantage = reward[b, t] + cfg.gamma * after - value[b, t] + cfg.gamma * cfg.lam * advantage
                expected[b, t] = advantage + value[b, t]
        np.testing.assert_allclose(targets(**changes), expected, atol=1e-5)


@functools.cache
def losses(**changes):
    """Metrics and total of the loss on `EPISODES` under parameters that did not sample them."""
    cfg = dataclasses.replace(CFG, **changes)
    params = {"policy": tiny.policy(seed=1), "critic": tiny.scalar(seed=2)}
    batch, _ = ppo.experience(EPISODES, jnp.float32(0.1), CFG)
    total, metrics = LOSS(params, batch, cfg)
    return {name: float(value) for name, value in metrics.items()} | {"total": float(total)}


LOSS = jax.jit(
    lambda params, batch, cfg: ppo.loss(
        params, batch, None, ppo.totals(batch), 0.1, policy_fn=POLICY, critic_fn=CRITIC, cfg=cfg
    ),
    static_argnums=2,
)


@pytest.mark.slow
def test_what_the_loss_is_made_of():
    plain = losses()
    np.testing.assert_allclose(plain["total"], plain["loss/policy"] + plain["loss/value"], rtol=1e-5)
    heavier = losses(value_coef=0.1)
    np.testing.assert_allclose(heavier["total"], plain["loss/policy"] + 0.1 * plain["loss/value"], rtol=1e-4)
    bold = losses(entropy_coef=0.3)
    np.testing.assert_allclose(bold["total"], plain["total"] + 0.3 * bold["loss/entropy"], rtol=1e-4)
    assert -np.log(31) < bold["loss/entropy"] < 0
    held = losses(kl_in="loss", kl_kind="k2")
    np.testing.assert_allclose(held["total"], plain["total"] + 0.1 * held["loss/kl"], rtol=1e-4)
    assert held["loss/kl"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_entropy_is_that_of_the_distribution_sampled_from(temperature):
    cfg = updates.Config(entropy_coef=0.3, temperature=temperature)
    logp, entropy = jax.jit(lambda p: updates.forward({"policy": p}, EPISODES, POLICY, cfg))(tiny.policy())
    logits = np.asarray(jax.jit(LOGITS)(tiny.policy(), EPISODES.tokens, EPISODES.mask)[:, -N - 1 : -1], np.float64)
    p = np.exp(logits / temperature)
    p /= p.sum(axis=2, keepdims=True)
    said = np.take_along_axis(p, np.asarray(EPISODES.tokens)[:, -N:, None], axis=2)[..., 0]
    np.testing.assert_allclose(logp, np.log(said), atol=1e-5)
    np.testing.assert_allclose(entropy, -np.sum(p * np.log(p), axis=2), atol=1e-5)
    mask = EPISODES.response_mask
    total, _ = updates.auxiliary_losses({}, entropy, mask, None, {"tokens": jnp.int32(7)}, policy_fn=POLICY, cfg=cfg)
    np.testing.assert_allclose(total, -0.3 * np.sum(entropy, where=np.asarray(mask)) / 7, rtol=1e-5)


@pytest.mark.slow
def test_clips_and_penalty_reach_the_loss():
    plain = losses()
    assert losses(clip=0.9)["loss/policy"] < losses(clip_high=0.9)["loss/policy"] < plain["loss/policy"]
    assert losses(dual_clip=1.01)["loss/policy"] < plain["loss/policy"]
    assert losses(value_clip=0.9)["loss/value"] < plain["loss/value"]
    penalty = losses(penalty=0.5)
    assert penalty["loss/policy"] != plain["loss/policy"]
    assert "policy/clip_fraction" not in penalty
    np.testing.assert_allclose(
        losses(penalty=1.5)["loss/policy"] - penalty["loss/policy"], penalty["policy/approx_kl"], rtol=1e-4
    )


def test_dual_clip_by_hand():
    logp = jnp.log(jnp.array([[5.0, 5.0, 9.0]]))
    loss, _ = ppo.policy_loss(logp, jnp.zeros((1, 3)), jnp.array([[-1.0, 1.0, -1.0]]), MASK, 0.2, dual_clip=3.0)
    np.testing.assert_allclose(loss, (3.0 - 1.2) / 2, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"epochs": 1}, False),
        ({"minibatches": 4}, False),
        ({"temperature": 0.5}, False),
        ({"stop_kl": 1e9}, True),
        ({"stop_kl": 0.0}, False),
    ],
    ids=str,
)
def test_the_step_follows_its_settings(change, same):
    plain, _ = run()
    changed, _ = run(dataclasses.replace(CFG, **change))
    assert (difference(plain.params, changed.params) < 1e-6) == same


@pytest.mark.slow
def test_updates_end_before_the_one_that_strays():
    cfg = dataclasses.replace(CFG, stop_kl=0.01)
    stale = EPISODES.replace(logp=EPISODES.logp - 0.5)  # approx_kl is 1/8 from the first minibatch on
    still, metrics = compiled(cfg)(state(cfg), stale)
    assert difference(still.params, state().params) == 0
    assert difference(still.opt_state, state().opt_state) == 0
    assert metrics["policy/updated"] == 0


@pytest.mark.slow
def test_the_average_of_the_weights():
    cfg = dataclasses.replace(CFG, epochs=1, minibatches=1, ema=0.75)
    first, _ = run(cfg)
    second, _ = run(cfg, steps=2)
    mean = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, state(cfg).params["policy"], first.params["policy"])
    tiny.assert_close(first.opt_state["ema"], mean, atol=1e-7)
    mean = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, mean, second.params["policy"])
    tiny.assert_close(second.opt_state["ema"], mean, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, r"epochs=0: expected more than 0"),
        ({"dual_clip": 0.9}, r"dual_clip=0\.9: expected more than 1"),
        ({"penalty": 1.0, "dual_clip": 3.0}, r"penalty replaces the clip, so dual_clip"),
        ({"penalty": 1.0, "clip": 0.1}, r"penalty replaces the clip, so clip has"),
        ({"penalty": 1.0, "clip_high": 0.3}, r"penalty replaces the clip, so clip_high has"),
        ({"lam_alpha": 0.05, "lam": 0.9}, r"lam_alpha gives each response its own lambda, so lam has no effect"),
        ({"kl_horizon": 100.0}, r"kl_horizon has no effect without kl_target"),
        ({"unfinished_score": -1.0, "unfinished_penalty": 1.0}, r"unfinished_score replaces the score"),
        ({"ema": 1.0}, r"ema=1\.0: expected at least 0 and less than 1"),
    ],
)
def test_settings_out_of_range(change, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(CFG, **change)


@pytest.mark.parametrize("name", ["gae_decoupled", "gae_decoupled_discounted", "gae_length_adaptive"])
def test_lambdas_of_policy_and_critic_oracle(name):
    case = Case(name)
    lam = {"lam_alpha": case["alpha"]} if "alpha" in case else {"lam": case["lam_policy"]}
    cfg = ppo.Config(gamma=case["gamma"], critic_lam=case["lam_critic"], **lam)
    advantage, target = ppo.estimate(case["reward"], case["value"], case["mask"], cfg)
    case.check(advantage=advantage, **{"return": target})
    if "alpha" in case:
        case.check(lam_policy=advantages.length_adaptive(case["mask"], case["alpha"]))


def test_an_experience_has_lambdas_of_its_own():
    both = lambda **settings: ppo.experience(EPISODES, jnp.float32(0.1), dataclasses.replace(CFG, **settings))[0]
    plain, critic, adaptive = both(), both(critic_lam=0.5), both(lam_alpha=0.5, critic_lam=CFG.lam)
    np.testing.assert_array_equal(plain.advantage, critic.advantage)
    np.testing.assert_array_equal(plain.target, adaptive.target)
    assert difference(plain.target, critic.target) > 0.01 and difference(plain.advantage, adaptive.advantage) > 0.01


@pytest.mark.slow
def test_the_critic_learns_first():
    cfg = dataclasses.replace(CFG, critic_first=1, kl_target=0.01, kl_horizon=100.0)
    tx = ppo.optimizer(*(optim.adamw(lr, optim.Adam(eps=1e-5)) for lr in (1e-3, 3e-3)), wait=4)
    train = jax.jit(functools.partial(ppo.train_step, policy_fn=POLICY, critic_fn=CRITIC, tx=tx, cfg=cfg))
    before = ppo.init({"policy": tiny.policy(), "critic": tiny.scalar()}, tx, cfg, jax.random.key(0))
    first, _ = train(before, EPISODES)
    assert difference(first.params["policy"], before.params["policy"]) == 0
    assert difference(first.params["critic"], before.params["critic"]) > 1e-3
    assert first.opt_state["kl_coef"] == before.opt_state["kl_coef"]  # there is no KL to adapt to
    second, _ = train(first, EPISODES)
    assert difference(second.params["policy"], first.params["policy"]) > 1e-3
    assert second.opt_state["kl_coef"] != first.opt_state["kl_coef"]


@pytest.mark.slow
def test_the_adaptive_coefficient_is_threaded_through_the_state():
    cfg = dataclasses.replace(CFG, kl_target=0.01, kl_horizon=100.0)
    after, metrics = run(cfg)
    expected = ppo.adapt_kl_coef(0.1, metrics["kl/reference"], 16, 0.01, 100.0)
    np.testing.assert_allclose(after.opt_state["kl_coef"], expected, rtol=1e-6)
    assert after.opt_state["kl_coef"] != np.float32(0.1)
    longer, _ = run(dataclasses.replace(cfg, kl_horizon=1000.0))
    assert longer.opt_state["kl_coef"] != after.opt_state["kl_coef"]
    fixed, _ = run()
    assert fixed.opt_state["kl_coef"] == np.float32(0.1)


@pytest.mark.slow
def test_ptx_adds_the_next_token_gradient_to_the_policy_alone():
    mix = text(0, 4)
    plain, mixed = run()[0], run(mix=mix)[0]
    assert difference(plain.params["policy"], mixed.params["policy"]) > 1e-6
    assert difference(plain.params["critic"], mixed.params["critic"]) == 0
    heavier = run(dataclasses.replace(CFG, ptx_coef=5.0), mix=mix)[0]
    assert difference(heavier.params["policy"], mixed.params["policy"]) > 1e-6
    # With nothing else to learn, ptx alone lowers the pretraining loss.
    cfg = dataclasses.replace(CFG, ptx_coef=10.0, kl_coef=0.0)
    dull = episodes(0).replace(score=jnp.zeros(16), value=jnp.zeros((16, N)))
    current, train, losses = state(cfg), compiled(cfg), []
    for _ in range(10):
        current, metrics = train(current, dull, mix)
        losses.append(float(metrics["loss/ptx"]))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_gradient_equals_the_sum_of_its_parts():
    # The loss of a whole minibatch is the sum of its shares, whose counts are those of the whole.
    batch, _ = ppo.experience(episodes(0), jnp.float32(0.1), CFG)
    grad = jax.jit(jax.grad(functools.partial(ppo.loss, policy_fn=POLICY, critic_fn=CRITIC, cfg=CFG), has_aux=True))
    params, totals = state().params, ppo.totals(batch)
    whole, _ = grad(params, batch, None, totals)
    halves = parallel.shard(batch, jax.devices()[:2])
    shared = jax.pmap(
        lambda p, b: jax.lax.psum(
            jax.grad(ppo.loss, has_aux=True)(p, b, None, totals, policy_fn=POLICY, critic_fn=CRITIC, cfg=CFG)[0],
            parallel.AXIS,
        ),
        axis_name=parallel.AXIS,
        devices=jax.devices()[:2],
    )(parallel.replicate(params, jax.devices()[:2]), halves)
    tiny.assert_close(whole, parallel.unreplicate(shared), atol=1e-5)


@pytest.mark.slow
def test_a_critic_on_the_policys_trunk():
    # Where a critic of its own has the policy's trunk, the values are the same, and its gradient is the policy's too.
    batch, _ = ppo.experience(episodes(0), jnp.float32(0.1), CFG)
    policy, head = tiny.policy(), {name: tiny.scalar()[name] for name in ("kernel", "bias")}
    grad = lambda critic_fn, critic: jax.jit(
        jax.grad(functools.partial(ppo.loss, policy_fn=POLICY, critic_fn=critic_fn, cfg=CFG), has_aux=True)
    )({"policy": policy, "critic": critic}, batch, None, ppo.totals(batch))
    apart, metrics = grad(CRITIC, head | {"trunk": policy})
    shared, found = grad(heads.shared_critic(tiny.GPT), head)
    assert difference(apart["policy"], shared["policy"]) > 1e-4
    np.testing.assert_allclose(found["loss/value"], metrics["loss/value"], rtol=1e-5)
    both = jax.tree.map(jnp.add, apart["policy"], apart["critic"].pop("trunk"))
    tiny.assert_close({"policy": both, "critic": apart["critic"]}, shared, atol=1e-5)


def test_what_padding_holds_reaches_nothing():
    clean = episodes(0)
    junk = lambda x: jnp.where(clean.response_mask, x, 1e6)
    dirty = clean.replace(logp=junk(clean.logp), logp_ref=junk(clean.logp_ref), value=junk(clean.value))
    train = compiled()
    tiny.assert_close(train(state(), clean)[0].params, train(state(), dirty)[0].params, atol=0)


def test_minibatches_must_divide():
    with pytest.raises(InputError, match="16 episodes do not divide into 3 minibatches"):
        jax.eval_shape(step(dataclasses.replace(CFG, minibatches=3)), state(), episodes(0))
    with pytest.raises(InputError, match="pretraining text for 3 updates, but there are 4"):
        jax.eval_shape(step(), state(), episodes(0), text(0, 3))


@pytest.mark.slow
def test_it_raises_the_score():
    # The score is the share of one token in the response: PPO must learn to say it.
    from rlhf_jax.types import Prompts

    prompts = Prompts(tokens=jnp.full((64, 2), 5), mask=jnp.ones((64, 2), bool), index=jnp.arange(64))
    cfg = ppo.Config(epochs=2, minibatches=2, kl_coef=0.01)
    tx = ppo.optimizer(optim.adamw(3e-3), optim.adamw(3e-3))
    current = ppo.init({"policy": tiny.policy(), "critic": tiny.scalar()}, tx, cfg, jax.random.key(0))
    module = models.Transformer(tiny.GPT)

    @jax.jit
    def collect(params, key, first):
        sampled = rollout.collect(
            params | {"reference": tiny.policy()},
            prompts,
            key,
            first,
            policy=module,
            cfg=sampling.Config(max_new_tokens=4, eos_id=2),
            critic_fn=CRITIC,
        )
        return sampled.replace(score=jnp.mean(sampled.tokens[:, 2:] == 7, axis=1))

    train = jax.jit(functools.partial(ppo.train_step, policy_fn=POLICY, critic_fn=CRITIC, tx=tx, cfg=cfg))
    scores = []
    for iteration in range(40):
        sampled = collect(current.params, jax.random.key(1), jnp.uint32(64 * iteration))
        current, metrics = train(current, sampled)
        assert metrics["ratio/first_error"] < 1e-4
        scores.append(float(metrics["reward/score"]))
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.3
