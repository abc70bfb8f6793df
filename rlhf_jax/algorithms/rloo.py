"""REINFORCE leave-one-out (arXiv:2402.14740): a whole response is one action.

The reward of a response is its score minus `kl_coef` times its KL to the reference; its baseline is the mean reward of
the other responses to the prompt. With one update a rollout the gradient is that of REINFORCE; with more, the
probability ratio of the whole response to the behaviour policy is clipped as in PPO.
"""

import dataclasses
import functools
from typing import Annotated

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms import updates
from rlhf_jax.algorithms.advantages import leave_one_out
from rlhf_jax.algorithms.grpo import Experience, groups, live
from rlhf_jax.algorithms.ppo import policy_loss
from rlhf_jax.devices import parallel
from rlhf_jax.settings import NonNegative, Positive, Range
from rlhf_jax.types import LogprobsFn, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config(updates.Config):
    """Settings of the algorithm; further ones are in `updates.Config`."""

    # Responses to each prompt, in consecutive rows of the rollout.
    group: Annotated[int, Range(least=2, unit="responses, each the other's baseline")] = 4
    clip: Positive = 0.2  # clip the probability ratio of a response to [1 - clip, 1 + clip]
    kl_coef: NonNegative = 0.03  # reward subtracted per nat of KL to the reference
    # Draw minibatches of whole groups, so that an update computes a prompt once for its answers. None: if there is one
    # minibatch, or prompts are long against the answers (`devices.shared.worthwhile`).
    whole_groups: bool | None = None


def experience(rollout: Rollout, cfg: Config) -> tuple[Experience, Metrics]:
    """The advantages of a whole rollout, and metrics of it."""
    score = updates.response_score(rollout, cfg)
    reward = score - cfg.kl_coef * updates.response_kl(rollout)
    advantage = leave_one_out(groups(reward, cfg.group)).reshape(-1)
    metrics = updates.describe(rollout, score) | {"reward/total": jnp.mean(reward)}
    earned = updates.earned(rollout, cfg, cfg.kl_coef)
    return Experience(rollout=rollout, advantage=advantage, reward=earned), metrics


def assess(state: TrainState, rollout: Rollout, cfg: Config) -> tuple[TrainState, Experience, Metrics]:
    """The `experience` of a whole rollout, and the state with the statistics of its scores."""
    state, rollout, reward_metrics = updates.combine_rewards(state, rollout, cfg)
    batch, metrics = experience(rollout, cfg)
    return state, batch, metrics | reward_metrics


def totals(batch: Experience) -> updates.Totals:
    """The number of valid tokens, and of responses that have any, in a batch of episodes."""
    mask = batch.rollout.response_mask
    return {"tokens": jnp.sum(mask), "responses": jnp.sum(jnp.any(mask, axis=1))}


def loss(
    params: dict[str, Params],
    batch: Experience,
    text: Tokens | None,
    totals: updates.Totals,
    *,
    policy_fn: LogprobsFn,
    cfg: Config,
    group: int = 1,
) -> tuple[Float[Array, ""], Metrics]:
    """The share that these rows have in the loss of the global minibatch, and its metrics.

    The loss is the clipped surrogate of whole responses (`ppo.policy_loss` with the sums of their log-probabilities),
    mean over responses, plus `updates.auxiliary_losses`. Each `group` rows share their prompt.
    """
    rollout = batch.rollout
    mask = rollout.response_mask
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg, group)
    sequence, sequence_old = (jnp.sum(jnp.where(mask, x, 0.0), axis=1, keepdims=True) for x in (logp, rollout.logp))
    nonempty = jnp.any(mask, axis=1, keepdims=True)
    value, details = policy_loss(
        sequence, sequence_old, batch.advantage[:, None], nonempty, cfg.clip, count=totals["responses"]
    )
    metrics = {"loss/policy": value} | {f"policy/{name}": x for name, x in details.items()}
    extra, details = updates.auxiliary_losses(params, entropy, mask, text, totals, policy_fn=policy_fn, cfg=cfg)
    return value + extra, metrics | details | {"ratio_error": updates.ratio_error(logp, rollout.logp, mask)}


def train_step(
    state: TrainState,
    rollout: Rollout,
    text: Tokens | None = None,
    *,
    policy_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches of updates on one rollout, in one compiled call. `state` is from `updates.init`.

    Rows g * group to (g + 1) * group - 1 of the global batch must be the responses to one prompt. `text` is pretraining
    text, shaped as in `updates.apply`.
    """
    state, batch, metrics = assess(state, parallel.all_gather(rollout, axis), cfg)
    group = updates.shared_group(batch.rollout, cfg, cfg.group, cfg.whole_groups)
    objective = updates.Objective(
        loss=functools.partial(loss, policy_fn=policy_fn, cfg=cfg, group=group),
        totals=totals,
        live=live,
        group=group,
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
    return state, metrics | update_metrics
