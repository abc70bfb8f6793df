"""Process reward model: it says of each step of a solution whether it is right ("Let's Verify Step by Step").

The model is read at the last token of each step. Its output is a scalar, the log-odds that the step is right
(arXiv:2305.20050).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import masked_mean, precise
from rlhf_jax.settings import Settings
from rlhf_jax.types import Metrics, Params, Steps, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the loss."""

    # What a step that is neither right nor wrong counts as; left_out: it is not learnt.
    neutral: Literal["right", "wrong", "left_out"] = "right"


def targets(
    label: Int[Array, "B T"], step: Bool[Array, "B T"], neutral: str
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Whether the step that ends at a token counts as right, and the mask of the steps that are learnt."""
    learnt = step & (label != 0) if neutral == "left_out" else step
    return (label >= 0 if neutral == "right" else label > 0) & learnt, learnt


def loss(
    output: Float[Array, "B T"], right: Bool[Array, "B T"], learnt: Bool[Array, "B T"], count: Array | None = None
) -> Float[Array, ""]:
    """The cross-entropy of the steps' labels, mean over all steps that are learnt (or divided by `count`).

        -ln sigmoid(s) for a step that is right, -ln sigmoid(-s) for another

    s is the model's output at the step's last token (arXiv:2305.20050, section 2.6). The paper predicts one of three
    tokens, for right, neutral and wrong; what neutral ones count as is `Config.neutral` here.
    """
    output = precise(jnp.where(learnt, output, 0.0))
    return masked_mean(-jax.nn.log_sigmoid(jnp.where(right, output, -output)), learnt, count)


def counts(output: Float[Array, "B T"], right: Bool[Array, "B T"], learnt: Bool[Array, "B T"]) -> dict[str, Array]:
    """The number of steps, of right ones, and of those of each kind that the output's sign tells. [] each."""
    said = output > 0
    return {
        "steps": jnp.sum(learnt),
        "right": jnp.sum(right),
        "right_found": jnp.sum(right & said),
        "wrong_found": jnp.sum(learnt & ~right & ~said),
    }


def shares(count: Mapping[str, Any]) -> Metrics:
    """Metrics of `counts`: the accuracy over steps, the share of right ones, and the accuracy on each kind."""
    wrong = count["steps"] - count["right"]
    return {
        "step/accuracy": (count["right_found"] + count["wrong_found"]) / jnp.maximum(count["steps"], 1),
        "step/right": count["right"] / jnp.maximum(count["steps"], 1),
        "step/accuracy_right": count["right_found"] / jnp.maximum(count["right"], 1),
        "step/accuracy_wrong": count["wrong_found"] / jnp.maximum(wrong, 1),
    }


def train_step(
    state: TrainState,
    batch: Steps,
    *,
    token_fn: Callable,
    tx: optax.GradientTransformation,
    cfg: Config = Config(),
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch of solutions, whose rows are spread over `axis`.

    `token_fn(params, tokens, mask, keys)` is a scalar model's output at each token, [B, T]. `balance` is the weight of
    a load-balancing loss, see `algorithms.balance`. The metrics describe the parameters before the update.
    """
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), batch.tokens.shape[0], axis)
    right, learnt = targets(batch.label, batch.step, cfg.neutral)
    count = parallel.psum(jnp.sum(learnt), axis)

    def objective(params: Params, tokens: Array, mask: Array, right: Array, learnt: Array, keys: Array) -> tuple:
        output = token_fn(params, tokens, mask, keys)
        value = loss(output, right, learnt, count)
        return value, (value, counts(output, right, learnt))

    params = attach(state.params, balance, microbatches, axis)
    share = functools.partial(jax.grad(objective, has_aux=True), params)
    grads, sums = parallel.accumulate(share, microbatches)(batch.tokens, batch.mask, right, learnt, keys)
    grads, (value, count_of) = parallel.psum((grads, jax.tree.map(jnp.sum, sums)), axis)
    grads, load = detach(grads)
    metrics = {"loss/step": value, "grad_norm": optax.tree.norm(grads)} | shares(count_of) | load
    return optim.apply_gradients(state, grads, tx), metrics


def evaluate(
    params: Params, batch: Steps, *, token_fn: Callable, cfg: Config = Config(), axis: str | None = None
) -> dict[str, Array]:
    """The `counts` of a global batch, whose rows are spread over `axis`."""
    right, learnt = targets(batch.label, batch.step, cfg.neutral)
    return parallel.psum(counts(token_fn(params, batch.tokens, batch.mask), right, learnt), axis)
