"""Direct preference optimisation (arXiv:2305.18290): learning from rankings without a reward model or sampling.

The policy is its own reward model: response y to prompt x has the implicit reward beta ln(pi(y|x) / pi_ref(y|x)), where
pi is the policy and pi_ref the frozen reference model. A ranking of K responses contributes all its pairs, as in
`reward`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.reward import correct_pairs, margins, pair_mask, pair_mean
from rlhf_jax.devices import parallel
from rlhf_jax.settings import LabelNoise, Positive, Settings
from rlhf_jax.types import InputError, LogprobsFn, Metrics, Params, Rankings, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    beta: Positive = 0.1  # strength of the implied KL constraint: implicit reward per nat of log-ratio to the reference
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # loss of a pair: logistic (DPO), or squared (IPO, arXiv:2310.12036)
    label_smoothing: LabelNoise = 0.0  # assumed probability that a pair's label is wrong; only with loss=sigmoid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "ipo" and self.label_smoothing:
            raise InputError("label_smoothing has no effect with loss=ipo: leave it out")


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


def sequence_logprobs(logp: Float[Array, "*rows T"], mask: Bool[Array, "*rows T"]) -> Float[Array, "*rows"]:
    """The log-probability of each whole sequence: the sum over its valid tokens, not their mean."""
    return jnp.sum(jnp.where(mask, logp, 0.0), axis=-1)


def response_logprobs(
    params: Params, batch: Rankings, logprobs_fn: LogprobsFn, keys: Array | None = None
) -> Float[Array, "B K"]:
    """The log-probability of each whole response given its prompt, in nats; `keys` [B K] turn dropout on."""
    rows, responses, length = batch.tokens.shape
    tokens, mask = batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)
    logp = logprobs_fn(params, tokens, mask, keys)[0].reshape(rows, responses, -1)
    in_response = batch.mask[:, :, 1:] & (jnp.arange(1, length)[None, None] >= batch.start[:, None, None])
    return sequence_logprobs(logp, in_response)


def train_step(
    state: TrainState,
    batch: Rankings,
    reference: Params,
    *,
    logprobs_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of rankings, whose prompts are spread over `axis`.

    The loss is the mean over each prompt's pairs, then over prompts. The reference is evaluated without dropout. The
    metrics describe the parameters before the update.
    """
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), batch.rank.size, axis)
    count = parallel.psum(jnp.sum(jnp.any(pair_mask(batch.rank), axis=(1, 2))), axis)

    def objective(params: Params, batch: Rankings, keys: Array) -> tuple[Array, Metrics]:
        gain = response_logprobs(params, batch, logprobs_fn, keys.reshape(-1)) - response_logprobs(
            reference, batch, logprobs_fn
        )
        pair = pair_mask(batch.rank)
        h = margins(gain, pair)
        terms = ipo_terms(h, cfg.beta) if cfg.loss == "ipo" else sigmoid_terms(h, cfg.beta, cfg.label_smoothing)
        correct, pairs = correct_pairs(gain, batch.rank)
        value = pair_mean(terms, pair, count)
        return value, {"loss/dpo": value, "correct": correct, "pairs": pairs, "margin": pair_mean(h, pair, count)}

    share = functools.partial(jax.grad(objective, has_aux=True), state.params)
    grads, sums = parallel.accumulate(share, microbatches)(batch, keys.reshape(batch.rank.shape))
    grads, metrics = parallel.psum((grads, jax.tree.map(jnp.sum, sums)), axis)
    metrics = {
        "loss/dpo": metrics["loss/dpo"],
        "reward/accuracy": metrics["correct"] / jnp.maximum(metrics["pairs"], 1),
        "reward/margin": cfg.beta * metrics["margin"],
        "grad_norm": optax.tree.norm(grads),
    }
    return optim.apply_gradients(state, grads, tx), metrics
