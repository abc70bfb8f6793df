"""Online DPO (arXiv:2402.04792): the policy learns from preferences between its own answers.

Each prompt gets a group of responses, which their scores rank. The loss is that of `dpo` on these rankings, with all of
its settings; log-ratios are to the frozen reference model. Many prompts a rollout, with several epochs and minibatches,
are the iterative form (arXiv:2405.07863).
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import dpo, grpo, updates
from rlhf_jax.algorithms.grpo import flat, groups
from rlhf_jax.algorithms.preferences import mean_logprobs, sequence_logprobs
from rlhf_jax.algorithms.reward import margins, pair_mask, pair_mean
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.settings import Range
from rlhf_jax.types import Leaf, LogprobsFn, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config(updates.Config, dpo.Config):
    """Settings of the algorithm; further ones are in `updates.Config` and `dpo.Config`."""

    # Responses to each prompt, in consecutive rows of the rollout.
    group: Annotated[int, Range(least=2, unit="responses to compare")] = 2
    # Learn from the best against the worst response to each prompt (the first of equal ones), or from all pairs.
    pairs: Literal["extremes", "all"] = "extremes"

    @property
    def learnt(self) -> float:
        """The share of a rollout's episodes that the loss reads: two of each group, or all."""
        return 2 / self.group if self.pairs == "extremes" else 1.0


class Experience(struct.PyTreeNode):
    """A rollout as rankings of K responses to each of B prompts."""

    rollout: Rollout  # its arrays are [B, K, ...]; those of whole responses are left out
    rank: tuple[Leaf, ...]  # of the K responses, [B] int32 each: smaller is better, equal is a tie


def ranks(score: Float[Array, "B K"]) -> Array:
    """The number of better responses to the same prompt, for each response. [B, K] int32."""
    return jnp.sum(score[:, None, :] > score[:, :, None], axis=2, dtype=jnp.int32)


def extremes(score: Float[Array, "B G"]) -> Array:
    """The numbers of the best and of the worst response to each prompt, the first of equal ones. [B, 2] int32."""
    return jnp.stack([jnp.argmax(score, axis=1), jnp.argmin(score, axis=1)], axis=1)


def experience(rollout: Rollout, cfg: Config) -> tuple[Experience, Metrics]:
    """The responses that a whole rollout compares, and metrics of it."""
    score = updates.response_score(rollout, cfg)
    grouped = groups(score, cfg.group)
    numbers = jnp.broadcast_to(jnp.arange(cfg.group)[None], grouped.shape)
    chosen = extremes(grouped) if cfg.pairs == "extremes" else numbers
    select = lambda x: jax.vmap(lambda row, n: row[n])(x.reshape(*grouped.shape, *x.shape[1:]), chosen)
    compared = Rollout(
        tokens=select(rollout.tokens),
        mask=select(rollout.mask),
        response_mask=select(rollout.response_mask),
        logp=select(rollout.logp),
        logp_ref=select(rollout.logp_ref),
        ended=None,
        index=None,
    )
    batch = Experience(rollout=compared, rank=tuple(ranks(select(score)).T))
    metrics = updates.describe(rollout, score) | {
        "reward/spread": jnp.mean(jnp.std(grouped, axis=1)),
        "reward/flat": jnp.mean(flat(score, cfg.group)),  # share of prompts whose responses score the same: no pair
    }
    return batch, metrics


def assess(state: TrainState, rollout: Rollout, cfg: Config) -> tuple[TrainState, grpo.Experience, Metrics]:
    """A whole rollout with what the records say of it, and the state with the statistics of its scores.

    The advantage of a response is the share of its prompt's responses that score less, minus that of those that score
    more.
    """
    state, rollout, reward_metrics = updates.combine_rewards(state, rollout, cfg)
    score = updates.response_score(rollout, cfg)
    grouped = groups(score, cfg.group)
    advantage = jnp.mean(jnp.sign(grouped[:, :, None] - grouped[:, None, :]), axis=2).reshape(-1)
    earned = updates.earned(rollout, cfg, 0.0)
    return state, grpo.Experience(rollout=rollout, advantage=advantage, reward=earned), reward_metrics


def totals(batch: Experience) -> updates.Totals:
    """The number of valid tokens, and of prompts that have a pair, in a batch of prompts."""
    pair = pair_mask(jnp.stack(batch.rank, axis=1))
    return {"tokens": jnp.sum(batch.rollout.response_mask), "prompts": jnp.sum(jnp.any(pair, axis=(1, 2)))}


def live(batch: Experience) -> Bool[Array, "B N"]:
    """A mask of the response columns that the loss depends on."""
    return jnp.any(batch.rollout.response_mask, axis=1)


def loss(
    params: dict[str, Params],
    batch: Experience,
    text: Tokens | None,
    totals: updates.Totals,
    *,
    policy_fn: LogprobsFn,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The share that these prompts have in the loss of the global minibatch, and its metrics.

    The loss is that of `dpo.train_step`, the mean over each prompt's pairs, then over prompts that have a pair, plus
    `updates.auxiliary_losses`.
    """
    rank = jnp.stack(batch.rank, axis=1)
    rollout = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.rollout)
    mask = rollout.response_mask
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg, rank.shape[1])
    reduce = mean_logprobs if cfg.per_token else sequence_logprobs
    gain = reduce(logp - rollout.logp_ref, mask).reshape(rank.shape)
    pair, count = pair_mask(rank), totals["prompts"]
    h = margins(gain, pair)
    value = pair_mean(dpo.TERMS[cfg.loss](h, cfg), pair, count)
    metrics = {
        "loss/dpo": value,
        "reward/margin": cfg.beta * pair_mean(h, pair, count),
        "reward/accuracy": pair_mean(0.5 * (1 + jnp.sign(h)), pair, count),  # equal log-ratios count half
        "policy/approx_kl": masked_mean(0.5 * jnp.square(logp - rollout.logp), mask, totals["tokens"]),
    }
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

    Rows g * group to (g + 1) * group - 1 of the global batch must be the responses to one prompt; a minibatch is made
    of whole groups. `text` is pretraining text, shaped as in `updates.apply`.
    """
    state, rollout, reward_metrics = updates.combine_rewards(state, parallel.all_gather(rollout, axis), cfg)
    batch, metrics = experience(rollout, cfg)
    objective = updates.Objective(
        loss=functools.partial(loss, policy_fn=policy_fn, cfg=cfg),
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
    return state, metrics | reward_metrics | update_metrics
