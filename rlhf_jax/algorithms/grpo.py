"""Group-relative policy optimisation (arXiv:2402.03300): PPO without a critic.

Each prompt gets a group of responses, and the advantage of a response is its score minus the group's mean. By default
the KL to the reference is a term of the loss, the k3 estimate on the sampled tokens: its gradient is that of
KL(reference || policy), token by token. With `kl_in="reward"` it is the gradient of KL(policy || reference), over the
whole response.

Its kin are settings:

    Dr. GRPO (arXiv:2503.20783)        scale=False, mean="constant"
    DAPO (arXiv:2503.14476)            clip_high=0.28, mean="token", kl_coef=0, soft_limit, and `refill`
    GSPO (arXiv:2507.18071)            ratio="response", clip=3e-4, clip_high=4e-4
    CISPO (arXiv:2506.13585)           surrogate="cispo", clip=1 (no lower bound), clip_high, mean="token"
    REINFORCE++ (arXiv:2501.03262)     baseline="batch", kl_in="reward", mean="token"; with its baseline: "both"
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Shaped

from rlhf_jax.algorithms import updates
from rlhf_jax.algorithms.advantages import group_normalize, subtract_mean, whiten
from rlhf_jax.algorithms.ppo import policy_loss
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import kl_estimate, masked_mean, precise
from rlhf_jax.settings import NonNegative, Positive, Range
from rlhf_jax.types import InputError, Leaf, LogprobsFn, Metrics, Params, Rollout, Tokens, TrainState


@dataclasses.dataclass(frozen=True)
class Config(updates.Config):
    """Settings of the algorithm; the defaults are those of DeepSeekMath (arXiv:2402.03300, section 4.2)."""

    # Responses to each prompt, in consecutive rows of the rollout; the paper has 64.
    group: Annotated[int, Range(least=2, unit="responses to compare")] = 8
    clip: Positive = 0.2  # clip the probability ratio to [1 - clip, 1 + clip]
    clip_high: Positive | None = None  # clip it to [1 - clip, 1 + clip_high] instead
    kl_coef: NonNegative = 0.04  # weight of the KL to the reference, in nats
    # loss: add kl_coef times k3 of each token to the loss; reward: subtract kl_coef times the sum of k1 from the score.
    kl_in: Literal["loss", "reward"] = "loss"
    scale: bool = True  # divide advantages by the group's standard deviation; False is Dr. GRPO (arXiv:2503.20783)
    # What the reward of a response is compared with. group: the mean of its group; batch: nothing, and then all tokens'
    # advantages are whitened together; both: the mean of its group, whitened. See `token_advantages`.
    baseline: Literal["group", "batch", "both"] = "group"
    # Average the loss within each response first, or over all tokens, or divide its sum by the largest possible number
    # of tokens, rows times max_new_tokens.
    mean: Literal["sequence", "token", "constant"] = "sequence"
    ratio: Literal["token", "response"] = "token"  # probability ratio: of each token, or the response's geometric mean
    # clip: PPO's; cispo: the clipped ratio is a constant weight of the log-probability, so that every token learns.
    surrogate: Literal["clip", "cispo"] = "clip"
    # Draw minibatches of whole groups, so that an update computes a prompt once for its answers. None: if there is one
    # minibatch, or prompts are long against the answers (`devices.shared.worthwhile`).
    whole_groups: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline != "group" and not self.scale:
            raise InputError(f"scale=False has no effect with baseline={self.baseline}: leave it out")


class Experience(struct.PyTreeNode):
    """A rollout with the advantage of each response."""

    rollout: Rollout
    advantage: Leaf  # [B], or [B, N] where tokens of a response differ in it
    reward: Leaf = None  # [B, N], of each token; for the records alone


def groups(score: Float[Array, "B"], group: int) -> Float[Array, "B_over_G G"]:
    """The scores grouped by prompt, whose responses are in consecutive rows.

    Raises InputError when the number of rows is not a multiple of `group`.
    """
    if score.shape[0] % group:
        raise InputError(f"{score.shape[0]} episodes do not divide into groups of {group}: use a multiple")
    return score.reshape(-1, group)


def token_advantages(rollout: Rollout, score: Float[Array, "B"], cfg: Config) -> Float[Array, "B N"]:
    """REINFORCE++'s advantages (arXiv:2501.03262, section 3): whitened over all valid tokens of the batch.

        A_t = score - mean of the group's scores [if baseline="both"] - kl_coef sum_{u >= t} KL_u [if kl_in="reward"]

    KL_u is the k1 estimate of token u.
    """
    mask = rollout.response_mask
    if cfg.baseline == "both":
        score = subtract_mean(groups(score, cfg.group)).reshape(-1)
    raw = jnp.broadcast_to(score[:, None], mask.shape)
    if cfg.kl_in == "reward":
        kl = jnp.where(mask, rollout.logp - rollout.logp_ref, 0.0)
        raw = raw - cfg.kl_coef * jnp.flip(jnp.cumsum(jnp.flip(kl, 1), axis=1), 1)
    return whiten(raw, mask)


def step_rewards(reward: Float[Array, "B N"], over: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """The rewards of tokens added up by step, at the column where each step is over; 0 elsewhere."""
    number = jnp.cumsum(over, axis=1) - over  # of steps that are over before a column
    added = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=over.shape[1]))(reward, number)
    return jnp.where(over, jnp.take_along_axis(added, number, axis=1), 0.0)


def step_advantages(
    reward: Float[Array, "B N"],
    over: Bool[Array, "B N"],
    mask: Bool[Array, "B N"],
    group: int,
    scale: bool = True,
) -> Float[Array, "B N"]:
    """GRPO's advantages from rewards of steps (arXiv:2402.03300, section 4.1.3).

        A_t = sum over the steps that are over at t or later of (r - mean(R)) / (std(R) + 1e-4)

    R are the rewards of all steps of a prompt's responses; without `scale` nothing is divided by their deviation.
    Rewards of other columns than `over` are ignored. Exactly 0 where all rewards of a group are equal.
    """
    rewards, steps = groups_of(precise(reward), group), groups_of(over, group)
    largest = jnp.max(jnp.where(steps, rewards, -jnp.inf), axis=(1, 2), keepdims=True)
    below = jnp.where(steps, rewards - largest, 0.0)  # of equal numbers the mean has a rounding error, of zeros none
    count = jnp.maximum(jnp.sum(steps, axis=(1, 2), keepdims=True), 1)
    centred = jnp.where(steps, below - jnp.sum(below, axis=(1, 2), keepdims=True) / count, 0.0)
    if scale:
        deviation = jnp.sqrt(jnp.sum(jnp.square(centred), axis=(1, 2), keepdims=True) / count)
        centred = centred / (deviation + 1e-4)
    later = jnp.flip(jnp.cumsum(jnp.flip(centred.reshape(reward.shape), 1), axis=1), 1)
    return jnp.where(mask, later, 0.0)


def groups_of(x: Shaped[Array, "B N"], group: int) -> Shaped[Array, "B_over_G G N"]:
    """The rows grouped by prompt, as `groups` has scores."""
    return x.reshape(-1, group, x.shape[1])


def process_advantages(rollout: Rollout, cfg: Config) -> Float[Array, "B N"]:
    """The `step_advantages` of a rollout whose steps have scores.

    A response's last token gets its final score too, and each token less kl_coef times its KL [if kl_in="reward"].
    """
    mask = rollout.response_mask
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    reward = jnp.where(mask, rollout.token_score, 0.0) + jnp.where(
        last, updates.final_score(rollout, cfg)[:, None], 0.0
    )
    if cfg.kl_in == "reward":
        reward = reward - cfg.kl_coef * jnp.where(mask, rollout.logp - rollout.logp_ref, 0.0)
    over = rollout.step | last
    return step_advantages(step_rewards(reward, over), over, mask, cfg.group, cfg.scale)


def experience(rollout: Rollout, cfg: Config) -> tuple[Experience, Metrics]:
    """The advantages of a whole rollout, and metrics of it."""
    score = updates.response_score(rollout, cfg)
    reward = score - cfg.kl_coef * updates.response_kl(rollout) if cfg.kl_in == "reward" else score
    grouped = groups(reward, cfg.group)
    if cfg.baseline == "group" and rollout.step is not None:
        advantage = process_advantages(rollout, cfg)
    elif cfg.baseline == "group":
        advantage = (group_normalize(grouped) if cfg.scale else subtract_mean(grouped)).reshape(-1)
    else:
        advantage = token_advantages(rollout, score, cfg)
    metrics = updates.describe(rollout, score) | {
        "reward/spread": jnp.mean(jnp.std(grouped, axis=1)),
        "reward/flat": jnp.mean(flat(score, cfg.group)),  # share of groups without a gradient
    }
    reward = updates.earned(rollout, cfg, cfg.kl_coef if cfg.kl_in == "reward" else 0.0)
    return Experience(rollout=rollout, advantage=advantage, reward=reward), metrics


def assess(state: TrainState, rollout: Rollout, cfg: Config) -> tuple[TrainState, Experience, Metrics]:
    """The `experience` of a whole rollout, and the state with the statistics of its scores."""
    state, rollout, reward_metrics = updates.combine_rewards(state, rollout, cfg)
    batch, metrics = experience(rollout, cfg)
    return state, batch, metrics | reward_metrics


def flat(score: Float[Array, "B"], group: int) -> Bool[Array, "B_over_G"]:
    """Whether the scores of a group are all equal, so that it teaches nothing."""
    grouped = groups(score, group)
    return jnp.all(grouped == grouped[:, :1], axis=1)


def refill(
    rollout: Rollout, fresh: Rollout | None, *, group: int, cfg: updates.Config, axis: str | None = None
) -> tuple[Rollout, Array]:
    """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): groups whose scores are all equal make room for others.

    Returns this device's rows of a rollout as large as `rollout`, made of its groups and then those of `fresh`, with
    the flat ones last of all; and how many flat groups are left in the whole of it.
    """
    rollout = parallel.all_gather(rollout, axis)
    both = rollout
    if fresh is not None:
        both = jax.tree.map(lambda *rows: jnp.concatenate(rows), rollout, parallel.all_gather(fresh, axis))
    is_flat = flat(updates.response_score(both, cfg), group)
    chosen = jnp.argsort(is_flat, stable=True)[: rollout.score.shape[0] // group]
    rows = parallel.local_rows((chosen[:, None] * group + jnp.arange(group)[None]).reshape(-1), axis)
    return parallel.shard_rows(jax.tree.map(lambda x: x[rows], both)), jnp.sum(is_flat[chosen])


def weights(mask: Bool[Array, "B N"], mean: str) -> tuple[Float[Array, "B N"], Array]:
    """The weight of each token in the loss, and the sum of all weights, by which the loss is divided. [B, N], [].

    mean="token": 1 for every valid token. mean="sequence": 1 / (length of its response). mean="constant": 1, but the
    sum is that of a mask without padding.
    """
    if mean == "constant":
        return mask.astype(jnp.float32), jnp.int32(mask.size)
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


def response_ratio(logp: Float[Array, "B N"], logp_old: Float[Array, "B N"], mask: Bool[Array, "B N"]) -> Array:
    """GSPO's log-ratio of each token (arXiv:2507.18071, eq. 14): the mean of its response's, in value. [B, N].

    Its gradient is that of the token's own log-probability.
    """
    own = jnp.where(mask, logp - logp_old, 0.0)
    mean = jnp.sum(own, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jax.lax.stop_gradient(mean) + own - jax.lax.stop_gradient(own)


def cispo_loss(
    logp: Float[Array, "B N"],
    log_ratio: Float[Array, "B N"],
    advantage: Float[Array, "B N"],
    mask: Bool[Array, "B N"],
    clip: float,
    clip_high: float | None = None,
    count: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """CISPO's loss (arXiv:2506.13585, eq. 4): -w A logp, mean over valid tokens.

    The weight w = clip(ratio, 1 - clip, 1 + clip_high) has no gradient. Metrics as of `ppo.policy_loss`, but for
    `clip_fraction`: the share of tokens whose ratio is outside.
    """
    log_ratio = precise(jnp.where(mask, log_ratio, 0.0))
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    weight = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    metrics = {
        "clip_fraction": masked_mean(weight != ratio, mask, count),
        "approx_kl": masked_mean(0.5 * jnp.square(log_ratio), mask, count),
    }
    return masked_mean(-weight * advantage * jnp.where(mask, logp, 0.0), mask, count), metrics


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
    """The share that these rows have in the loss of the global minibatch, and its metrics (arXiv:2402.03300, eq. 3).

        sum_t w_t (surrogate_t [+ kl_coef k3_t, if kl_in="loss"]) / sum_t w_t + auxiliary losses

    The sums are over the tokens t of the minibatch, with w from `weights`. The surrogate is that of `ppo.policy_loss`
    or `cispo_loss`; the last term is `updates.auxiliary_losses`. Each `group` rows share their prompt.
    """
    rollout = batch.rollout
    mask = rollout.response_mask
    logp, entropy = updates.forward(params, rollout, policy_fn, cfg, group)
    weight, _ = weights(mask, cfg.mean)
    # The surrogate is linear in the advantage, so weighting the advantage weights the token's loss. `policy_loss`
    # divides by the number of tokens; the loss here is divided by the sum of the weights.
    advantage = (batch.advantage if batch.advantage.ndim == 2 else batch.advantage[:, None]) * weight
    log_ratio = response_ratio(logp, rollout.logp, mask) if cfg.ratio == "response" else logp - rollout.logp
    if cfg.surrogate == "cispo":
        policy, details = cispo_loss(logp, log_ratio, advantage, mask, cfg.clip, cfg.clip_high, count=totals["tokens"])
    else:
        policy, details = policy_loss(
            log_ratio,
            jnp.zeros_like(log_ratio),
            advantage,
            mask,
            cfg.clip,
            count=totals["tokens"],
            clip_high=cfg.clip_high,
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
        totals=functools.partial(totals, cfg=cfg),
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
