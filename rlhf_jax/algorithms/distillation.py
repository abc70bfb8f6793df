"""On-policy distillation (GKD, arXiv:2306.13649): a student learns from a teacher's distributions over its own answers.

Each token of a sampled response is learnt by the divergence of the two models' distributions there, so the student is
taught where it goes, not where the teacher would. Sampling itself has no gradient.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import masked_mean, precise
from rlhf_jax.settings import Positive, Range, Settings
from rlhf_jax.types import InputError, LogitsFn, Metrics, Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the algorithm."""

    # forward: KL(teacher || student); reverse: KL(student || teacher); jsd: the generalised Jensen-Shannon divergence.
    divergence: Literal["forward", "reverse", "jsd"] = "reverse"
    beta: Annotated[float, Range(above=0, below=1)] = 0.5  # share of the teacher in the mixture of jsd
    temperature: Positive = 1.0  # sampling temperature, which also divides the logits of both models

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "jsd" and self.beta != Config.beta:
            raise InputError(f"beta has no effect with divergence={self.divergence}: leave it out")


def token_divergence(
    teacher: Float[Array, "B T V"], student: Float[Array, "B T V"], cfg: Config
) -> Float[Array, "B T"]:
    """The divergence of two distributions, given by their logits, at each position, in nats (section 3).

    With P of the teacher, Q of the student and M = beta P + (1 - beta) Q, jsd is beta KL(P || M) plus
    (1 - beta) KL(Q || M). Tokens of probability 0 add nothing.
    """
    p, q = (jax.nn.log_softmax(precise(logits) / cfg.temperature) for logits in (teacher, student))
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    match cfg.divergence:
        case "forward":
            return kl(p, q)
        case "reverse":
            return kl(q, p)
        case "jsd":
            mixture = jnp.logaddexp(p + jnp.log(cfg.beta), q + jnp.log1p(-cfg.beta))
            return cfg.beta * kl(p, mixture) + (1 - cfg.beta) * kl(q, mixture)


def loss(
    student: Float[Array, "B N V"],
    teacher: Float[Array, "B N V"],
    mask: Bool[Array, "B N"],
    cfg: Config,
    count: Array | None = None,
) -> Float[Array, ""]:
    """The mean divergence over valid tokens; `count` replaces their number, see `masked_mean`."""
    return masked_mean(token_divergence(teacher, student, cfg), mask, count)


def train_step(
    state: TrainState,
    rollout: Rollout,
    teacher: Params,
    *,
    student_fn: LogitsFn,
    teacher_fn: LogitsFn,
    tx: optax.GradientTransformation,
    cfg: Config,
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of responses that the student sampled, whose rows are spread over `axis`.

    `balance` is the weight of a load-balancing loss of the student, see `algorithms.balance`.
    """
    start = rollout.tokens.shape[1] - rollout.response_mask.shape[1] - 1
    count = parallel.psum(jnp.sum(rollout.response_mask), axis)

    def objective(params: Params, rollout: Rollout) -> tuple[Array, Array]:
        student = student_fn(params, rollout.tokens, rollout.mask, start=start)
        told = jax.lax.stop_gradient(teacher_fn(teacher, rollout.tokens, rollout.mask, start=start))
        value = loss(student, told, rollout.response_mask, cfg, count)
        return value, value

    params = attach(state.params, balance, microbatches, axis)
    share = functools.partial(jax.grad(objective, has_aux=True), params)
    grads, value = parallel.accumulate(share, microbatches)(rollout)
    grads, value = parallel.psum((grads, jnp.sum(value)), axis)
    grads, load = detach(grads)
    mask = rollout.response_mask
    rows = parallel.psum(mask.shape[0], axis)
    metrics = load | {
        "loss/distillation": value,
        "response/tokens": count / rows,
        "response/ended": parallel.psum(jnp.sum(rollout.ended), axis) / rows,
        "policy/entropy": parallel.psum(jnp.sum(jnp.where(mask, -rollout.logp, 0.0)), axis) / jnp.maximum(count, 1),
        "grad_norm": optax.tree.norm(grads),
    }
    return optim.apply_gradients(state, grads, tx), metrics
