"""SimPO (arXiv:2405.14734): preferences by the policy's own log-probability a token, without a reference model.

The implicit reward of a response is beta times the mean log-probability of its tokens, so that long responses have no
advantage, and a pair's rewards should differ by a margin gamma.
"""

import dataclasses

import jax
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms import preferences
from rlhf_jax.algorithms.preferences import mean_logprobs
from rlhf_jax.algorithms.reward import margins, pair_mask, pair_mean
from rlhf_jax.settings import NonNegative, Positive, Settings
from rlhf_jax.types import LogprobsFn, Metrics, Params, Rankings, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm; the defaults are of the range that the paper searched (appendix B)."""

    beta: Positive = 2.0  # implicit reward per nat of mean log-probability
    gamma: NonNegative = 1.0  # difference that a pair's implicit rewards should have; not multiplied by beta


def terms(h: Float[Array, "*pairs"], beta: float, gamma: float) -> Float[Array, "*pairs"]:
    """The loss of each pair, -ln sigmoid(beta h - gamma), with h the difference of mean log-probabilities (eq. 6)."""
    return -jax.nn.log_sigmoid(beta * h - gamma)


def train_step(
    state: TrainState,
    batch: Rankings,
    *,
    logprobs_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of rankings: the mean over each prompt's pairs, then over prompts."""

    def objective(params: Params, batch: Rankings, keys: Array, count: Array) -> tuple[Array, Array, Metrics]:
        score = preferences.response_logprobs(params, batch, logprobs_fn, keys, mean_logprobs)
        pair = pair_mask(batch.rank)
        h = margins(score, pair)
        value = pair_mean(terms(h, cfg.beta, cfg.gamma), pair, count)
        margin = cfg.beta * pair_mean(h, pair, count)
        return value, score, {"loss/simpo": value, "reward/margin": margin}

    return preferences.update(state, batch, objective, tx=tx, microbatches=microbatches, balance=balance, axis=axis)
