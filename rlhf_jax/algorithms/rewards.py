"""From scores to one reward: normalised, added up with weights, clipped, lowered by length, or constrained by a cost.

The constraint is the Lagrangian form of Safe RLHF (arXiv:2310.12773): maximise the reward subject to a mean cost of at
most a threshold, with a multiplier that rises while the cost is above it. The paper trains a critic for the reward and
one for the cost; here one critic learns the value of both together. Advantages are linear in scores and values, so the
combination of two advantages is the advantage of the combined score.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from rlhf_jax.logprobs import precise
from rlhf_jax.settings import NonNegative, Positive, Settings, Unbounded
from rlhf_jax.types import InputError, Leaf, Metrics, Rollout

Weight = Annotated[float, Unbounded("a negative weight lowers what a positive one raises")]
Cost = Annotated[float, Unbounded("costs have either sign")]


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How scores become a reward, in this order; by default those of the reward models are averaged, no more."""

    # Weights of the reward models' scores, each normalised by its running mean and standard deviation, in the order of
    # the models; (): average the scores as they are.
    weights: tuple[Weight, ...] = ()
    normalize: bool = False  # normalise the one score, from whatever source, by its running mean and standard deviation
    clip: Positive | None = None  # clip the score to [-clip, clip], after it is normalised (arXiv:2307.04964)
    length_penalty: NonNegative = 0.0  # score subtracted for each token of a response (arXiv:2310.03716)
    threshold: Cost | None = None  # largest mean cost, of a cost model; None: no constraint
    multiplier: Positive = 1.0  # initial Lagrange multiplier of the constraint
    multiplier_lr: NonNegative = 0.1  # step size of its logarithm, per rollout and unit of cost; 0: a fixed multiplier
    multiplier_max: Positive = 10.0  # upper bound of the multiplier

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights and not any(self.weights):
            raise InputError(f"weights={self.weights}: expected at least one that is not 0")
        if self.weights and self.normalize:
            raise InputError(
                "normalize has no effect on scores that weights add up, which are normalised: leave it out"
            )
        if self.threshold is None:
            for name in ("multiplier", "multiplier_lr", "multiplier_max"):
                if getattr(self, name) != getattr(Config, name):
                    raise InputError(f"{name} has no effect without threshold: set threshold, or leave out {name}")
        if self.multiplier > self.multiplier_max:
            raise InputError(
                f"multiplier={self.multiplier}: expected at most multiplier_max={self.multiplier_max}, its bound"
            )

    def check(self, rewards: int, cost: bool, pessimism: float = 0.0) -> None:
        """Raise InputError unless the settings suit so many reward models, a cost model or none, and this pessimism."""
        if self.weights and len(self.weights) != rewards:
            raise InputError(f"weights={self.weights}: expected a weight for each of the {rewards} models of --reward")
        if self.weights and pessimism:
            raise InputError("pessimism has no effect on scores that weights add up: leave out one of them")
        if cost and self.threshold is None:
            raise InputError("the cost model has no effect without a threshold: set --algorithm.rewards.threshold")
        if self.threshold is not None and not cost:
            raise InputError("threshold bounds the scores of a cost model: name one by --cost")

    def check_process(self) -> None:
        """Raise InputError for settings that would change a score where steps have rewards of their own."""
        if dataclasses.replace(self, length_penalty=0.0) != Config():
            raise InputError(
                "of algorithm.rewards only length_penalty goes with process rewards, which are no scores of the whole:"
                " leave out the others"
            )


class Moments(struct.PyTreeNode):
    """Running mean and variance of R scores."""

    count: Leaf  # [] float32, number of episodes
    mean: Leaf  # [R]
    squares: Leaf  # [R], sum of the squared deviations from the mean


class Rewards(struct.PyTreeNode):
    """The part of the state that combines rewards. A field that the settings do not need is None."""

    moments: Moments | None = None
    multiplier: Leaf = None  # [] float32


def init(cfg: Config) -> Rewards | None:
    """The state before the first rollout; None if the settings need none."""
    count = len(cfg.weights) or int(cfg.normalize)
    if not count and cfg.threshold is None:
        return None
    return Rewards(
        moments=Moments(jnp.float32(0.0), jnp.zeros(count), jnp.zeros(count)) if count else None,
        multiplier=None if cfg.threshold is None else jnp.float32(cfg.multiplier),
    )


def update_moments(moments: Moments, scores: Float[Array, "B R"]) -> Moments:
    """The moments after a further rollout, as if all scores had been seen at once (Chan et al. 1979)."""
    scores = precise(scores)
    count = scores.shape[0]
    mean = jnp.mean(scores, axis=0)
    squares = jnp.sum(jnp.square(scores - mean[None]), axis=0)
    total = moments.count + count
    difference = mean - moments.mean
    return Moments(
        count=total,
        mean=moments.mean + difference * count / total,
        squares=moments.squares + squares + jnp.square(difference) * moments.count * count / total,
    )


def normalize(scores: Float[Array, "B R"], moments: Moments) -> Float[Array, "B R"]:
    """The scores (x - mean) / sqrt(variance + 1e-8), with the biased variance of all episodes so far."""
    variance = moments.squares / moments.count
    return (precise(scores) - moments.mean[None]) * jax.lax.rsqrt(variance + 1e-8)[None]


def weighted_sum(scores: Float[Array, "B R"], weights: tuple[float, ...]) -> Float[Array, "B"]:
    """The sum of each row's scores times their weights."""
    return jnp.sum(precise(scores) * jnp.array(weights, jnp.float32)[None], axis=1)


def lagrangian(
    reward: Float[Array, "*shape"],
    cost: Float[Array, "*shape"],
    multiplier: float | Float[Array, ""],
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """The combination (reward - multiplier cost) / (1 + multiplier) of two scores or two advantages, 0 outside `mask`.

    The divisor keeps the scale as the multiplier grows (arXiv:2310.12773, appendix B.3).
    """
    combined = (precise(reward) - multiplier * precise(cost)) / (1 + multiplier)
    return combined if mask is None else jnp.where(mask, combined, 0.0)


def update_multiplier(
    multiplier: float | Float[Array, ""], cost: float | Float[Array, ""], cfg: Config
) -> Float[Array, ""]:
    """The next multiplier: ln m + lr m (cost - threshold), at most ln multiplier_max (arXiv:2310.12773, eq. 13).

    `cost` is the mean over a rollout. Ascent on the logarithm keeps the multiplier positive; the bound is of the
    authors' code.
    """
    assert cfg.threshold is not None
    change = cfg.multiplier_lr * multiplier * (cost - cfg.threshold)
    logarithm = jnp.minimum(jnp.log(multiplier) + change, jnp.log(cfg.multiplier_max))
    # exp(log(m)) is not m in float32: a multiplier without a step size stays what it is.
    return jnp.asarray(jnp.where(change == 0, multiplier, jnp.exp(logarithm)), jnp.float32)


def adjust(rollout: Rollout, cfg: Config) -> tuple[Rollout, Metrics]:
    """The rollout with each score clipped, and lowered by `length_penalty` for each token of its response."""
    metrics: Metrics = {}
    score = rollout.score
    if cfg.clip is not None:
        metrics["reward/clipped"] = jnp.mean(jnp.abs(score) > cfg.clip)  # share of the responses
        score = jnp.clip(score, -cfg.clip, cfg.clip)
    if cfg.length_penalty:
        penalty = cfg.length_penalty * jnp.sum(rollout.response_mask, axis=1)
        metrics["reward/length_penalty"] = jnp.mean(penalty)
        score = score - penalty
    return rollout.replace(score=score), metrics


def combine(rollout: Rollout, rewards: Rewards, cfg: Config) -> tuple[Rollout, Rewards, Metrics]:
    """A whole rollout with one score for each response, the next state, and metrics of the parts.

    A rollout's own scores count in the moments that normalise them. Its costs count in the multiplier of the next one.
    """
    metrics: Metrics = {}
    if rewards.moments is not None:
        scores = rollout.scores if cfg.weights else rollout.score[:, None]
        if scores is None or scores.shape[1] != len(rewards.moments.mean):
            raise InputError(f"weights={cfg.weights}: expected so many scores of each response")
        moments = update_moments(rewards.moments, scores)
        rollout = rollout.replace(score=weighted_sum(normalize(scores, moments), cfg.weights or (1.0,)))
        rewards = rewards.replace(moments=moments)
        for number, mean in enumerate(jnp.mean(scores, axis=0)):
            metrics[f"reward/score_{number}"] = mean
            metrics[f"reward/running_mean_{number}"] = moments.mean[number]
            metrics[f"reward/running_std_{number}"] = jnp.sqrt(moments.squares[number] / moments.count)
    rollout, adjusted = adjust(rollout, cfg)
    metrics |= adjusted
    if cfg.threshold is not None:
        if rollout.cost is None:
            raise InputError(f"threshold={cfg.threshold}: expected a cost of each response")
        cost = jnp.mean(precise(rollout.cost))
        metrics |= {
            "cost/mean": cost,
            "cost/multiplier": rewards.multiplier,
            "reward/before_cost": jnp.mean(rollout.score),
        }
        rollout = rollout.replace(score=lagrangian(rollout.score, rollout.cost, rewards.multiplier))
        rewards = rewards.replace(multiplier=update_multiplier(rewards.multiplier, cost, cfg))
    return rollout.replace(scores=None, cost=None), rewards, metrics
