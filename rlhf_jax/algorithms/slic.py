"""SLiC-HF (arXiv:2305.10425): a margin between log-probabilities, and the likelihood of the best response."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms import preferences
from rlhf_jax.algorithms.reward import margins, pair_mask, pair_mean
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.settings import NonNegative, Positive, Settings
from rlhf_jax.types import LogprobsFn, Metrics, Params, Rankings, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    delta: Positive = 1.0  # difference, in nats, that a pair's log-probabilities should have
    weight: NonNegative = 0.1  # of the likelihood of the best response, which holds the policy near what it was


def terms(h: Float[Array, "*pairs"], delta: float) -> Float[Array, "*pairs"]:
    """The calibration loss of each pair, max(0, delta - h), where h is the difference of log-probabilities (eq. 1)."""
    return jax.nn.relu(delta - h)


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
    """One update on the global batch of rankings: the mean over each prompt's pairs, then over prompts.

    The target whose likelihood is kept up is the response of smallest rank, the first among equals.
    """

    def objective(params: Params, batch: Rankings, keys: Array, count: Array) -> tuple[Array, Array, Metrics]:
        logp = preferences.response_logprobs(params, batch, logprobs_fn, keys)
        pair = pair_mask(batch.rank)
        best = jnp.argmin(jnp.where(batch.rank >= 0, batch.rank, jnp.iinfo(batch.rank.dtype).max), axis=1)
        target = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
        calibration = pair_mean(terms(margins(logp, pair), cfg.delta), pair, count)
        likelihood = masked_mean(-target, jnp.any(pair, axis=(1, 2)), count)
        value = calibration + cfg.weight * likelihood
        metrics = {"loss/slic": value, "loss/calibration": calibration, "loss/likelihood": likelihood}
        return value, logp, metrics

    return preferences.update(state, batch, objective, tx=tx, microbatches=microbatches, balance=balance, axis=axis)
