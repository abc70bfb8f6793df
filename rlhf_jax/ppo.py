"""Proximal policy optimisation for language models, with the pretraining mix of InstructGPT (PPO-ptx).

The reward of a token is `-kl_coef` times its KL to the reference policy, plus the reward model's score at the last one
(arXiv:1909.08593, arXiv:2203.02155). The critic is a network of its own, with an optimiser of its own.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax import parallel, sft
from rlhf_jax.advantages import gae, token_rewards, whiten
from rlhf_jax.logprobs import KLKind, kl_estimate, masked_mean
from rlhf_jax.rollout import response_logprobs
from rlhf_jax.types import InputError, Leaf, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the algorithm; the defaults are InstructGPT's where its paper gives them."""

    epochs: int = 1  # passes over each rollout
    minibatches: int = 8  # updates a pass
    clip: float = 0.2  # of the probability ratio, to each side of 1
    value_clip: float = 0.2  # how far a value may move from the rollout's
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda
    kl_coef: float = 0.02  # reward per nat of KL to the reference, at the start where it adapts
    kl_kind: KLKind = "k1"  # estimator of that KL
    kl_target: float | None = (
        None  # nats a response; None keeps kl_coef fixed, a target adapts it (Ziegler et al. 2019)
    )
    kl_horizon: float = 10_000.0  # episodes over which the coefficient adapts
    ptx_coef: float = 27.8  # weight of the pretraining loss where a rollout comes with pretraining text
    unfinished_score: float | None = None  # replaces the score of a response without EOS
    temperature: float = 1.0  # of sampling, and so of every log-probability

    def __post_init__(self) -> None:
        for name in ("epochs", "minibatches", "temperature", "kl_horizon"):
            if getattr(self, name) <= 0:
                raise InputError(f"ppo.{name}={getattr(self, name)}: expected more than 0")


class Experience(struct.PyTreeNode):
    """What one row of a minibatch needs."""

    tokens: Leaf  # [B, P + N]
    mask: Leaf  # [B, P + N]
    response_mask: Leaf  # [B, N]
    logp: Leaf  # [B, N]
    value: Leaf  # [B, N]
    advantage: Leaf  # [B, N]
    target: Leaf  # [B, N]


def policy_loss(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate (arXiv:1707.06347, eq. 7): mean over valid tokens of max(-A rho, -A clip(rho, 1 +- clip)).

    `clip_fraction` is the share of tokens whose clipped term is strictly the larger; `approx_kl` the mean of
    (logp - logp_old)^2 / 2. `count` replaces the number of valid tokens, see `masked_mean`.
    """
    log_ratio = jnp.where(mask, logp - logp_old, 0.0).astype(jnp.float32)
    ratio = jnp.exp(log_ratio)
    advantage = jnp.where(mask, advantage, 0.0)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    metrics = {
        "clip_fraction": masked_mean(clipped > plain, mask, count),
        "approx_kl": masked_mean(0.5 * jnp.square(log_ratio), mask, count),
    }
    return masked_mean(jnp.maximum(plain, clipped), mask, count), metrics


def penalty_policy_loss(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    beta: float,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The KL-penalty form (arXiv:1707.06347, eq. 8): mean of -A rho + beta (rho - 1 - ln rho), over valid tokens."""
    log_ratio = jnp.where(mask, logp - logp_old, 0.0).astype(jnp.float32)
    ratio = jnp.exp(log_ratio)
    kl = ratio - 1 - log_ratio
    loss = masked_mean(-jnp.where(mask, advantage, 0.0) * ratio + beta * kl, mask, count)
    return loss, {"kl": masked_mean(kl, mask, count)}


def value_loss(
    value: Float[Array, "B T"],
    value_old: Float[Array, "B T"],
    target: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped squared error: mean over valid tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2."""
    value = jnp.where(mask, value, 0.0).astype(jnp.float32)
    value_old, target = jnp.where(mask, value_old, 0.0), jnp.where(mask, target, 0.0)
    plain = jnp.square(value - target)
    clipped = jnp.square(jnp.clip(value, value_old - clip, value_old + clip) - target)
    loss = 0.5 * masked_mean(jnp.maximum(plain, clipped), mask, count)
    return loss, {"clip_fraction": masked_mean(clipped > plain, mask, count)}


def adapt_kl_coef(
    coef: float | Array, kl: float | Array, n: int | Array, target: int | float, horizon: int | float
) -> Float[Array, ""]:
    """The next KL coefficient: coef (1 + clip(kl / target - 1, +-0.2) n / horizon) (Ziegler et al. 2019, section 2.2).

    `kl` is summed over each response, mean over responses; `n` is the number of episodes since the last update.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coef * (1.0 + error * n / horizon), jnp.float32)


def init(params: dict[str, Params], tx: optax.GradientTransformation, cfg: Config, rng: Array) -> TrainState:
    """The state before the first step: the optimiser's, and the KL coefficient. `params`: "policy" and "critic"."""
    opt_state = {"optimizer": tx.init(params), "kl_coef": jnp.float32(cfg.kl_coef)}
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng)


def optimizer(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser for each network, with its own learning rate and its own clipping."""
    return optax.multi_transform({"policy": policy, "critic": critic}, {"policy": "policy", "critic": "critic"})


def loss(
    params: dict[str, Params],
    batch: Experience,
    text: Tokens | None,
    *,
    policy_fn: Callable,
    critic_fn: Callable,
    cfg: Config,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """This device's share of: clipped surrogate + clipped value error + ptx_coef * next-token loss on `text`.

    Each is a mean over the tokens of the global minibatch.
    """
    mask = batch.response_mask
    count = parallel.psum(jnp.sum(mask), axis)
    new_tokens = mask.shape[1]
    logp = response_logprobs(policy_fn, params["policy"], batch.tokens, batch.mask, new_tokens, cfg.temperature)
    value = critic_fn(params["critic"], batch.tokens, batch.mask)[:, -new_tokens - 1 : -1]
    policy, policy_metrics = policy_loss(logp, batch.logp, batch.advantage, mask, cfg.clip, count)
    critic, critic_metrics = value_loss(value, batch.value, batch.target, mask, cfg.value_clip, count)
    metrics = {
        "loss/policy": policy,
        "loss/value": critic,
        "policy/clip_fraction": policy_metrics["clip_fraction"],
        "policy/approx_kl": policy_metrics["approx_kl"],
        "value/clip_fraction": critic_metrics["clip_fraction"],
    }
    total = policy + critic
    if text is not None:
        targets = parallel.psum(jnp.sum(text.target[:, 1:]), axis)
        metrics["loss/ptx"] = sft.loss(params["policy"], text, policy_fn, count=targets)
        total = total + cfg.ptx_coef * metrics["loss/ptx"]
    # Not a share but a maximum, so kept apart from what is summed over devices.
    metrics["ratio_error"] = jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(logp - batch.logp)), 0.0))
    return total, metrics


def experience(rollout: Rollout, kl_coef: Array, cfg: Config) -> tuple[Experience, Metrics]:
    """Rewards, advantages and value targets of a whole rollout; advantages are whitened over all its tokens."""
    mask = rollout.response_mask
    score = rollout.score
    if cfg.unfinished_score is not None:
        score = jnp.where(rollout.ended, score, cfg.unfinished_score)
    reward = token_rewards(score, kl_estimate(rollout.logp, rollout.logp_ref, cfg.kl_kind), mask, kl_coef)
    advantage, target = gae(reward, rollout.value, mask, cfg.gamma, cfg.lam)
    residual = masked_mean(jnp.square(target - rollout.value), mask)
    spread = masked_mean(jnp.square(target - masked_mean(target, mask)), mask)
    metrics = {
        "reward/score": jnp.mean(score),
        "reward/total": jnp.mean(jnp.sum(reward, axis=1)),
        "kl/reference": jnp.mean(jnp.sum(jnp.where(mask, rollout.logp - rollout.logp_ref, 0.0), axis=1)),
        "kl/coef": kl_coef,
        "policy/entropy": masked_mean(-rollout.logp, mask),  # estimated from the sampled tokens
        "value/explained_variance": 1 - residual / jnp.maximum(spread, 1e-8),
        "response/tokens": jnp.mean(jnp.sum(mask, axis=1)),
        "response/ended": jnp.mean(rollout.ended),
    }
    batch = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=mask,
        logp=rollout.logp,
        value=rollout.value,
        advantage=whiten(advantage, mask),
        target=target,
    )
    return batch, metrics


def train_step(
    state: TrainState,
    rollout: Rollout,
    text: Tokens | None = None,
    *,
    policy_fn: Callable,
    critic_fn: Callable,
    tx: optax.GradientTransformation,
    cfg: Config,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches on one rollout, in one compiled call.

    `text`, where given, holds pretraining rows for each update, `[epochs * minibatches, B, T]`: the mix of PPO-ptx.
    Every device gathers the whole rollout, so that whitening is global and minibatch m consists of the same episodes
    however many devices share its rows. `ratio/first_error` is the largest |ratio - 1| of the first minibatch, before
    any update: anything but rounding means that what was sampled is not what is scored.
    """
    rollout = parallel.all_gather(rollout, axis)
    episodes = rollout.tokens.shape[0]
    if episodes % cfg.minibatches:
        raise InputError(f"{episodes} episodes do not divide into {cfg.minibatches} minibatches")
    updates = cfg.epochs * cfg.minibatches
    if text is not None and text.tokens.shape[0] != updates:
        raise InputError(f"pretraining text for {text.tokens.shape[0]} updates, but there are {updates}")
    kl_coef = state.opt_state["kl_coef"]
    batch, metrics = experience(rollout, kl_coef, cfg)

    key = jax.random.fold_in(state.rng, state.step)
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), episodes))
    rows = order(jnp.arange(cfg.epochs)).reshape(updates, -1)

    def update(carry: tuple[Params, optax.OptState], inputs: tuple[Array, Tokens | None]) -> tuple[tuple, Metrics]:
        params, opt_state = carry
        rows, text = inputs
        mine = jax.tree.map(lambda x: x[parallel.own_rows(rows, axis)], batch)
        grads, metrics = jax.grad(loss, has_aux=True)(
            params, mine, text, policy_fn=policy_fn, critic_fn=critic_fn, cfg=cfg, axis=axis
        )
        worst = parallel.pmax(metrics.pop("ratio_error"), axis)
        grads, metrics = parallel.psum((grads, metrics), axis)
        changes, opt_state = tx.update(grads, opt_state, params)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}
        return (optax.apply_updates(params, changes), opt_state), metrics | {"ratio_error": worst}

    carry = (state.params, state.opt_state["optimizer"])
    (params, opt_state), history = jax.lax.scan(update, carry, (rows, text))
    metrics["ratio/first_error"] = history.pop("ratio_error")[0]
    metrics |= jax.tree.map(jnp.mean, history)
    if cfg.kl_target is not None:
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl/reference"], episodes, cfg.kl_target, cfg.kl_horizon)
    opt_state = {"optimizer": opt_state, "kl_coef": kl_coef}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics
