"""From scores to advantages: token rewards, GAE, whitening, and the group baselines that do without a critic."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.logprobs import last_index, masked_mean, precise


def through_first_pad(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """`mask` and the column after each row's last valid token, where there is one."""
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
    """`-kl_coef * kl` on each valid token, plus the score at the last one (arXiv:1909.08593, section 2).

    The score lands on the last column of `score_mask`, by default that of `mask`. Zero elsewhere. A row without a
    valid token gets no reward at all, so its score is lost.
    """
    score_mask = mask if score_mask is None else score_mask
    is_last = jnp.arange(mask.shape[1])[None] == last_index(score_mask)[:, None]
    penalty = jnp.where(mask, -kl_coef * precise(kl), 0.0)
    return penalty + jnp.where(is_last, precise(score)[:, None], 0.0)


def gae(
    reward: Float[Array, "B T"], value: Float[Array, "B T"], mask: Bool[Array, "B T"], gamma: float, lam: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (arXiv:1506.02438) over each row's contiguous span of valid tokens.

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 past the end; A_t = delta_t + gamma lam A_{t+1}; target = A + V.
    Both are zero at padding, whatever `reward` and `value` hold there.
    """
    reward = precise(jnp.where(mask, reward, 0.0))
    value = precise(jnp.where(mask, value, 0.0))
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    delta = reward + gamma * next_value - value

    def backwards(advantage: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, mask_t = column
        advantage = jnp.where(mask_t, delta_t + gamma * lam * advantage, 0.0)
        return advantage, advantage

    _, advantage = jax.lax.scan(backwards, jnp.zeros_like(delta[:, 0]), (delta.T, mask.T), reverse=True)
    return advantage.T, advantage.T + value


def whiten(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], shift_mean: bool = True, ddof: int = 0
) -> Float[Array, "B T"]:
    """Unit variance over all valid entries together (eps 1e-8), and zero mean unless `shift_mean` is False.

    The variance is biased, or with `ddof=1` Bessel's. Zero outside the mask. Call it on the global batch: whitening a
    share of it would make the result depend on how many devices or micro-batches there are. Entries that are all equal
    become exactly 0, or stay what they are: no rounding error of their mean is blown up.
    """
    x = precise(x)
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask, jnp.sum(mask) - ddof)
    equal = jnp.max(jnp.where(mask, x, -jnp.inf)) == jnp.min(jnp.where(mask, x, jnp.inf))
    whitened = jnp.where(equal, 0.0, (x - mean) * jax.lax.rsqrt(variance + 1e-8))
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def above_mean(reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Each reward minus the mean of its group: exactly 0 where a group's rewards are equal, whatever their size.

    The mean of equal numbers may be off by a rounding error, of which Adam would make a full step; the mean of their
    differences to the first one is not.
    """
    difference = precise(reward) - precise(reward[:, :1])
    return difference - jnp.mean(difference, axis=1, keepdims=True)


def group_normalize(reward: Float[Array, "B G"], ddof: int = 0) -> Float[Array, "B G"]:
    """GRPO's advantage (arXiv:2402.03300): (r - mean) / (std + 1e-4) within each prompt's group of responses."""
    centred = above_mean(reward)
    return centred / (jnp.std(centred, axis=1, keepdims=True, ddof=ddof) + 1e-4)


def leave_one_out(reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """RLOO's advantage (arXiv:2402.14740): each reward minus the mean of the other rewards of its group."""
    size = reward.shape[1]
    if size < 2:
        raise ValueError("leave_one_out needs at least two responses a prompt")
    return above_mean(reward) * (size / (size - 1))
