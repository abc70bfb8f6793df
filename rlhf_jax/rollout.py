"""From prompts to a rollout: sample responses, and record what every model says of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax import parallel, sampling
from rlhf_jax.heads import at_last
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.types import Params, Prompts, Rollout


class Frozen(struct.PyTreeNode):
    """The weights that a rollout reads and nobody trains."""

    reference: Params  # of the policy's architecture
    reward: Params  # of a `heads.ScalarModel`


def response_logprobs(
    apply_fn: Callable, params: Params, tokens: jax.Array, mask: jax.Array, new_tokens: int, temperature: float
) -> jax.Array:
    """Log-probabilities [B, N] of the last `new_tokens` columns, by one forward pass, at the sampling temperature."""
    start = tokens.shape[1] - new_tokens
    logits = apply_fn(params, tokens, mask, None, start=start - 1, stop=-1)
    return token_logprobs(logits, tokens[:, start:], temperature)


def collect(
    params: dict[str, Params],
    frozen: Frozen,
    prompts: Prompts,
    key: jax.Array,
    *,
    policy: sampling.HasConfig,
    policy_fn: Callable,
    critic_fn: Callable,
    reward_fn: Callable,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    axis: str | None = None,
) -> Rollout:
    """One response to each prompt. `params` holds "policy" and "critic".

    `policy_fn` maps (params, tokens, mask, keys, start=, stop=) to logits; `critic_fn` and `reward_fn` map
    (params, tokens, mask) to a scalar a token. The behaviour log-probabilities are the sampler's own.
    """
    rows = prompts.tokens.shape[0]
    prompt_tokens, prompt_mask = sampling.left_pad(prompts.tokens, prompts.mask)
    keys = parallel.row_keys(key, rows, axis)
    sample = sampling.generate(
        policy, params["policy"], prompt_tokens, prompt_mask, keys, max_new_tokens, temperature, eos_id=eos_id
    )
    tokens = jnp.concatenate([prompt_tokens, sample.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, sample.mask], axis=1)
    logp_ref = response_logprobs(policy_fn, frozen.reference, tokens, mask, max_new_tokens, temperature)
    value = critic_fn(params["critic"], tokens, mask)[:, -max_new_tokens - 1 : -1]
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=sample.mask,
        logp=sample.logp,
        logp_ref=jnp.where(sample.mask, logp_ref, 0.0),
        value=jnp.where(sample.mask, value, 0.0),
        score=at_last(reward_fn(frozen.reward, tokens, mask), mask),
        ended=jnp.any((sample.tokens == eos_id) & sample.mask, axis=1),
        index=prompts.index,
    )
