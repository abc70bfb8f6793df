"""The updates on a rollout, which PPO, GRPO and RLOO share: only their losses differ.

Epochs and minibatches run inside one compiled call, with optional pretraining mix, entropy bonus, weight averaging and
early stopping.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms import rewards, sft
from rlhf_jax.algorithms.advantages import token_rewards
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.devices import parallel, ragged, shared
from rlhf_jax.devices.compute import Compute
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.settings import Count, NonNegative, Positive, Rate, Settings, Unbounded, Whole
from rlhf_jax.types import (
    InputError,
    Leaf,
    LogprobsFn,
    Metrics,
    Params,
    Rollout,
    Tokens,
    TrainState,
)

Batch = TypeVar("Batch")  # a pytree whose leaves have episodes on their first axis
Score = Annotated[float, Unbounded("scores have either sign")]
Bonus = Annotated[float, Unbounded("a negative weight lowers what a positive one raises")]

# The setting of `Config` that the state holds once a run has begun, and the path of its leaf, see `runs.Run`.
IN_STATE = {"algorithm.rewards.multiplier": "opt_state/rewards/multiplier"}


def ratio_limits(compute: Compute, routed: bool) -> dict[str, float]:
    """The bound on the metric `ratio/first_error` of a policy that is computed so.

    There is none where tokens are `routed` to experts: rounding may change which of two that are about as likely a
    token goes to, and so its probability by any amount.
    """
    return {} if routed else {"ratio/first_error": compute.ratio_error}


Totals = dict[str, Array]  # counts over the global minibatch, by which shares of a loss are divided


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings that PPO, GRPO and RLOO share."""

    epochs: Count = 1  # passes of training over each rollout
    minibatches: Count = 1  # parts of a rollout in each pass; each part gives one update
    buckets: Count = 1  # group responses by length into so many buckets, each padded only to its longest response
    temperature: Positive = 1.0  # sampling temperature, which also divides the logits of every log-probability
    stop_at_eos: bool = True  # False: sample and train on all max_new_tokens, past any EOS (arXiv:1909.08593)
    unfinished_score: Score | None = None  # score that replaces that of a response without EOS; None keeps it
    unfinished_penalty: NonNegative = 0.0  # reward subtracted from the score of a response without EOS
    # The last so many of max_new_tokens, over which the score falls linearly by 1 (arXiv:2503.14476, eq. 13); 0: none.
    soft_limit: Whole = 0
    entropy_coef: Bonus = 0.0  # weight of the policy's entropy (nats a token), which is maximised
    ptx_coef: NonNegative = 27.8  # weight of the pretraining loss (nats a token), if there is pretraining text
    stop_kl: NonNegative | None = None  # skip a rollout's updates once approx_kl exceeds this, in nats a token
    ema: Rate | None = None  # decay rate per update of a running average of the policy's weights; None: none
    rewards: "rewards.Config" = rewards.Config()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unfinished_score is not None and self.unfinished_penalty:
            raise InputError(
                "unfinished_score replaces the score that unfinished_penalty lowers: leave out one of them"
            )
        if self.rewards.length_penalty and not self.stop_at_eos:
            raise InputError("length_penalty has no effect with stop_at_eos=False, where all responses are as long")

    @property
    def learnt(self) -> float:
        """The share of a rollout's episodes that the loss reads."""
        return 1.0


def init(params: dict[str, Params], tx: optax.GradientTransformation, cfg: Config, rng: jax.Array) -> TrainState:
    """The state before the first rollout. `params` has an entry "policy" and one for each other trained network."""
    opt_state = {"optimizer": tx.init(params)}
    if cfg.ema is not None:
        opt_state["ema"] = jax.tree.map(jnp.copy, params["policy"])  # a copy, since a buffer can be donated only once
    if (several := rewards.init(cfg.rewards)) is not None:
        opt_state["rewards"] = several
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng)


def combine_rewards(state: TrainState, rollout: Rollout, cfg: Config) -> tuple[TrainState, Rollout, Metrics]:
    """The whole rollout with one score for each response, as `cfg.rewards` says, and the state that remembers it."""
    remembered = state.opt_state.get("rewards")
    rollout, after, metrics = rewards.combine(rollout, remembered or rewards.Rewards(), cfg.rewards)
    if remembered is not None:
        state = state.replace(opt_state=state.opt_state | {"rewards": after})
    return state, rollout, metrics


def overlong_penalty(length: Int[Array, "B"], limit: int, soft: int) -> Float[Array, "B"]:
    """DAPO's penalty of long responses (arXiv:2503.14476, eq. 13), from 0 at `limit - soft` tokens to -1 at `limit`."""
    return jnp.clip((limit - soft - length) / soft, -1.0, 0.0)


def final_score(rollout: Rollout, cfg: Config) -> Float[Array, "B"]:
    """The score of each response, lowered as `cfg` says if it is long, and replaced or lowered if it has no EOS."""
    score = rollout.score - jnp.where(rollout.ended, 0.0, cfg.unfinished_penalty)
    if cfg.soft_limit:
        if cfg.soft_limit > rollout.response_mask.shape[1]:
            raise InputError(
                f"soft_limit={cfg.soft_limit}: expected at most max_new_tokens, {rollout.response_mask.shape[1]}"
            )
        score += overlong_penalty(
            jnp.sum(rollout.response_mask, axis=1), rollout.response_mask.shape[1], cfg.soft_limit
        )
    return score if cfg.unfinished_score is None else jnp.where(rollout.ended, score, cfg.unfinished_score)


def response_score(rollout: Rollout, cfg: Config) -> Float[Array, "B"]:
    """The `final_score` of each response, plus the sum of its token scores if there are any."""
    score = final_score(rollout, cfg)
    if rollout.token_score is None:
        return score
    return score + jnp.sum(jnp.where(rollout.response_mask, rollout.token_score, 0.0), axis=1)


def earned(rollout: Rollout, cfg: Config, kl_coef: float) -> Float[Array, "B N"]:
    """The reward of each token, for the records, less `kl_coef` times its KL to the reference.

    It is the token's own score if there is one and, at the last token of a response, the `final_score` too.
    """
    kl, mask = rollout.logp - rollout.logp_ref, rollout.response_mask
    reward = token_rewards(final_score(rollout, cfg), kl, mask, kl_coef)
    return reward if rollout.token_score is None else reward + jnp.where(mask, rollout.token_score, 0.0)


def response_kl(rollout: Rollout) -> Float[Array, "B"]:
    """The k1 estimate of the KL to the reference, summed over each response, in nats."""
    return jnp.sum(jnp.where(rollout.response_mask, rollout.logp - rollout.logp_ref, 0.0), axis=1)


def describe(rollout: Rollout, score: Float[Array, "B"]) -> Metrics:
    """Metrics of a rollout: scores, KL to the reference (nats a response), entropy (nats a token), lengths (tokens)."""
    mask = rollout.response_mask
    return (
        {
            "reward/score": jnp.mean(score),
            "kl/reference": jnp.mean(response_kl(rollout)),
            "policy/entropy": masked_mean(-rollout.logp, mask),  # estimated from the sampled tokens
            "prompt/tokens": jnp.mean(jnp.sum(rollout.mask[:, : -mask.shape[1]], axis=1)),
            "response/tokens": jnp.mean(jnp.sum(mask, axis=1)),
            "response/ended": jnp.mean(rollout.ended),
        }
        | ({} if rollout.disagreement is None else {"reward/disagreement": jnp.mean(rollout.disagreement)})
        | ({} if rollout.unjudged is None else {"reward/unjudged": jnp.mean(rollout.unjudged)})
    )


def forward(
    params: Params, rollout: Rollout, policy_fn: LogprobsFn, cfg: Config, group: int = 1
) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
    """The policy's log-probabilities of a rollout's responses, and its entropies if `entropy_coef` needs them; nats.

    Each `group` rows have the same prompt, see `devices.shared`.
    """
    return policy_fn(
        params,
        rollout.tokens,
        rollout.mask,
        start=rollout.tokens.shape[1] - rollout.response_mask.shape[1] - 1,
        temperature=cfg.temperature,
        with_entropy=bool(cfg.entropy_coef),
        group=group,
    )


def shared_group(rollout: Rollout, cfg: Config, group: int, whole: bool | None) -> int:
    """The number of consecutive episodes to one prompt that minibatches keep together, 1 where they do not."""
    if whole is None:
        new = rollout.response_mask.shape[1]
        divides = rollout.tokens.shape[0] % (cfg.minibatches * group) == 0
        long = shared.worthwhile(rollout.tokens.shape[1] - new, new, group)
        whole = divides and (cfg.minibatches == 1 or long)
    return group if whole else 1


def ratio_error(logp: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The largest |ratio - 1| over valid tokens, with ratio = exp(logp - logp_old).

    Before the first update it is 0 except for rounding, unless sampler and loss compute different probabilities.
    """
    return jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(logp - logp_old)), 0.0))


def auxiliary_losses(
    params: Params,
    entropy: Float[Array, "B N"] | None,
    mask: Bool[Array, "B N"],
    text: Tokens | None,
    totals: Totals,
    *,
    policy_fn: LogprobsFn,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The share of -entropy_coef entropy + ptx_coef next-token loss on `text`; a term without input is left out.

    The means are over totals["tokens"], the response tokens, and totals["text"], the target tokens of the text.
    """
    total, metrics = jnp.float32(0.0), {}
    if entropy is not None:
        metrics["loss/entropy"] = -masked_mean(entropy, mask, totals["tokens"])
        total += cfg.entropy_coef * metrics["loss/entropy"]
    if text is not None:
        metrics["loss/ptx"] = sft.loss(params, text, policy_fn, count=totals["text"])
        total += cfg.ptx_coef * metrics["loss/ptx"]
    return total, metrics


@dataclasses.dataclass(frozen=True)
class Objective(Generic[Batch]):
    """The loss of an algorithm on a minibatch of episodes, written so that shares of it add up."""

    # (params, rows, text, totals) -> the share of the loss that some rows of a minibatch have, and metrics, which are
    # summed over shares. One of the metrics must be "ratio_error", of which the largest is taken; with `stop_kl` also
    # "policy/approx_kl".
    loss: Callable[..., tuple[Array, Metrics]]
    totals: Callable[[Batch], Totals]  # rows -> their counts, which add up to the totals; "tokens" among them
    live: Callable[[Batch], Array]  # rows -> [B, N] bool, the response columns that the loss depends on
    group: int = 1  # consecutive episodes that minibatches do not tear apart: those to one prompt, if they share it
    balance: float = 0.0  # weight of a load-balancing loss beside it, see `algorithms.balance`


class Progress(struct.PyTreeNode):
    """The part of the state that an update changes."""

    params: Params
    optimizer: Any
    ema: Params = None  # average of the policy's weights, if `Config.ema` is set
    active: Leaf = None  # [] bool, False once `Config.stop_kl` has been exceeded, if it is set


def apply(
    state: TrainState,
    batch: Batch,
    text: Tokens | None,
    *,
    objective: Objective[Batch],
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int,
    axis: str | None,
) -> tuple[TrainState, Metrics]:
    """All epochs and minibatches of updates on the global batch of episodes, of which every device has a whole copy.

    Minibatches are drawn from the global batch, so they do not depend on the number of devices. `text` is None or
    pretraining text for each update, [epochs * minibatches, B, T]. Metrics are means over the updates, except
    `ratio/first_error`, the largest |ratio - 1| of the first update: more than rounding means that the sampler and the
    loss disagree. Raises InputError when the episodes do not divide into minibatches, or text and updates do not match.
    """
    episodes = jax.tree.leaves(batch)[0].shape[0]
    if episodes % cfg.minibatches:
        raise InputError(f"{episodes} episodes do not divide into {cfg.minibatches} minibatches: use a multiple")
    if episodes % (cfg.minibatches * objective.group):
        raise InputError(
            f"{episodes // objective.group} groups of episodes do not divide into {cfg.minibatches} minibatches: use a"
            " multiple"
        )
    updates = cfg.epochs * cfg.minibatches
    if text is not None and text.tokens.shape[0] != updates:
        raise InputError(f"pretraining text for {text.tokens.shape[0]} updates, but there are {updates}")
    key = jax.random.fold_in(state.rng, state.step)
    parts = cfg.buckets * microbatches
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), episodes // objective.group))
    members = order(jnp.arange(cfg.epochs))[..., None] * objective.group + jnp.arange(objective.group)[None, None]
    rows = members.reshape(updates, -1)

    def update(progress: Progress, inputs: tuple[Array, Tokens | None]) -> tuple[Progress, Metrics]:
        rows, text = inputs
        local = parallel.shard_rows(jax.tree.map(lambda x: x[parallel.local_rows(rows, axis)], batch))
        totals = objective.totals(local) | ({} if text is None else {"text": jnp.sum(text.target[:, 1:])})
        params = attach(progress.params, objective.balance, parts, axis)
        share: Callable = functools.partial(
            jax.grad(objective.loss, has_aux=True), params, totals=parallel.psum(totals, axis)
        )
        block = ragged.together(len(jax.tree.leaves(local)[0]), parts, objective.group)
        blocks = local if block == 1 else ragged.blocks(local, block)
        if cfg.buckets > 1:
            index = ragged.order(jnp.any(ragged.blocks(objective.live(local), block), axis=1), parts)
            blocks = jax.tree.map(lambda x: x[index], blocks)
            share = ragged.trimmed(share, objective.live, cfg.buckets)
        of_blocks = share if block == 1 else lambda blocks, text: share(ragged.unblock(blocks), text)
        grads, metrics = parallel.accumulate(of_blocks, parts)(blocks, text)
        worst = parallel.pmax(jnp.max(metrics.pop("ratio_error")), axis)  # a maximum, which does not add up
        grads, metrics = parallel.psum((grads, jax.tree.map(jnp.sum, metrics)), axis)
        grads, load = detach(grads)
        updated = step(progress, grads, tx, cfg)
        if cfg.stop_kl is not None:
            active = progress.active & (metrics["policy/approx_kl"] <= cfg.stop_kl)
            updated = jax.tree.map(functools.partial(jnp.where, active), updated, progress).replace(active=active)
            metrics["policy/updated"] = active.astype(jnp.float32)
        norms = {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}
        return updated, metrics | norms | load | {"ratio_error": worst}

    initial = Progress(
        params=state.params,
        optimizer=state.opt_state["optimizer"],
        ema=state.opt_state.get("ema"),
        active=None if cfg.stop_kl is None else jnp.bool_(True),
    )
    final, history = jax.lax.scan(update, initial, (rows, text))
    metrics = {"ratio/first_error": history.pop("ratio_error")[0]} | jax.tree.map(jnp.mean, history)
    opt_state = state.opt_state | {"optimizer": final.optimizer}
    if final.ema is not None:
        opt_state["ema"] = final.ema
    return state.replace(step=state.step + 1, params=final.params, opt_state=opt_state), metrics


def step(progress: Progress, grads: Params, tx: optax.GradientTransformation, cfg: Config) -> Progress:
    """The progress after one optimiser step and one step of the weight average."""
    changes, optimizer = tx.update(grads, progress.optimizer, progress.params)
    params = optax.apply_updates(progress.params, changes)
    ema = progress.ema
    if cfg.ema is not None:
        ema = optax.incremental_update(params["policy"], progress.ema, 1 - cfg.ema)
    return progress.replace(params=params, optimizer=optimizer, ema=ema)
