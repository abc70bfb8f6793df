"""Group-relative policy optimisation (arXiv:2402.03300): PPO without a critic.

Each prompt gets a group of responses, and the advantage of a response is its score minus the group's mean. By default
the KL to the reference is a term of the loss, the k3 estimate on the sampled tokens: its gradient is that of
KL(reference || policy), token by token. With `kl_in="reward"` it is the gradient of KL(policy || reference), over the
whole response.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import updates
from rlhf_jax.algorithms.advantages import group_normalize, subtract_mean
from rlhf_jax.algorithms.ppo import policy_loss
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import kl_estimate, masked_mean
from rlhf_jax.settings import NonNegative, Positive, Range
from rlhf_jax.types import InputError, Leaf, LogprobsFn, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config(updates.Config):
    """Settings of the algorithm; the defaults are those of DeepSeekMath (arXiv:2402.03300, section 4.2)."""

    # Responses to each prompt, in consecutive rows of the rollout; the paper has 64.
    group: Annotated[int, Range(least=2, unit="responses to compare")] = 8
    clip: Positive = 0.2  # clip the probability ratio to [1 - clip, 1 + clip]
    kl_coef: NonNegative = 0.04  # weight of the KL to the reference, in nats
    # loss: add kl_coef times k3 of each token to the loss; reward: subtract kl_coef times the sum of k1 from the score.
    kl_in: Literal["loss", "reward"] = "loss"
    scale: bool = True  # divide advantages by the group's standard deviation; False is Dr. GRPO (arXiv:2503.20783)
    mean: Literal["sequence", "token"] = "sequence"  # average the loss within each response first, or over all tokens


class Experience(struct.PyTreeNode):
    """A rollout with the advantage of each response."""

    rollout: Rollout
    advantage: Leaf  # [B]


def groups(score: Float[Array, "B"], group: int) -> Float[Array, "B_over_G G"]:
    """The scores grouped by prompt, whose responses are in consecutive rows.

    Raises InputError when the number of rows is not a multiple of `group`.
    """
    if score.shape[0] % group:
        raise InputError(f"{score.shape[0]} episodes do not divide into groups of {group}: use a multiple")
    return score.reshape(-1, group)


def experience(rollout: Rollout, cfg: Config) -> tuple[Experience, Metrics]:
    """The advantages of a whole rollout, and metrics of it."""
    score = updates.response_score(rollout, cfg)
    reward = score - cfg.kl_coef * updates.response_kl(rollout) if cfg.kl_in == "reward" else score
    grouped = groups(reward, cfg.group)
    advantage = group_normalize(grouped) if cfg.scale else subtract_mean(grouped)
    metrics = updates.describe(rollout, score) | {
        "reward/spread": jnp.mean(jnp.std(grouped, axis=1)),
        "reward/flat": jnp.mean(jnp.all(grouped == grouped[:, :1], axis=1)),  # share of groups without a gradient
    }
    return Experience(rollout=rollout, advantage=advantage.reshape(-1)), metrics


def weights(mask: Bool[Array, "B N"], mean: str) -> tuple[Float[Array, "B N"], Array]:
    """The weight of each token in the loss, and the sum of all weights, by which the loss is divided. [B, N], [].

    mean="token": 1 for every valid token. mean="sequence": 1 / (length of its response).
    """
    if mean == "token":
        return mask.astype(jnp.float32), jnp.sum(mask)
    length = jnp.sum(mask, axis=1, keepdims=True)
    return mask / jnp.maximum(length, 1), jnp.sum(length > 0)


def totals(batch: Experience, cfg: Config) -> updates.Totals:
    """The number of valid tokens in a batch of episodes, and the sum of their weights."""
    mask = batch.rollout.response_mask
    return {"tokens": jnp.sum(mask), "weights": weights(mask, cfg.mean)[1]}


def live(batch: Experience) -> Bool[Array, "B N"]:
    """A mask of the response columns that the loss depends on."""
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
    """The share that these rows have in the loss of the global minibatch, and its metrics (arXiv:2402.03300, eq. 3).

        sum_t w_t (surrogate_t [+ kl_coef k3_t, if kl_in="loss"]) / sum_t w_t + auxiliary losses

    The sums are over the tokens t of the minibatch, with w from `weights`. The surrogate is that of `ppo.policy_loss`;
    the last term is `updates.auxiliary_losses`.
    """
    rollout = batch.rollout
    mask = rollout.response_mask
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg)
    weight, _ = weights(mask, cfg.mean)
    # The surrogate is linear in the advantage, so weighting the advantage weights the token's loss. `policy_loss`
    # divides by the number of tokens; the loss here is divided by the sum of the weights.
    policy, details = policy_loss(
        logp, rollout.logp, batch.advantage[:, None] * weight, mask, cfg.clip, count=totals["tokens"]
    )
    total = policy * totals["tokens"] / totals["weights"]
    metrics = {"loss/policy": total} | {f"policy/{name}": value for name, value in details.items()}
    if cfg.kl_in == "loss":
        kl = kl_estimate(jnp.where(mask, logp, rollout.logp_ref), rollout.logp_ref, "k3") * weight  # finite at padding
        metrics["loss/kl"] = masked_mean(kl, mask, totals["weights"])
        total = total + cfg.kl_coef * metrics["loss/kl"]
    extra, details = updates.auxiliary_losses(params, entropy, mask, text, totals, policy_fn=policy_fn, cfg=cfg)
    return total + extra, metrics | details | {"ratio_error": updates.ratio_error(logp, rollout.logp, mask)}


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
    """All epochs and minibatches of updates on one rollout, in one compiled call. `state` is from `updates.init`.

    Rows g * group to (g + 1) * group - 1 of the global batch must be the responses to one prompt. `text` is pretraining
    text, shaped as in `updates.apply`.
    """
    state, rollout, reward_metrics = updates.combine_rewards(state, parallel.all_gather(rollout, axis), cfg)
    batch, metrics = experience(rollout, cfg)
    objective = updates.Objective(
        loss=functools.partial(loss, policy_fn=policy_fn, cfg=cfg),
        totals=functools.partial(totals, cfg=cfg),
        live=live,
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
    return state, metrics | reward_metrics | update_metrics
