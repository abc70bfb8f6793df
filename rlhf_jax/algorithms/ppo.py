"""Proximal policy optimisation for language models, with the pretraining mix of InstructGPT (PPO-ptx).

The reward of a token is `-kl_coef` times its KL to the reference policy, plus the reward model's score at the last one
(arXiv:1909.08593, arXiv:2203.02155). The critic is a network of its own or a head on the
policy's trunk, with an optimiser of its own.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import updates
from rlhf_jax.algorithms.advantages import gae, through_first_pad, token_rewards, whiten
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import KLKind, kl_estimate, masked_mean, precise
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Range
from rlhf_jax.types import (
    InputError,
    Leaf,
    LogprobsFn,
    Metrics,
    Params,
    Rollout,
    Tokens,
    TrainState,
    ValueFn,
)


@dataclasses.dataclass(frozen=True)
class Config(updates.Config):
    """Settings of the algorithm; the defaults are InstructGPT's where its paper gives them."""

    minibatches: Count = 8  # updates a pass

    kl_coef: NonNegative = 0.02  # reward per nat of KL to the reference, at the start where it adapts
    kl_kind: KLKind = "k1"  # estimator of that KL
    kl_clamp: Positive | None = None  # bound of a token's estimate, to each side of 0
    kl_in: Literal["reward", "loss"] = (
        "reward"  # in the loss k2 has the gradient of each token's KL, blind to later ones
    )
    kl_target: Positive | None = None  # nats a response: kl_coef adapts (Ziegler et al. 2019); None keeps it fixed
    kl_horizon: Positive = 10_000.0  # episodes over which the coefficient adapts

    score_at: Literal["last", "first_pad"] = "last"  # the response's last token (its EOS), or the column after it
    whiten_rewards: bool = False  # token rewards of a rollout to unit variance; their mean stays
    whiten_advantages: Literal["biased", "bessel"] | None = "biased"  # estimator of the variance; None leaves them
    gamma: Fraction = 1.0  # discount
    lam: Fraction = 0.95  # GAE's lambda

    # bound of the ratio where the advantage is negative, above 1 (arXiv:1912.09729)
    dual_clip: Annotated[float, Range(above=1)] | None = None
    penalty: NonNegative | None = None  # weight of the KL to the sampling policy, which then replaces the clip
    value_clip: Positive = 0.2  # how far a value may move from the rollout's
    value_coef: NonNegative = 1.0  # weight of half the squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise InputError("kl_in=loss with kl_kind=k1 has no effect: the gradient of k1 is 0 on average; use k2")
        if self.penalty is not None and self.dual_clip is not None:
            raise InputError("penalty replaces the clip, so dual_clip has no effect: leave out one of them")


class Experience(struct.PyTreeNode):
    """A rollout, and what PPO makes of it."""

    rollout: Rollout
    value_mask: Leaf  # [B, N] bool, the response and where its score lands
    advantage: Leaf  # [B, N]
    target: Leaf  # [B, N], of the critic


def policy_loss(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float,
    dual_clip: float | None = None,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate (arXiv:1707.06347, eq. 7): mean over valid tokens of max(-A rho, -A clip(rho, 1 +- clip)).

    `dual_clip` bounds it by -A dual_clip where A < 0 (arXiv:1912.09729, eq. 5). `clip_fraction` is the share of tokens
    whose clipped term is strictly the larger; `approx_kl` the mean of (logp - logp_old)^2 / 2. `count` replaces the
    number of valid tokens, see `masked_mean`.
    """
    log_ratio = precise(jnp.where(mask, logp - logp_old, 0.0))
    ratio = jnp.exp(log_ratio)
    advantage = jnp.where(mask, advantage, 0.0)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    metrics = {
        "clip_fraction": masked_mean(clipped > plain, mask, count),
        "approx_kl": masked_mean(0.5 * jnp.square(log_ratio), mask, count),
    }
    surrogate = jnp.maximum(plain, clipped)
    if dual_clip is not None:
        surrogate = jnp.where(advantage < 0, jnp.minimum(surrogate, -advantage * dual_clip), surrogate)
    return masked_mean(surrogate, mask, count), metrics


def penalty_policy_loss(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    beta: float,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The KL-penalty form (arXiv:1707.06347, eq. 8): mean of -A rho + beta (rho - 1 - ln rho), over valid tokens."""
    log_ratio = precise(jnp.where(mask, logp - logp_old, 0.0))
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
    value = precise(jnp.where(mask, value, 0.0))
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


def init(params: dict[str, Params], tx: optax.GradientTransformation, cfg: Config, rng: jax.Array) -> TrainState:
    """The state before the first rollout; `params` holds "policy" and what `critic_fn` adds to it, "critic"."""
    state = updates.init(params, tx, cfg, rng)
    return state.replace(opt_state=state.opt_state | {"kl_coef": jnp.float32(cfg.kl_coef)})


def optimizer(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimiser for each network, with its own learning rate and its own clipping."""
    return optax.multi_transform({"policy": policy, "critic": critic}, {"policy": "policy", "critic": "critic"})


def totals(batch: Experience) -> updates.Totals:
    """How many tokens have an advantage, and how many a value."""
    return {"tokens": jnp.sum(batch.rollout.response_mask), "values": jnp.sum(batch.value_mask)}


def live(batch: Experience) -> Bool[Array, "B N"]:
    """Which columns of the responses have a part in the loss."""
    return batch.rollout.response_mask | batch.value_mask


def loss(
    params: dict[str, Params],
    batch: Experience,
    text: Tokens | None,
    totals: updates.Totals,
    kl_coef: float | Array = 0.0,
    *,
    policy_fn: LogprobsFn,
    critic_fn: ValueFn,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The share of these rows in: policy loss + value_coef * value loss, and what `cfg` and `text` add to them.

    That is kl_coef * KL to the reference (`kl_in="loss"`), and `updates.extras`. Each is a mean over the tokens of the
    global minibatch, whose numbers are `totals`.
    """
    rollout = batch.rollout
    mask, new_tokens = rollout.response_mask, rollout.response_mask.shape[1]
    count = totals["tokens"]
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg)
    if cfg.penalty is None:
        policy, found = policy_loss(logp, rollout.logp, batch.advantage, mask, cfg.clip, cfg.dual_clip, count)
    else:
        policy, found = penalty_policy_loss(logp, rollout.logp, batch.advantage, mask, cfg.penalty, count)
        found["approx_kl"] = found.pop("kl")
    metrics = {"loss/policy": policy} | {f"policy/{name}": value for name, value in found.items()}
    value = critic_fn(params, rollout.tokens, rollout.mask, rollout.tokens.shape[1] - new_tokens - 1)
    critic, found = value_loss(value, rollout.value, batch.target, batch.value_mask, cfg.value_clip, totals["values"])
    metrics |= {"loss/value": critic} | {f"value/{name}": value for name, value in found.items()}
    total = policy + cfg.value_coef * critic
    if cfg.kl_in == "loss":
        metrics["loss/kl"] = masked_mean(
            penalized(jnp.where(mask, logp, rollout.logp_ref), rollout.logp_ref, cfg), mask, count
        )
        total = total + kl_coef * metrics["loss/kl"]
    more, found = updates.extras(params, entropy, mask, text, totals, policy_fn=policy_fn, cfg=cfg)
    return total + more, metrics | found | {"ratio_error": updates.ratio_error(logp, rollout.logp, mask)}


def penalized(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], cfg: Config) -> Float[Array, "B T"]:
    """The KL estimate that `kl_coef` multiplies."""
    kl = kl_estimate(logp, logp_ref, cfg.kl_kind)
    return kl if cfg.kl_clamp is None else jnp.clip(kl, -cfg.kl_clamp, cfg.kl_clamp)


def experience(rollout: Rollout, kl_coef: Array, cfg: Config) -> tuple[Experience, Metrics]:
    """Rewards, advantages and value targets of a whole rollout; whitening is over all its tokens."""
    mask = rollout.response_mask
    value_mask = through_first_pad(mask) if cfg.score_at == "first_pad" else mask
    score = updates.final_score(rollout, cfg)
    kl = penalized(rollout.logp, rollout.logp_ref, cfg)
    reward = token_rewards(score, kl, mask, kl_coef if cfg.kl_in == "reward" else 0.0, value_mask)
    if rollout.token_score is not None:
        reward = reward + jnp.where(mask, rollout.token_score, 0.0)
    metrics = updates.describe(rollout, score) | {"reward/total": jnp.mean(jnp.sum(reward, axis=1)), "kl/coef": kl_coef}
    if cfg.whiten_rewards:
        reward = whiten(reward, value_mask, shift_mean=False)
    advantage, target = gae(reward, rollout.value, value_mask, cfg.gamma, cfg.lam)
    residual = masked_mean(jnp.square(target - rollout.value), value_mask)
    spread = masked_mean(jnp.square(target - masked_mean(target, value_mask)), value_mask)
    metrics["value/explained_variance"] = 1 - residual / jnp.maximum(spread, 1e-8)
    if cfg.whiten_advantages is not None:
        advantage = whiten(advantage, mask, ddof=int(cfg.whiten_advantages == "bessel"))
    return Experience(rollout=rollout, value_mask=value_mask, advantage=advantage, target=target), metrics


def train_step(
    state: TrainState,
    rollout: Rollout,
    text: Tokens | None = None,
    *,
    policy_fn: LogprobsFn,
    critic_fn: ValueFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches on one rollout, in one compiled call; `text` as in `updates.apply`: PPO-ptx.

    Every device gathers the whole rollout, so that whitening is global.
    """
    rollout = parallel.all_gather(rollout, axis)
    kl_coef = state.opt_state["kl_coef"]
    batch, metrics = experience(rollout, kl_coef, cfg)
    objective = updates.Objective(
        loss=functools.partial(loss, kl_coef=kl_coef, policy_fn=policy_fn, critic_fn=critic_fn, cfg=cfg),
        totals=totals,
        live=live,
    )
    state, found = updates.apply(
        state,
        batch,
        text,
        objective=objective,
        tx=tx,
        cfg=cfg,
        microbatches=microbatches,
        axis=axis,
    )
    if cfg.kl_target is not None:
        n = rollout.tokens.shape[0]
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl/reference"], n, cfg.kl_target, cfg.kl_horizon)
        state = state.replace(opt_state=state.opt_state | {"kl_coef": kl_coef})
    return state, metrics | found
