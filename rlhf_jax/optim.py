"""The optimisers of the recipe, from optax."""

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.types import Params, TrainState


def cosine(peak: float, total: int, warmup: int = 0, final_fraction: float = 0.1) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to `final_fraction * peak` at step `total`, constant from there on.

    `total` includes the warm-up. InstructGPT (arXiv:2203.02155, appendix C) decays to 10 % of the peak.
    """
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, max(total, 1), alpha=final_fraction)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total, warmup + 1), final_fraction * peak)


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; weight decay falls on matrices, not on norms, biases and position tables."""

    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: any(k in jax.tree_util.keystr(path) for k in ("kernel", "embedding")), params
        )

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )


def apply_gradients(state: TrainState, grads: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state after one optimiser step; `grads` must already be those of the global batch."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def init(params: Params, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), rng=rng)
