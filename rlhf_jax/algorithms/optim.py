"""The optimisers and learning-rate schedules of the recipe, built from optax."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.settings import Positive, Rate, Settings
from rlhf_jax.types import Params, TrainState

Schedule = Literal["cosine", "linear", "constant"]


def cosine(peak: float, total: int, warmup: int = 0, final_fraction: float = 0.1) -> optax.Schedule:
    """A learning rate with linear warm-up from 0, then cosine decay to `final_fraction * peak` at step `total`.

    It is constant after that; `total` includes the warm-up. InstructGPT (arXiv:2203.02155, appendix C) decays to 10 %.
    """
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, max(total, 1), alpha=final_fraction)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total, warmup + 1), final_fraction * peak)


def schedule(kind: Schedule, peak: float, total: int, warmup: int = 0) -> optax.Schedule:
    """A learning rate with linear warm-up from 0 to `peak`, then cosine, linear or no decay.

    Cosine decay goes to 10 % of the peak, linear decay to 0, both at step `total`, which
    includes the warm-up. Raises ValueError for an unknown kind.
    """
    match kind:
        case "cosine":
            return cosine(peak, total, warmup)
        case "linear":
            rising, falling = (0.0, peak, warmup), (peak, 0.0, max(total - warmup, 1))
            return optax.join_schedules([optax.linear_schedule(*rising), optax.linear_schedule(*falling)], [warmup])
        case "constant":
            return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), lambda step: peak], [warmup])
        case _:
            raise ValueError(f"unknown schedule {kind!r}: expected 'cosine', 'linear' or 'constant'")


@dataclasses.dataclass(frozen=True)
class Adam(Settings):
    """Settings of Adam (arXiv:1412.6980) and of gradient clipping."""

    b1: Rate = 0.9  # decay rate of the running mean of the gradient
    b2: Rate = 0.95  # decay rate of the running mean of the squared gradient
    eps: Positive = 1e-8  # added to the root of the mean square, against division by 0
    tensorflow: bool = False  # add eps before the bias correction, as TensorFlow and OpenAI's code of 2019 do
    clip_norm: Positive | None = 1.0  # scale gradients down to this global norm; None does not clip


def adamw(
    learning_rate: float | optax.Schedule, adam: Adam = Adam(), *, weight_decay: float = 0.0, skip_bad: bool = False
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping. Weight decay applies to matrices, not to norms, biases and position tables.

    `skip_bad` skips every update whose gradient is not finite: parameters and optimiser state stay as they are.
    `log.Limits.skip_bad` decides how many in a row end the run.
    """

    scale = scale_by_tensorflow_adam if adam.tensorflow else optax.scale_by_adam
    tx = optax.chain(
        optax.identity() if adam.clip_norm is None else optax.clip_by_global_norm(adam.clip_norm),
        scale(adam.b1, adam.b2, adam.eps),
        optax.add_decayed_weights(weight_decay, _decays),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.apply_if_finite(tx, max_consecutive_errors=2**31 - 1) if skip_bad else tx


def adafactor(
    learning_rate: float | optax.Schedule, *, weight_decay: float = 0.0, skip_bad: bool = False
) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) without momentum: second moments of matrices as one row and one column.

    Updates are clipped to a root mean square of 1 a matrix, and are not scaled by the size of its parameters. Weight
    decay and `skip_bad` are as in `adamw`.
    """
    tx = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=64),  # heads of 64 too
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay, _decays),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.apply_if_finite(tx, max_consecutive_errors=2**31 - 1) if skip_bad else tx


def _decays(params: Params) -> Params:
    """Whether weight decay applies to each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: any(k in jax.tree_util.keystr(path) for k in ("kernel", "embedding")), params
    )


def scale_by_tensorflow_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as TensorFlow computes it: sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) at step t.

    m and v are the running means of the gradient and of its square. optax adds eps to the bias-corrected root instead,
    so its eps corresponds to eps sqrt(1 - b2^t) here: early steps are smaller here.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        _, state = plain.update(updates, state, params)
        step = state.count.astype(jnp.float32)
        rate = jnp.sqrt(1 - b2**step) / (1 - b1**step)
        return jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)


def apply_gradients(state: TrainState, grads: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state after one optimiser step; `grads` must already be summed over the global batch."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def init(params: Params, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """The state before the first training step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), rng=rng)
