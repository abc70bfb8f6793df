"""Proximal policy optimisation for language models, with the pretraining mix of InstructGPT (PPO-ptx).

The reward of a token is `-kl_coef` times its KL to the reference policy, plus the reward model's score at the last one
(arXiv:1909.08593, arXiv:2203.02155). The critic is a network of its own, with an optimiser of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax import parallel, sft
from rlhf_jax.advantages import gae, through_first_pad, token_rewards, whiten
from rlhf_jax.logprobs import KLKind, entropy, kl_estimate, masked_mean, token_logprobs
from rlhf_jax.rollout import response_logits
from rlhf_jax.types import InputError, Leaf, Metrics, Params, Rollout, Tokens, TrainState, check_positive


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the algorithm; the defaults are InstructGPT's where its paper gives them."""

    epochs: int = 1  # passes over each rollout
    minibatches: int = 8  # updates a pass
    temperature: float = 1.0  # of sampling, and so of every log-probability
    stop_at_eos: bool = True  # False: responses go on, and all their tokens are trained on (Ziegler et al. 2019)

    kl_coef: float = 0.02  # reward per nat of KL to the reference, at the start where it adapts
    kl_kind: KLKind = "k1"  # estimator of that KL
    kl_clamp: float | None = None  # bound of a token's estimate, to each side of 0
    kl_in: Literal["reward", "loss"] = (
        "reward"  # in the loss k2 has the gradient of each token's KL, blind to later ones
    )
    kl_target: float | None = None  # nats a response: kl_coef adapts (Ziegler et al. 2019); None keeps it fixed
    kl_horizon: float = 10_000.0  # episodes over which the coefficient adapts

    score_at: Literal["last", "first_pad"] = "last"  # the response's last token (its EOS), or the column after it
    unfinished_score: float | None = None  # replaces the score of a response without EOS
    unfinished_penalty: float = 0.0  # subtracted from the score of a response without EOS
    whiten_rewards: bool = False  # token rewards of a rollout to unit variance; their mean stays
    whiten_advantages: Literal["biased", "bessel"] | None = "biased"  # estimator of the variance; None leaves them
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda

    clip: float = 0.2  # of the probability ratio, to each side of 1
    dual_clip: float | None = None  # bound of the ratio where the advantage is negative, above 1 (arXiv:1912.09729)
    penalty: float | None = None  # weight of the KL to the sampling policy, which then replaces the clip
    value_clip: float = 0.2  # how far a value may move from the rollout's
    value_coef: float = 1.0  # weight of half the squared error
    entropy_coef: float = 0.0  # weight of the policy's entropy
    ptx_coef: float = 27.8  # weight of the pretraining loss where a rollout comes with pretraining text
    stop_kl: float | None = None  # a rollout's updates end before the first whose approx_kl exceeds this
    ema: float | None = None  # decay an update of an average of the policy's weights, kept beside them

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "minibatches", "temperature", "kl_target", "kl_horizon")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise InputError(f"ppo.dual_clip={self.dual_clip}: expected more than 1")
        if self.kl_in == "loss" and self.kl_kind == "k1":
            raise InputError("ppo.kl_in=loss with kl_kind=k1 has no effect: the gradient of k1 is 0 on average; use k2")
        if self.penalty is not None and self.dual_clip is not None:
            raise InputError("ppo.penalty replaces the clip, so dual_clip has no effect: leave out one of them")
        if self.unfinished_score is not None and self.unfinished_penalty:
            raise InputError("ppo.unfinished_score replaces what unfinished_penalty lowers: leave out one of them")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ppo.ema={self.ema}: expected a decay in [0, 1)")


class Experience(struct.PyTreeNode):
    """What one row of a minibatch needs."""

    tokens: Leaf  # [B, P + N]
    mask: Leaf  # [B, P + N]
    response_mask: Leaf  # [B, N]
    value_mask: Leaf  # [B, N], the response and where its score lands
    logp: Leaf  # [B, N]
    logp_ref: Leaf  # [B, N]
    value: Leaf  # [B, N]
    advantage: Leaf  # [B, N]
    target: Leaf  # [B, N]


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
    log_ratio = jnp.where(mask, logp - logp_old, 0.0).astype(jnp.float32)
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
    """The state before the first step. `params`: "policy" and "critic".

    `opt_state` holds "optimizer", "kl_coef" and, with `cfg.ema`, "ema": the average of the policy's weights.
    """
    opt_state = {"optimizer": tx.init(params), "kl_coef": jnp.float32(cfg.kl_coef)}
    if cfg.ema is not None:
        opt_state["ema"] = jax.tree.map(jnp.copy, params["policy"])  # donated apart from what it copies
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
    kl_coef: float | Array = 0.0,
    *,
    policy_fn: Callable,
    critic_fn: Callable,
    cfg: Config,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """This device's share of: policy loss + value_coef * value loss, and what `cfg` and `text` add to them.

    That is -entropy_coef * entropy, kl_coef * KL to the reference (`kl_in="loss"`), and ptx_coef * next-token loss on
    `text`. Each is a mean over the tokens of the global minibatch.
    """
    mask = batch.response_mask
    count, value_count = parallel.psum((jnp.sum(mask), jnp.sum(batch.value_mask)), axis)
    new_tokens = mask.shape[1]
    logits = response_logits(policy_fn, params["policy"], batch.tokens, batch.mask, new_tokens)
    logp = token_logprobs(logits, batch.tokens[:, -new_tokens:], cfg.temperature)
    if cfg.penalty is None:
        policy, found = policy_loss(logp, batch.logp, batch.advantage, mask, cfg.clip, cfg.dual_clip, count)
    else:
        policy, found = penalty_policy_loss(logp, batch.logp, batch.advantage, mask, cfg.penalty, count)
        found["approx_kl"] = found.pop("kl")
    metrics = {"loss/policy": policy} | {f"policy/{name}": value for name, value in found.items()}
    value = critic_fn(params["critic"], batch.tokens, batch.mask)[:, -new_tokens - 1 : -1]
    critic, found = value_loss(value, batch.value, batch.target, batch.value_mask, cfg.value_clip, value_count)
    metrics |= {"loss/value": critic} | {f"value/{name}": value for name, value in found.items()}
    total = policy + cfg.value_coef * critic
    if cfg.entropy_coef:
        metrics["loss/entropy"] = -masked_mean(entropy(logits, cfg.temperature), mask, count)
        total = total + cfg.entropy_coef * metrics["loss/entropy"]
    if cfg.kl_in == "loss":
        metrics["loss/kl"] = masked_mean(penalized(logp, batch.logp_ref, cfg), mask, count)
        total = total + kl_coef * metrics["loss/kl"]
    if text is not None:
        targets = parallel.psum(jnp.sum(text.target[:, 1:]), axis)
        metrics["loss/ptx"] = sft.loss(params["policy"], text, policy_fn, count=targets)
        total = total + cfg.ptx_coef * metrics["loss/ptx"]
    # Not a share but a maximum, so kept apart from what is summed over devices.
    metrics["ratio_error"] = jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(logp - batch.logp)), 0.0))
    return total, metrics


def penalized(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], cfg: Config) -> Float[Array, "B T"]:
    """The KL estimate that `kl_coef` multiplies."""
    kl = kl_estimate(logp, logp_ref, cfg.kl_kind)
    return kl if cfg.kl_clamp is None else jnp.clip(kl, -cfg.kl_clamp, cfg.kl_clamp)


def experience(rollout: Rollout, kl_coef: Array, cfg: Config) -> tuple[Experience, Metrics]:
    """Rewards, advantages and value targets of a whole rollout; whitening is over all its tokens."""
    mask = rollout.response_mask
    value_mask = through_first_pad(mask) if cfg.score_at == "first_pad" else mask
    score = rollout.score - jnp.where(rollout.ended, 0.0, cfg.unfinished_penalty)
    if cfg.unfinished_score is not None:
        score = jnp.where(rollout.ended, score, cfg.unfinished_score)
    kl = penalized(rollout.logp, rollout.logp_ref, cfg)
    reward = token_rewards(score, kl, mask, kl_coef if cfg.kl_in == "reward" else 0.0, value_mask)
    total = jnp.sum(reward, axis=1)
    if cfg.whiten_rewards:
        reward = whiten(reward, value_mask, shift_mean=False)
    advantage, target = gae(reward, rollout.value, value_mask, cfg.gamma, cfg.lam)
    residual = masked_mean(jnp.square(target - rollout.value), value_mask)
    spread = masked_mean(jnp.square(target - masked_mean(target, value_mask)), value_mask)
    if cfg.whiten_advantages is not None:
        advantage = whiten(advantage, mask, ddof=int(cfg.whiten_advantages == "bessel"))
    metrics = {
        "reward/score": jnp.mean(score),
        "reward/total": jnp.mean(total),
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
        value_mask=value_mask,
        logp=rollout.logp,
        logp_ref=rollout.logp_ref,
        value=rollout.value,
        advantage=advantage,
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

    def update(carry: dict[str, Any], inputs: tuple[Array, Tokens | None]) -> tuple[dict[str, Any], Metrics]:
        rows, text = inputs
        mine = jax.tree.map(lambda x: x[parallel.own_rows(rows, axis)], batch)
        params = carry["params"]
        grads, metrics = jax.grad(loss, has_aux=True)(
            params, mine, text, kl_coef, policy_fn=policy_fn, critic_fn=critic_fn, cfg=cfg, axis=axis
        )
        worst = parallel.pmax(metrics.pop("ratio_error"), axis)
        grads, metrics = parallel.psum((grads, metrics), axis)
        changes, optimizer = tx.update(grads, carry["optimizer"], params)
        after = {"params": optax.apply_updates(params, changes), "optimizer": optimizer}
        if cfg.ema is not None:
            after["ema"] = optax.incremental_update(after["params"]["policy"], carry["ema"], 1 - cfg.ema)
        if cfg.stop_kl is not None:
            going = carry.pop("going") & (metrics["policy/approx_kl"] <= cfg.stop_kl)
            after = jax.tree.map(functools.partial(jnp.where, going), after, carry) | {"going": going}
            metrics["policy/updated"] = going.astype(jnp.float32)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}
        return after, metrics | {"ratio_error": worst}

    before = {"params": state.params, "optimizer": state.opt_state["optimizer"]}
    if cfg.ema is not None:
        before["ema"] = state.opt_state["ema"]
    if cfg.stop_kl is not None:
        before["going"] = jnp.bool_(True)
    after, history = jax.lax.scan(update, before, (rows, text))
    metrics["ratio/first_error"] = history.pop("ratio_error")[0]
    metrics |= jax.tree.map(jnp.mean, history)
    if cfg.kl_target is not None:
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl/reference"], episodes, cfg.kl_target, cfg.kl_horizon)
    opt_state = {name: after[name] for name in ("optimizer", "ema") if name in after} | {"kl_coef": kl_coef}
    return state.replace(step=state.step + 1, params=after["params"], opt_state=opt_state), metrics
