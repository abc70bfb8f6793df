"""From scores to advantages: token rewards, GAE, whitening, and group baselines, which need no critic."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.logprobs import last_index, masked_mean, precise


def extend_to_first_pad(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The mask with the column after each row's last valid token added, if the row has such a column."""
    columns = jnp.arange(mask.shape[1])[None]
    after = last_index(mask)[:, None] + 1
    return mask | ((columns == after) & (after > 0))


def token_rewards(
    score: Float[Array, "B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    kl_coef: float | Array,
    score_mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The reward of each token, r_t = -kl_coef kl_t + [t is last] score (arXiv:1909.08593, section 2).

    kl_t is the token's KL estimate to the reference, and the last token is that of `score_mask` (default: `mask`).
    Zero elsewhere. A row without a valid token gets no reward, so its score is lost.
    """
    score_mask = mask if score_mask is None else score_mask
    is_last = jnp.arange(mask.shape[1])[None] == last_index(score_mask)[:, None]
    penalty = jnp.where(mask, -kl_coef * precise(kl), 0.0)
    return penalty + jnp.where(is_last, precise(score)[:, None], 0.0)


def gae(
    reward: Float[Array, "B T"],
    value: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float,
    lam: float | Float[Array, "B"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The advantages and value targets of generalised advantage estimation (arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        target_t = A_t + V_t

    r is the token's reward, V the critic's value before it (0 past the end of the row), gamma the discount and lam
    the weight of longer returns, which may differ between rows. The valid tokens of a row must be contiguous; both
    results are zero at padding.
    """
    reward = precise(jnp.where(mask, reward, 0.0))
    value = precise(jnp.where(mask, value, 0.0))
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    delta = reward + gamma * next_value - value

    def previous(advantage: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, mask_t = column
        advantage = jnp.where(mask_t, delta_t + gamma * lam * advantage, 0.0)
        return advantage, advantage

    _, advantage = jax.lax.scan(previous, jnp.zeros_like(delta[:, 0]), (delta.T, mask.T), reverse=True)
    return advantage.T, advantage.T + value


def length_adaptive(mask: Bool[Array, "B T"], alpha: float) -> Float[Array, "B"]:
    """VAPO's lambda of each row, 1 - 1 / (alpha n), for n valid tokens (arXiv:2504.05118); 0 where that is negative."""
    return jnp.maximum(1 - 1 / (alpha * jnp.maximum(jnp.sum(mask, axis=1), 1)), 0.0)


def whiten(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], shift_mean: bool = True, ddof: int = 0
) -> Float[Array, "B T"]:
    """`x` scaled to unit variance over all valid entries, and shifted to zero mean unless `shift_mean` is False.

        (x - mean) / sqrt(variance + 1e-8), plus mean if not `shift_mean`

    The variance divides by the number of valid entries less `ddof`: 0 is biased, 1 is Bessel's correction. Zero outside
    the mask. Call it on the global batch: whitening a share would make the result depend on the number of devices.
    Entries that are all equal become exactly 0 (or the mean), so that no rounding error of the mean is amplified.
    """
    x = precise(x)
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask, jnp.sum(mask) - ddof)
    equal = jnp.max(jnp.where(mask, x, -jnp.inf)) == jnp.min(jnp.where(mask, x, jnp.inf))
    whitened = jnp.where(equal, 0.0, (x - mean) * jax.lax.rsqrt(variance + 1e-8))
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def subtract_mean(reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Each reward minus the mean of its group; exactly 0 where all rewards of a group are equal.

    The mean of equal numbers may have a rounding error, which Adam would scale up to a full step. The mean of the
    differences to the first reward has none.
    """
    difference = precise(reward) - precise(reward[:, :1])
    return difference - jnp.mean(difference, axis=1, keepdims=True)


def group_normalize(reward: Float[Array, "B G"], ddof: int = 0) -> Float[Array, "B G"]:
    """GRPO's advantage (r_i - mean(r)) / (std(r) + 1e-4) of each response (arXiv:2402.03300, section 4.1.2).

    r are the rewards of one prompt's G responses; the standard deviation divides by G - ddof.
    """
    centred = subtract_mean(reward)
    return centred / (jnp.std(centred, axis=1, keepdims=True, ddof=ddof) + 1e-4)


def leave_one_out(reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """RLOO's advantage: each reward minus the mean of the other rewards of its group (arXiv:2402.14740).

    Raises ValueError for groups of one.
    """
    size = reward.shape[1]
    if size < 2:
        raise ValueError(f"leave_one_out needs at least two responses a prompt, but reward has shape {reward.shape}")
    return subtract_mean(reward) * (size / (size - 1))
