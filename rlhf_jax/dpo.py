"""Direct preference optimisation (arXiv:2305.18290): the preference loss without a reward model or sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def loss(
    logp_chosen: Float[Array, "B"],
    logp_rejected: Float[Array, "B"],
    ref_chosen: Float[Array, "B"],
    ref_rejected: Float[Array, "B"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """`-(1 - ls) ln sigmoid(m) - ls ln sigmoid(-m)`, mean over pairs, from sequence log-probabilities.

    m = beta ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)). `label_smoothing` is the probability that
    a label is flipped (arXiv:2305.18290, eq. 7; conservative DPO).
    """
    margin = beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected))
    per_pair = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    return jnp.mean(per_pair)
