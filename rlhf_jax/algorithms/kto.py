"""Kahneman-Tversky optimisation (arXiv:2402.01306): learning from thumbs, without pairs.

Each response is labelled good or bad on its own. Its implicit reward is that of `dpo`, and is compared with a reference
point, the KL of policy and reference model over the batch: a good response should be above it, a bad one below.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.algorithms.preferences import sequence_logprobs
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import masked_mean
from rlhf_jax.settings import NonNegative, Positive, Settings
from rlhf_jax.types import InputError, LogprobsFn, Metrics, Params, Thumbs, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    beta: Positive = 0.1  # implicit reward per nat of log-ratio to the reference
    # Weights of good and of bad responses; the paper advises good * (number of good) = 1..4/3 * bad * (number of bad).
    good: NonNegative = 1.0
    bad: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.good and not self.bad:
            raise InputError("good=0 and bad=0 leave nothing to learn: give one of them a weight")


def terms(gain: Float[Array, "B"], good: Bool[Array, "B"], point: Float[Array, ""], cfg: Config) -> Float[Array, "B"]:
    """The loss of each response (eq. 8), w (1 - sigmoid(s beta (gain - point))), with s = 1 if it is good, else -1.

    The gain is ln(pi(y|x) / pi_ref(y|x)) of the whole response, in nats, and w is `cfg.good` or `cfg.bad`.
    """
    value = jax.nn.sigmoid(cfg.beta * jnp.where(good, gain - point, point - gain))
    return jnp.where(good, cfg.good, cfg.bad) * (1 - value)


def reference_point(mean: Float[Array, ""]) -> Float[Array, ""]:
    """The reference point of a mean gain of responses to other prompts: 0 if that is negative. It has no gradient."""
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def present(batch: Thumbs) -> Bool[Array, "B"]:
    """Whether a row holds a response, and does not fill up a batch."""
    return jnp.any(batch.mask[:, 0], axis=1)


def gains(
    params: Params, reference: Params, batch: Thumbs, which: int, logprobs_fn: LogprobsFn, keys: Array | None = None
) -> Float[Array, "B"]:
    """The log-ratio of policy and reference of each row's own response (`which` is 0) or the other one (1), in nats."""
    tokens, mask = batch.tokens[:, which], batch.mask[:, which]
    in_response = mask[:, 1:] & (jnp.arange(1, tokens.shape[1])[None] >= batch.start[:, None])
    policy = logprobs_fn(params, tokens, mask, keys)[0]
    return sequence_logprobs(policy - logprobs_fn(reference, tokens, mask)[0], in_response)


def train_step(
    state: TrainState,
    batch: Thumbs,
    reference: Params,
    *,
    logprobs_fn: LogprobsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of labelled responses, whose rows are spread over `axis`.

    The loss is the mean over rows. The metrics describe the parameters before the update.
    """
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), batch.good.size, axis)
    count = parallel.psum(jnp.sum(present(batch)), axis)

    def mismatched(batch: Thumbs) -> tuple[Array, None]:
        return masked_mean(gains(state.params, reference, batch, 1, logprobs_fn), present(batch), count), None

    mean, _ = parallel.accumulate(mismatched, microbatches)(batch)
    point = reference_point(parallel.psum(mean, axis))

    def objective(params: Params, batch: Thumbs, keys: Array) -> tuple[Array, Metrics]:
        gain = gains(params, reference, batch, 0, logprobs_fn, keys)
        here = present(batch)
        value = masked_mean(terms(gain, batch.good, point, cfg), here, count)
        reward = {"good": here & batch.good, "bad": here & ~batch.good}
        sums = {name: jnp.sum(jnp.where(mask, cfg.beta * gain, 0.0)) for name, mask in reward.items()}
        return value, {"loss": value, **sums} | {f"{name} count": jnp.sum(mask) for name, mask in reward.items()}

    params = attach(state.params, balance, microbatches, axis)
    share = functools.partial(jax.grad(objective, has_aux=True), params)
    grads, sums = parallel.accumulate(share, microbatches)(batch, keys)
    grads, sums = parallel.psum((grads, jax.tree.map(jnp.sum, sums)), axis)
    grads, load = detach(grads)
    metrics = load | {
        "loss/kto": sums["loss"],
        "kl/reference": point,
        "reward/good": sums["good"] / jnp.maximum(sums["good count"], 1),
        "reward/bad": sums["bad"] / jnp.maximum(sums["bad count"], 1),
        "grad_norm": optax.tree.norm(grads),
    }
    return optim.apply_gradients(state, grads, tx), metrics
