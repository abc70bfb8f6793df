"""The updates on a rollout: what PPO, GRPO and RLOO share, whatever their loss.

Epochs and minibatches run inside one compiled call, with the pretraining mix, entropy bonus, average of the weights and
early stop that any of them may have.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import sft
from rlhf_jax.devices import parallel, ragged
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.settings import Count, NonNegative, Positive, Rate, Settings, Unbounded
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

Batch = TypeVar("Batch")  # a pytree whose leaves count episodes on their first axis
Score = Annotated[float, Unbounded("scores have either sign")]
Bonus = Annotated[float, Unbounded("a negative weight lowers what a positive one raises")]
# The largest |ratio - 1| that rounding leaves in the first pass over a rollout, by the type of the trunk.
RATIO_ERROR = {"float32": 1e-4, "bfloat16": 0.1}

Totals = dict[str, Array]  # what shares of a loss are divided by: counts over the global minibatch


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings that every algorithm has."""

    epochs: Count = 1  # passes over each rollout
    minibatches: Count = 1  # updates a pass
    buckets: Count = 1  # parts of like length in which responses are read and learnt from, each as wide as it needs
    temperature: Positive = 1.0  # of sampling, and so of every log-probability
    stop_at_eos: bool = True  # False: responses go on, and all their tokens are trained on (Ziegler et al. 2019)
    unfinished_score: Score | None = None  # replaces the score of a response without EOS
    unfinished_penalty: NonNegative = 0.0  # subtracted from the score of a response without EOS
    clip: Positive = 0.2  # of the probability ratio, to each side of 1
    entropy_coef: Bonus = 0.0  # weight of the policy's entropy
    ptx_coef: NonNegative = 27.8  # weight of the pretraining loss where a rollout comes with pretraining text
    stop_kl: NonNegative | None = None  # a rollout's updates end before the first whose approx_kl exceeds this
    ema: Rate | None = None  # decay an update of an average of the policy's weights, kept beside them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unfinished_score is not None and self.unfinished_penalty:
            raise InputError("unfinished_score replaces what unfinished_penalty lowers: leave out one of them")


def init(params: dict[str, Params], tx: optax.GradientTransformation, cfg: Config, rng: jax.Array) -> TrainState:
    """The state before the first rollout. `params` holds "policy" and whatever else is trained."""
    opt_state = {"optimizer": tx.init(params)}
    if cfg.ema is not None:
        opt_state["ema"] = jax.tree.map(jnp.copy, params["policy"])  # donated apart from what it copies
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng)


def final_score(rollout: Rollout, cfg: Config) -> Float[Array, "B"]:
    """Each response's score, as `cfg` has it where there is no EOS."""
    score = rollout.score - jnp.where(rollout.ended, 0.0, cfg.unfinished_penalty)
    return score if cfg.unfinished_score is None else jnp.where(rollout.ended, score, cfg.unfinished_score)


def response_score(rollout: Rollout, cfg: Config) -> Float[Array, "B"]:
    """`final_score`, and the sum of the token scores where there are any."""
    score = final_score(rollout, cfg)
    if rollout.token_score is None:
        return score
    return score + jnp.sum(jnp.where(rollout.response_mask, rollout.token_score, 0.0), axis=1)


def response_kl(rollout: Rollout) -> Float[Array, "B"]:
    """The k1 estimate of the KL to the reference, summed over each response."""
    return jnp.sum(jnp.where(rollout.response_mask, rollout.logp - rollout.logp_ref, 0.0), axis=1)


def describe(rollout: Rollout, score: Float[Array, "B"]) -> Metrics:
    """What can be said of a rollout before anything is learnt from it; KL summed over each response."""
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
    )


def forward(
    params: Params, rollout: Rollout, policy_fn: LogprobsFn, cfg: Config
) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
    """The policy's log-probabilities of a rollout's responses, and its entropies where `cfg` has a use for them."""
    return policy_fn(
        params,
        rollout.tokens,
        rollout.mask,
        start=rollout.tokens.shape[1] - rollout.response_mask.shape[1] - 1,
        temperature=cfg.temperature,
        with_entropy=bool(cfg.entropy_coef),
    )


def ratio_error(logp: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """The largest |ratio - 1|: 0 but for rounding where what was sampled is what is scored."""
    return jnp.max(jnp.where(mask, jnp.abs(jnp.expm1(logp - logp_old)), 0.0))


def extras(
    params: Params,
    entropy: Float[Array, "B N"] | None,
    mask: Bool[Array, "B N"],
    text: Tokens | None,
    totals: Totals,
    *,
    policy_fn: LogprobsFn,
    cfg: Config,
) -> tuple[Float[Array, ""], Metrics]:
    """The share of -entropy_coef * entropy + ptx_coef * next-token loss on `text`, as far as there are any.

    `totals` has the numbers of "tokens" of responses and of targets of the "text".
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
    """What an algorithm descends on a minibatch of episodes, as sums over rows, so that shares of it add up."""

    # (params, rows, text, totals) -> the share that some rows of a minibatch have in its loss, and metrics that add up
    # over them; with "ratio_error", a maximum, and, for `stop_kl`, "policy/approx_kl" among them.
    loss: Callable[[Params, Batch, Tokens | None, Totals], tuple[Array, Metrics]]
    totals: Callable[[Batch], Totals]  # rows -> what adds up to the totals that shares are divided by
    live: Callable[[Batch], Array]  # rows -> [B, N] bool, the columns of the responses that have a part in the loss


class Progress(struct.PyTreeNode):
    """What an update changes."""

    params: Params
    optimizer: Any
    ema: Params = None  # average of the policy's weights, where `Config.ema` asks for one
    going: Leaf = None  # [] bool, False once `Config.stop_kl` has been exceeded, where there is one


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
    """All epochs and minibatches on the global batch of episodes, which every device has whole.

    So minibatch m consists of the same episodes however many devices share its rows. `text`, where given, holds
    pretraining rows for each update, `[epochs * minibatches, B, T]`. Metrics are means over the updates;
    `ratio/first_error` is the largest |ratio - 1| of the first one: anything but rounding means that what was sampled
    is not what is scored.
    """
    episodes = jax.tree.leaves(batch)[0].shape[0]
    if episodes % cfg.minibatches:
        raise InputError(f"{episodes} episodes do not divide into {cfg.minibatches} minibatches")
    updates, parts = cfg.epochs * cfg.minibatches, cfg.buckets * microbatches
    if text is not None and text.tokens.shape[0] != updates:
        raise InputError(f"pretraining text for {text.tokens.shape[0]} updates, but there are {updates}")
    key = jax.random.fold_in(state.rng, state.step)
    order = jax.vmap(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), episodes))
    rows = order(jnp.arange(cfg.epochs)).reshape(updates, -1)

    def update(before: Progress, inputs: tuple[Array, Tokens | None]) -> tuple[Progress, Metrics]:
        rows, text = inputs
        own = parallel.spread(jax.tree.map(lambda x: x[parallel.own_rows(rows, axis)], batch))
        grads, metrics = gradients(before.params, own, text, objective, cfg.buckets, parts, axis)
        after = step(before, grads, tx, cfg)
        if cfg.stop_kl is not None:
            going = before.going & (metrics["policy/approx_kl"] <= cfg.stop_kl)
            after = jax.tree.map(functools.partial(jnp.where, going), after, before).replace(going=going)
            metrics["policy/updated"] = going.astype(jnp.float32)
        return after, metrics | {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}

    before = Progress(
        params=state.params,
        optimizer=state.opt_state["optimizer"],
        ema=state.opt_state.get("ema"),
        going=None if cfg.stop_kl is None else jnp.bool_(True),
    )
    after, history = jax.lax.scan(update, before, (rows, text))
    metrics = {"ratio/first_error": history.pop("ratio_error")[0]} | jax.tree.map(jnp.mean, history)
    opt_state = state.opt_state | {"optimizer": after.optimizer}
    if after.ema is not None:
        opt_state["ema"] = after.ema
    return state.replace(step=state.step + 1, params=after.params, opt_state=opt_state), metrics


def gradients(
    params: Params,
    own: Batch,
    text: Tokens | None,
    objective: Objective[Batch],
    buckets: int,
    parts: int,
    axis: str | None,
) -> tuple[Params, Metrics]:
    """Gradient and metrics of one global minibatch, of which this device has the rows `own`, in `parts` of them."""
    totals = objective.totals(own) | ({} if text is None else {"text": jnp.sum(text.target[:, 1:])})
    totals = parallel.psum(totals, axis)
    share = lambda rows, text: jax.grad(objective.loss, has_aux=True)(params, rows, text, totals)
    if buckets > 1:
        own = jax.tree.map(lambda x: x[ragged.order(objective.live(own), parts)], own)
        share = ragged.trimmed(share, objective.live, buckets)
    grads, metrics = parallel.accumulate(lambda rows: share(*rows), (own, text), parts)
    worst = parallel.pmax(jnp.max(metrics.pop("ratio_error")), axis)  # not a share but a maximum
    grads, metrics = parallel.psum((grads, jax.tree.map(jnp.sum, metrics)), axis)
    return grads, metrics | {"ratio_error": worst}


def step(before: Progress, grads: Params, tx: optax.GradientTransformation, cfg: Config) -> Progress:
    """One optimiser step, and one of the average of the policy's weights."""
    changes, optimizer = tx.update(grads, before.optimizer, before.params)
    params = optax.apply_updates(before.params, changes)
    ema = before.ema
    if cfg.ema is not None:
        ema = optax.incremental_update(params["policy"], before.ema, 1 - cfg.ema)
    return before.replace(params=params, optimizer=optimizer, ema=ema)
