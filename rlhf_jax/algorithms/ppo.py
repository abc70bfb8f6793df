"""Proximal policy optimisation for language models, with the pretraining mix of InstructGPT (PPO-ptx).

The reward of a token is `-kl_coef` times its KL to the frozen reference model; the last token also gets the reward
model's score (arXiv:1909.08593, arXiv:2203.02155). The critic is a separate network or a head on the policy's trunk,
and has its own optimiser.
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
from rlhf_jax.algorithms.advantages import extend_to_first_pad, gae, length_adaptive, token_rewards, whiten
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import KLKind, kl_estimate, masked_mean, precise
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Range, Whole
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

    minibatches: Count = 8  # parts of a rollout in each pass; each part gives one update
    clip: Positive = 0.2  # clip the probability ratio to [1 - clip, 1 + clip]
    clip_high: Positive | None = None  # clip it to [1 - clip, 1 + clip_high] instead (clip-higher, in DAPO and VAPO)

    # Weight of each nat of KL to the reference, in the reward or the loss (kl_in). This is the first value: the state
    # holds the current one, opt_state["kl_coef"], which kl_target adapts.
    kl_coef: NonNegative = 0.02
    kl_kind: KLKind = "k1"  # estimator of each token's KL to the reference: k1, k2 or k3
    kl_clamp: Positive | None = None  # clamp each token's KL estimate to [-kl_clamp, kl_clamp]
    # Subtract the KL from each token's reward, or add it to the loss, whose gradient ignores how a token changes the KL
    # of later tokens.
    kl_in: Literal["reward", "loss"] = "reward"
    kl_target: Positive | None = None  # adapt kl_coef to reach this KL, nats a response (arXiv:1909.08593); None: fixed
    kl_horizon: Positive = 10_000.0  # time scale on which kl_coef adapts, in episodes

    score_at: Literal["last", "first_pad"] = "last"  # add the score to the last token, or to the column after it
    whiten_rewards: bool = False  # scale the token rewards of a rollout to unit variance, keeping their mean
    whiten_advantages: Literal["biased", "bessel"] | None = "biased"  # whiten, with this variance estimator; None: not
    gamma: Fraction = 1.0  # discount factor of a token's reward per step
    lam: Fraction = 0.95  # lambda of generalised advantage estimation: 0 trusts the critic, 1 the sampled return
    # Give each response a lambda of 1 - 1 / (lam_alpha length) in place of lam (VAPO, arXiv:2504.05118).
    lam_alpha: Positive | None = None
    critic_lam: Fraction | None = None  # lambda of the critic's targets (arXiv:2503.01491); None: as of the advantages
    # First rollouts of a run, from which the critic alone learns: value pretraining (VAPO).
    critic_first: Whole = 0

    # Bound on the probability ratio for tokens with a negative advantage (dual-clip PPO, arXiv:1912.09729).
    dual_clip: Annotated[float, Range(above=1)] | None = None
    penalty: NonNegative | None = None  # weight of a penalty on the KL to the behaviour policy, in place of clipping
    value_clip: Positive = 0.2  # clip the critic's value to within this distance of its value at the rollout
    value_coef: NonNegative = 1.0  # weight of the value loss, which is half the squared error

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise InputError(
                "kl_in=loss with kl_kind=k1 has no effect: the gradient of k1 is 0 on average; use kl_kind=k2"
            )
        if self.penalty is not None and self.dual_clip is not None:
            raise InputError("penalty replaces the clip, so dual_clip has no effect: leave out one of them")
        if self.penalty is not None and self.clip != Config.clip:
            raise InputError("penalty replaces the clip, so clip has no effect: leave out one of them")
        if self.penalty is not None and self.clip_high is not None:
            raise InputError("penalty replaces the clip, so clip_high has no effect: leave out one of them")
        if self.lam_alpha is not None and self.lam != Config.lam:
            raise InputError(
                "lam_alpha gives each response its own lambda, so lam has no effect: leave out one of them"
            )
        if self.kl_target is None and self.kl_horizon != Config.kl_horizon:
            raise InputError("kl_horizon has no effect without kl_target: set kl_target, or leave out kl_horizon")


class Experience(struct.PyTreeNode):
    """A rollout with its advantages and value targets."""

    rollout: Rollout
    value_mask: Leaf  # [B, N] bool, the response's tokens and the column that gets the score
    reward: Leaf  # [B, N], of each token before whitening; for the records alone
    advantage: Leaf  # [B, N]
    target: Leaf  # [B, N], what the critic learns to predict


def policy_loss(
    logp: Float[Array, "B T"],
    logp_old: Float[Array, "B T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float,
    dual_clip: float | None = None,
    count: Array | None = None,
    clip_high: float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate loss, mean over valid tokens (arXiv:1707.06347, eq. 7).

        max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = exp(logp - logp_old)

    A is the advantage and rho the probability ratio to the behaviour policy. With `clip_high` the upper bound is
    1 + clip_high (arXiv:2503.14476, eq. 8); with `dual_clip` the loss of a token with A < 0 is at most -A dual_clip
    (arXiv:1912.09729, eq. 5). Metrics: `clip_fraction` is the share of tokens whose
    clipped term is strictly larger, `approx_kl` the mean of (logp - logp_old)^2 / 2. `count` replaces the number of
    valid tokens, see `masked_mean`.
    """
    log_ratio = precise(jnp.where(mask, logp - logp_old, 0.0))
    ratio = jnp.exp(log_ratio)
    advantage = jnp.where(mask, advantage, 0.0)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
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
    """The KL-penalty form of PPO's loss, mean over valid tokens (arXiv:1707.06347, eq. 8).

        -A rho + beta (rho - 1 - ln rho),  rho = exp(logp - logp_old)

    A is the advantage; the second term estimates the KL of the behaviour policy to the policy, and its mean is the
    metric `kl`.
    """
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
    """The critic's clipped squared error, mean over valid tokens.

        max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2

    V is the value, V_old the value at the time of the rollout and R the target. `clip_fraction` is the share of tokens
    whose clipped term is strictly larger.
    """
    value = precise(jnp.where(mask, value, 0.0))
    value_old, target = jnp.where(mask, value_old, 0.0), jnp.where(mask, target, 0.0)
    plain = jnp.square(value - target)
    clipped = jnp.square(jnp.clip(value, value_old - clip, value_old + clip) - target)
    loss = 0.5 * masked_mean(jnp.maximum(plain, clipped), mask, count)
    return loss, {"clip_fraction": masked_mean(clipped > plain, mask, count)}


def adapt_kl_coef(
    coef: float | Array, kl: float | Array, n: int | Array, target: int | float, horizon: int | float
) -> Float[Array, ""]:
    """The next KL coefficient, coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon) (arXiv:1909.08593, section 2.2).

    `kl` and `target` are nats a response: the sum over each response, mean over responses. `n` is the number of
    episodes since the last update, `horizon` the number over which the coefficient adapts.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coef * (1.0 + error * n / horizon), jnp.float32)


def init(params: dict[str, Params], tx: optax.GradientTransformation, cfg: Config, rng: jax.Array) -> TrainState:
    """The state before the first rollout. `params` has the entries "policy" and "critic"."""
    state = updates.init(params, tx, cfg, rng)
    return state.replace(opt_state=state.opt_state | {"kl_coef": jnp.float32(cfg.kl_coef)})


def optimizer(
    policy: optax.GradientTransformation, critic: optax.GradientTransformation, wait: int = 0
) -> optax.GradientTransformation:
    """An optimiser that applies `policy` and `critic` to the networks of these names; each clips its own norm.

    The policy and its optimiser stay as they are for the first `wait` updates.
    """
    if wait:
        policy = optax.transforms.conditionally_mask(policy, lambda step: step >= wait)
    return optax.multi_transform({"policy": policy, "critic": critic}, {"policy": "policy", "critic": "critic"})


def totals(batch: Experience) -> updates.Totals:
    """The number of tokens with an advantage, and of columns with a value target, in a batch of episodes."""
    return {"tokens": jnp.sum(batch.rollout.response_mask), "values": jnp.sum(batch.value_mask)}


def live(batch: Experience) -> Bool[Array, "B N"]:
    """A mask of the response columns that the loss depends on."""
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
    """The share that these rows have in the loss of the global minibatch, and its metrics.

        policy loss + value_coef value loss [+ kl_coef KL to the reference, if kl_in="loss"] + auxiliary losses

    The policy loss is `policy_loss`, or `penalty_policy_loss` if `penalty` is set; the last term is
    `updates.auxiliary_losses`. Each term is a mean over the tokens of the global minibatch, which `totals` counts.
    """
    rollout = batch.rollout
    mask, new_tokens = rollout.response_mask, rollout.response_mask.shape[1]
    count = totals["tokens"]
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg)
    if cfg.penalty is None:
        policy, details = policy_loss(
            logp,
            rollout.logp,
            batch.advantage,
            mask,
            cfg.clip,
            dual_clip=cfg.dual_clip,
            count=count,
            clip_high=cfg.clip_high,
        )
    else:
        policy, details = penalty_policy_loss(logp, rollout.logp, batch.advantage, mask, cfg.penalty, count)
        details["approx_kl"] = details.pop("kl")
    metrics = {"loss/policy": policy} | {f"policy/{name}": value for name, value in details.items()}
    value = critic_fn(params, rollout.tokens, rollout.mask, rollout.tokens.shape[1] - new_tokens - 1)
    critic, details = value_loss(value, rollout.value, batch.target, batch.value_mask, cfg.value_clip, totals["values"])
    metrics |= {"loss/value": critic} | {f"value/{name}": value for name, value in details.items()}
    total = policy + cfg.value_coef * critic
    if cfg.kl_in == "loss":
        metrics["loss/kl"] = masked_mean(
            kl_penalty(jnp.where(mask, logp, rollout.logp_ref), rollout.logp_ref, cfg), mask, count
        )
        total = total + kl_coef * metrics["loss/kl"]
    extra, details = updates.auxiliary_losses(params, entropy, mask, text, totals, policy_fn=policy_fn, cfg=cfg)
    return total + extra, metrics | details | {"ratio_error": updates.ratio_error(logp, rollout.logp, mask)}


def kl_penalty(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], cfg: Config) -> Float[Array, "B T"]:
    """The KL estimate of each token that `kl_coef` multiplies, in nats: `kl_kind`, clamped by `kl_clamp`."""
    kl = kl_estimate(logp, logp_ref, cfg.kl_kind)
    return kl if cfg.kl_clamp is None else jnp.clip(kl, -cfg.kl_clamp, cfg.kl_clamp)


def estimate(
    reward: Float[Array, "B T"], value: Float[Array, "B T"], mask: Bool[Array, "B T"], cfg: Config
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The advantages and value targets of `gae`, each with its lambda: `lam` or `lam_alpha`, and `critic_lam`."""
    lam = cfg.lam if cfg.lam_alpha is None else length_adaptive(mask, cfg.lam_alpha)
    advantage, target = gae(reward, value, mask, cfg.gamma, lam)
    if cfg.critic_lam is not None:
        _, target = gae(reward, value, mask, cfg.gamma, cfg.critic_lam)
    return advantage, target


def experience(rollout: Rollout, kl_coef: Array, cfg: Config) -> tuple[Experience, Metrics]:
    """The advantages and value targets of a whole rollout, and metrics of it. Whitening is over all its tokens.

    In the order of the papers: score, KL penalty, token rewards, GAE, whitening.
    """
    mask = rollout.response_mask
    value_mask = extend_to_first_pad(mask) if cfg.score_at == "first_pad" else mask
    score = updates.final_score(rollout, cfg)
    kl = kl_penalty(rollout.logp, rollout.logp_ref, cfg)
    reward = token_rewards(score, kl, mask, kl_coef if cfg.kl_in == "reward" else 0.0, value_mask)
    if rollout.token_score is not None:
        reward = reward + jnp.where(mask, rollout.token_score, 0.0)
    described = updates.describe(rollout, updates.response_score(rollout, cfg))
    metrics = described | {"reward/total": jnp.mean(jnp.sum(reward, axis=1)), "kl/coef": kl_coef}
    whitened = whiten(reward, value_mask, shift_mean=False) if cfg.whiten_rewards else reward
    advantage, target = estimate(whitened, rollout.value, value_mask, cfg)
    residual = masked_mean(jnp.square(target - rollout.value), value_mask)
    spread = masked_mean(jnp.square(target - masked_mean(target, value_mask)), value_mask)
    metrics["value/explained_variance"] = 1 - residual / jnp.maximum(spread, 1e-8)
    if cfg.whiten_advantages is not None:
        advantage = whiten(advantage, mask, ddof=int(cfg.whiten_advantages == "bessel"))
    batch = Experience(rollout=rollout, value_mask=value_mask, reward=reward, advantage=advantage, target=target)
    return batch, metrics


def assess(state: TrainState, rollout: Rollout, cfg: Config) -> tuple[TrainState, Experience, Metrics]:
    """The `experience` of a whole rollout, and the state with the statistics of its scores."""
    state, rollout, reward_metrics = updates.combine_rewards(state, rollout, cfg)
    batch, metrics = experience(rollout, state.opt_state["kl_coef"], cfg)
    return state, batch, metrics | reward_metrics


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
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches of updates on one rollout, in one compiled call. `state` is from `init`.

    Every device gathers the whole rollout, so that whitening is global. `text` is pretraining text for PPO-ptx, shaped
    as in `updates.apply`. Metrics of the rollout come from before the updates, losses are means over them.
    """
    state, batch, metrics = assess(state, parallel.all_gather(rollout, axis), cfg)
    kl_coef = state.opt_state["kl_coef"]
    objective = updates.Objective(
        loss=functools.partial(loss, kl_coef=kl_coef, policy_fn=policy_fn, critic_fn=critic_fn, cfg=cfg),
        totals=totals,
        live=live,
        balance=balance,
    )
    state, update_metrics = updates.apply(
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
        n = batch.rollout.tokens.shape[0]
        adapted = adapt_kl_coef(kl_coef, metrics["kl/reference"], n, cfg.kl_target, cfg.kl_horizon)
        moves = state.step > cfg.critic_first  # a policy that waits has no KL to adapt to
        state = state.replace(opt_state=state.opt_state | {"kl_coef": jnp.where(moves, adapted, kl_coef)})
    return state, metrics | update_metrics
