"""Group-relative policy optimisation (arXiv:2402.03300): PPO without a critic.

Each prompt gets a group of responses, and a response's advantage is how far its score lies above the group's mean. The
KL to the reference stands in the loss by default, as the k3 estimate on the sampled tokens. What that descends is the
KL of the *reference to the policy*, a token at a time; with `kl_in="reward"` it is the KL of the policy to the
reference, of the whole response.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import updates
from rlhf_jax.algorithms.advantages import above_mean, group_normalize
from rlhf_jax.algorithms.ppo import policy_loss
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import kl_estimate, masked_mean
from rlhf_jax.settings import NonNegative, Range
from rlhf_jax.types import InputError, Leaf, LogprobsFn, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config(updates.Config):
    """Settings of the algorithm; the defaults are those of DeepSeekMath (arXiv:2402.03300, section 4.2)."""

    # responses to a prompt, in consecutive rows of the rollout; 64 there
    group: Annotated[int, Range(least=2, unit="responses to compare")] = 8
    kl_coef: NonNegative = 0.04  # weight of the KL to the reference
    kl_in: Literal["loss", "reward"] = "loss"  # k3 of each token, or the response's summed k1 off its score
    scale: bool = True  # divide by the standard deviation of the group; not so in Dr. GRPO (arXiv:2503.20783)
    mean: Literal["sequence", "token"] = "sequence"  # of the loss: first within each response, or over all tokens


class Experience(struct.PyTreeNode):
    """A rollout, and how much better than its group each response is."""

    rollout: Rollout
    advantage: Leaf  # [B]


def groups(score: Float[Array, "B"], group: int) -> Float[Array, "B_over_G G"]:
    """The scores of each prompt's responses, which lie in consecutive rows; InputError when they do not divide."""
    if score.shape[0] % group:
        raise InputError(f"{score.shape[0]} episodes do not divide into groups of {group}")
    return score.reshape(-1, group)


def experience(rollout: Rollout, cfg: Config) -> tuple[Experience, Metrics]:
    """The advantages of a whole rollout."""
    score = updates.response_score(rollout, cfg)
    reward = score - cfg.kl_coef * updates.response_kl(rollout) if cfg.kl_in == "reward" else score
    grouped = groups(reward, cfg.group)
    advantage = group_normalize(grouped) if cfg.scale else above_mean(grouped)
    metrics = updates.describe(rollout, score) | {
        "reward/spread": jnp.mean(jnp.std(grouped, axis=1)),
        "reward/flat": jnp.mean(jnp.all(grouped == grouped[:, :1], axis=1)),  # groups that teach nothing
    }
    return Experience(rollout=rollout, advantage=advantage.reshape(-1)), metrics


def weights(mask: Bool[Array, "B N"], mean: str) -> tuple[Float[Array, "B N"], Array]:
    """What each token counts for, and what these weights are to be divided by: their sum over the global minibatch."""
    if mean == "token":
        return mask.astype(jnp.float32), jnp.sum(mask)
    length = jnp.sum(mask, axis=1, keepdims=True)
    return mask / jnp.maximum(length, 1), jnp.sum(length > 0)


def totals(batch: Experience, cfg: Config) -> updates.Totals:
    """How many tokens there are, and what their weights are divided by."""
    mask = batch.rollout.response_mask
    return {"tokens": jnp.sum(mask), "weights": weights(mask, cfg.mean)[1]}


def live(batch: Experience) -> Bool[Array, "B N"]:
    """Which columns of the responses have a part in the loss."""
    return batch.rollout.response_mask


def loss(
    params: dict[str, Params],
    batch: Experience,
    text: Tokens | None,
    totals: updates.Totals,
    *,
    policy_fn: LogprobsFn,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The share of these rows in: the clipped surrogate, kl_coef * k3 (`kl_in="loss"`), and `updates.extras`."""
    rollout = batch.rollout
    mask = rollout.response_mask
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg)
    weight, _ = weights(mask, cfg.mean)
    count, total = totals["tokens"], totals["weights"]
    advantage = batch.advantage[:, None] * weight
    # The surrogate is linear in the advantage, so a token's weight can go there.
    value, found = policy_loss(logp, rollout.logp, advantage, mask, cfg.clip, count=count)
    value = value * count / total
    metrics = {"loss/policy": value} | {f"policy/{name}": x for name, x in found.items()}
    if cfg.kl_in == "loss":
        kl = kl_estimate(jnp.where(mask, logp, rollout.logp_ref), rollout.logp_ref, "k3") * weight  # finite at padding
        metrics["loss/kl"] = masked_mean(kl, mask, total)
        value = value + cfg.kl_coef * metrics["loss/kl"]
    more, found = updates.extras(params, entropy, mask, text, totals, policy_fn=policy_fn, cfg=cfg)
    return value + more, metrics | found | {"ratio_error": updates.ratio_error(logp, rollout.logp, mask)}


def train_step(
    state: TrainState,
    rollout: Rollout,
    text: Tokens | None = None,
    *,
    policy_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches on one rollout, in one compiled call. `state` is from `updates.init`.

    Rows `g * group .. (g + 1) * group - 1` of the global batch are the responses to one prompt.
    """
    rollout = parallel.all_gather(rollout, axis)
    batch, metrics = experience(rollout, cfg)
    objective = updates.Objective(
        loss=functools.partial(loss, policy_fn=policy_fn, cfg=cfg),
        totals=functools.partial(totals, cfg=cfg),
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
    return state, metrics | found
