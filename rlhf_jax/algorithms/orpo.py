"""ORPO (arXiv:2403.07691): fine-tuning on preferred responses and a penalty on odds, without a reference model.

The odds of a response are p / (1 - p), with p the geometric mean of its tokens' probabilities.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms import preferences
from rlhf_jax.algorithms.preferences import mean_logprobs
from rlhf_jax.algorithms.reward import margins, pair_mask, pair_mean
from rlhf_jax.settings import Positive, Settings
from rlhf_jax.types import LogprobsFn, Metrics, Params, Rankings, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    weight: Positive = 0.1  # of the odds-ratio loss beside the likelihood: lambda of the paper (appendix C)


def log_odds(logp: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """ln(p / (1 - p)) of probabilities given by their logarithm; exact where p is nearly 1, finite where it is 1."""
    logp = jnp.minimum(logp, -1e-12)
    return logp - jnp.log(-jnp.expm1(logp))


def losses(logp: Float[Array, "B K"], batch: Rankings, count: Array | None = None) -> tuple[Array, Array]:
    """The negative log-likelihood, a token, of each pair's chosen response, and -ln sigmoid(log odds ratio) (eq. 6, 7).

    `logp` is the mean log-probability of each response's tokens. Both are means over each prompt's pairs, then over
    prompts. A response that is chosen in more pairs counts more in the first.
    """
    pair = pair_mask(batch.rank)
    in_pair = jnp.any(pair, axis=1) | jnp.any(pair, axis=2)
    logp = jnp.where(in_pair, logp, -1.0)  # of no effect, and without a gradient that is not finite
    chosen = jnp.broadcast_to(-logp[:, :, None], pair.shape)
    ratio = margins(log_odds(logp), pair)
    return pair_mean(chosen, pair, count), pair_mean(-jax.nn.log_sigmoid(ratio), pair, count)


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
        logp = preferences.response_logprobs(params, batch, logprobs_fn, keys, mean_logprobs)
        likelihood, odds = losses(logp, batch, count)
        value = likelihood + cfg.weight * odds
        metrics = {"loss/orpo": value, "loss/likelihood": likelihood, "loss/odds": odds}
        return value, logp, metrics

    return preferences.update(state, batch, objective, tx=tx, microbatches=microbatches, balance=balance, axis=axis)
