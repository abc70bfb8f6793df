"""Direct preference optimisation (arXiv:2305.18290): learning from rankings without a reward model or sampling.

The policy is its own reward model: response y to prompt x has the implicit reward beta ln(pi(y|x) / pi_ref(y|x)), where
pi is the policy and pi_ref the frozen reference model. A ranking of K responses contributes all its pairs, as in
`reward`. IPO, robust DPO, EXO, the hinge loss and DPO a token are settings of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlhf_jax.algorithms import preferences
from rlhf_jax.algorithms.preferences import mean_logprobs, sequence_logprobs
from rlhf_jax.algorithms.reward import margins, pair_mask, pair_mean
from rlhf_jax.settings import LabelNoise, Positive, Settings
from rlhf_jax.types import InputError, LogprobsFn, Metrics, Params, Rankings, TrainState

Loss = Literal["sigmoid", "ipo", "robust", "exo", "hinge"]


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    beta: Positive = 0.1  # strength of the implied KL constraint: implicit reward per nat of log-ratio to the reference
    loss: Loss = "sigmoid"  # loss of a pair, see `TERMS`
    label_smoothing: LabelNoise = 0.0  # assumed probability that a pair's label is wrong; with sigmoid, robust and exo
    per_token: bool = False  # divide a response's log-ratio by its length (arXiv:2411.15124, section 5.1.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss in ("ipo", "hinge") and self.label_smoothing:
            raise InputError(f"label_smoothing has no effect with loss={self.loss}: leave it out")
        if self.loss == "exo" and not self.label_smoothing:
            raise InputError("loss=exo compares with smoothed labels: give label_smoothing, such as 0.001")


def sigmoid_terms(h: Float[Array, "*pairs"], beta: float, label_smoothing: float = 0.0) -> Float[Array, "*pairs"]:
    """DPO's loss of each pair, -(1 - e) ln sigmoid(beta h) - e ln sigmoid(-beta h) (arXiv:2305.18290, eq. 7).

        h = ln(pi(y_w) / pi_ref(y_w)) - ln(pi(y_l) / pi_ref(y_l))

    y_w is the chosen response and y_l the rejected one, pi the policy and pi_ref the reference; h is in nats. e is
    `label_smoothing`, the probability that the label is flipped (conservative DPO).
    """
    terms = -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * h)
    return terms - label_smoothing * jax.nn.log_sigmoid(-beta * h) if label_smoothing else terms


def ipo_terms(h: Float[Array, "*pairs"], beta: float) -> Float[Array, "*pairs"]:
    """IPO's loss of each pair, (h - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17), with h as in `sigmoid_terms`."""
    return jnp.square(h - 0.5 / beta)


def robust_terms(h: Float[Array, "*pairs"], beta: float, label_smoothing: float) -> Float[Array, "*pairs"]:
    """Robust DPO's loss of each pair (arXiv:2403.00409): its mean over flipped labels is `sigmoid_terms` of true ones.

    (-(1 - e) ln sigmoid(beta h) + e ln sigmoid(-beta h)) / (1 - 2 e)
    """
    right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def exo_terms(h: Float[Array, "*pairs"], beta: float, label_smoothing: float) -> Float[Array, "*pairs"]:
    """EXO's loss of each pair (arXiv:2402.00856, eq. 16 with K = 2): KL(q || p), with e as `label_smoothing`.

    q = (sigmoid(beta h), sigmoid(-beta h)) and p = (1 - e, e).
    """
    right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    return jnp.exp(right) * (right - jnp.log1p(-label_smoothing)) + jnp.exp(wrong) * (wrong - jnp.log(label_smoothing))


def hinge_terms(h: Float[Array, "*pairs"], beta: float) -> Float[Array, "*pairs"]:
    """The hinge loss of each pair, max(0, 1 - beta h): SLiC on log-ratios (arXiv:2309.06657)."""
    return jax.nn.relu(1 - beta * h)


TERMS: dict[Loss, Callable[[Array, Config], Array]] = {
    "sigmoid": lambda h, cfg: sigmoid_terms(h, cfg.beta, cfg.label_smoothing),
    "ipo": lambda h, cfg: ipo_terms(h, cfg.beta),
    "robust": lambda h, cfg: robust_terms(h, cfg.beta, cfg.label_smoothing),
    "exo": lambda h, cfg: exo_terms(h, cfg.beta, cfg.label_smoothing),
    "hinge": lambda h, cfg: hinge_terms(h, cfg.beta),
}


def loss(
    logp_chosen: Float[Array, "B"],
    logp_rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """The mean of `sigmoid_terms` over B pairs, from log-probabilities of whole responses in nats.

    Only for comparison with other code: `train_step` averages the same terms over all pairs of each ranking.
    """
    h = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
    return jnp.mean(sigmoid_terms(h, beta, label_smoothing))


def ipo_loss(
    logp_chosen: Float[Array, "B"],
    logp_rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    beta: float,
) -> Float[Array, ""]:
    """The mean of `ipo_terms` over B pairs, from log-probabilities of whole responses in nats; see `loss`."""
    return jnp.mean(ipo_terms((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected), beta))


def train_step(
    state: TrainState,
    batch: Rankings,
    reference: Params,
    *,
    logprobs_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of rankings, whose prompts are spread over `axis`.

    The loss is the mean over each prompt's pairs, then over prompts. The reference is evaluated without dropout. The
    metrics describe the parameters before the update.
    """
    reduce = mean_logprobs if cfg.per_token else sequence_logprobs

    def objective(params: Params, batch: Rankings, keys: Array, count: Array) -> tuple[Array, Array, Metrics]:
        policy = preferences.response_logprobs(params, batch, logprobs_fn, keys, reduce)
        gain = policy - preferences.response_logprobs(reference, batch, logprobs_fn, reduce=reduce)
        pair = pair_mask(batch.rank)
        h = margins(gain, pair)
        value = pair_mean(TERMS[cfg.loss](h, cfg), pair, count)
        margin = cfg.beta * pair_mean(h, pair, count)
        return value, gain, {"loss/dpo": value, "reward/margin": margin}

    return preferences.update(state, batch, objective, tx=tx, microbatches=microbatches, balance=balance, axis=axis)
