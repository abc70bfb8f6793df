"""From prompts to a rollout: sample responses, and record what policy, reference and critic say of them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms.advantages import through_first_pad
from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import hosts, parallel, ragged
from rlhf_jax.models import Model, tokenizer_of
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError, Params, Prompts, Rollout

Rows = TypeVar("Rows", Prompts, Rollout)


def response_logprobs(
    apply_fn: Callable, params: Params, tokens: jax.Array, mask: jax.Array, new_tokens: int, temperature: float
) -> jax.Array:
    """Log-probabilities [B, N] of the last `new_tokens` columns, at the sampling temperature."""
    start = tokens.shape[1] - new_tokens - 1
    return apply_fn(params, tokens, mask, method="logprobs", start=start, temperature=temperature)[0]


def collect(
    params: dict[str, Params],
    reference: Params,
    prompts: Prompts,
    key: jax.Array,
    first: jax.Array,
    *,
    policy: sampling.HasConfig,
    policy_fn: Callable,
    critic_fn: Callable | None = None,
    max_new_tokens: int,
    temperature: float,
    eos_id: int | tuple[int, ...],
    stop_at_eos: bool = True,
    buckets: int = 1,
    axis: str | None = None,
) -> Rollout:
    """One response to each prompt, still without a score. `params` holds "policy" and, with `critic_fn`, "critic".

    Row b of the global batch samples with `fold_in(key, first + b)`. Without `stop_at_eos` every response has all its
    columns and each counts, as in Ziegler et al. 2019.

    `policy_fn` is a bound `Transformer`; `critic_fn` takes all of `params`, see `heads.critic`. Both read the responses
    in so many `buckets`, see `ragged`. The behaviour log-probabilities are the sampler's own.
    """
    rows = prompts.tokens.shape[0]
    prompt_tokens, prompt_mask = sampling.left_pad(prompts.tokens, prompts.mask)
    keys = parallel.row_keys(key, rows, axis, first)
    stop = eos_id if stop_at_eos else None
    sample = sampling.generate(
        policy, params["policy"], prompt_tokens, prompt_mask, keys, max_new_tokens, temperature, eos_id=stop
    )
    tokens = jnp.concatenate([prompt_tokens, sample.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, sample.mask], axis=1)

    def others(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        new = tokens.shape[1] - prompt_tokens.shape[1]
        logp_ref = response_logprobs(policy_fn, reference, tokens, mask, new, temperature)
        return logp_ref, critic_fn(params, tokens, mask, prompt_tokens.shape[1] - 1) if critic_fn else None

    # A critic is asked for the value of the first column after a response too: PPO may put the score there.
    logp_ref, value = ragged.read(others, through_first_pad(sample.mask), buckets, tokens, mask)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=sample.mask,
        logp=sample.logp,
        logp_ref=jnp.where(sample.mask, logp_ref, 0.0),
        value=value,
        ended=jnp.any(jnp.isin(sample.tokens, jnp.atleast_1d(jnp.array(eos_id))) & sample.mask, axis=1),
        index=prompts.index,
    )


def collecting(config: models.Config, layout: parallel.Layout, **settings: Any) -> Callable:
    """`collect` by a model of this architecture, placed: it takes (params, reference, prompts, key, first)."""
    policy = models.Transformer(config)
    return layout.step(functools.partial(collect, policy=policy, policy_fn=models.bind(policy), **settings))


def chunks(rows: Rows, batch: int) -> Iterator[tuple[np.uint32, Rows]]:
    """`rows` in batches of `batch`, each with the number of its first one; the last batch wraps round.

    Of each batch a process gets its own rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    for first in range(0, count, batch):
        index = np.arange(first, first + batch) % count
        index = hosts.share(index)
        yield np.uint32(first), jax.tree.map(functools.partial(np.take, indices=index, axis=0), rows)


def episodes(
    model: Model,
    reference: Model,
    prompts: Prompts,
    key: jax.Array,
    score: Callable[[Rollout], Rollout] | None = None,
    *,
    batch: int,
    max_new_tokens: int,
    temperature: float,
    layout: parallel.Layout = parallel.PMAP,
) -> Rollout:
    """`collect` for any number of prompts, `batch` at a time over all devices; the result lies on the host.

    `score` is a source of `scores`, if there is to be one. What row b samples depends on `key`, b and its prompt, not
    on `batch`.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    one_batch = collecting(model.config, layout, **settings, eos_id=tokenizer_of(model).eos_token_id)
    params, frozen = layout.state({"policy": model.params}), layout.state(reference.params)
    keys = layout.state(key)
    parts = []
    for first, part in chunks(prompts, batch):
        sampled = one_batch(params, frozen, layout.rows(part), keys, layout.state(first))
        parts.append(layout.gather(score(sampled) if score else sampled))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(prompts.index)], *parts)


def answer(
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    first: jax.Array,
    *,
    policy: sampling.HasConfig,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    axis: str | None = None,
) -> sampling.Sample:
    """One response to each prompt, without a word on it. Row b samples with `fold_in(key, first + b)`."""
    keys = parallel.row_keys(key, prompts.tokens.shape[0], axis, first)
    return sampling.generate(
        policy, params, prompts.tokens, prompts.mask, keys, max_new_tokens, temperature, eos_id=eos_id
    )


def answering(config: models.Config, layout: parallel.Layout, **settings: Any) -> Callable:
    """`answer` by a model of this architecture, placed: it takes (params, prompts, key, first)."""
    return layout.step(functools.partial(answer, policy=models.Transformer(config), **settings))


def respond(
    policy: sampling.HasConfig,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    batch: int,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    layout: parallel.Layout = parallel.PMAP,
) -> sampling.Sample:
    """A response to each of any number of prompts, `batch` at a time over all devices; results lie on the host.

    What row b samples depends on `key`, b and its prompt, not on `batch`.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_id": eos_id}
    generate = answering(policy.config, layout, **settings)
    placed, keys = layout.state(params), layout.state(key)
    parts = [
        layout.gather(generate(placed, layout.rows(part), keys, layout.state(first)))
        for first, part in chunks(prompts, batch)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(prompts.index)], *parts)


def say(
    model: Model,
    prompts: Sequence[tokenizer_lib.Prompt],
    key: jax.Array,
    *,
    length: int,
    layout: parallel.Layout = parallel.PMAP,
) -> list[dict[str, str]]:
    """A response to each prompt that takes up at most half of `length` tokens, as rows of a table of samples."""
    tokenizer = tokenizer_of(model)
    half = min(length, model.config.max_length) // 2
    try:
        batch, _ = pipeline.every_prompt([{"prompt": prompt} for prompt in prompts], tokenizer, length=half)
    except InputError:  # they are all too long: there is nothing to show
        return []
    rows = jax.device_count() * -(-len(batch.index) // jax.device_count())
    sample = respond(
        model,
        model.params,
        batch,
        key,
        batch=rows,
        max_new_tokens=half,
        temperature=1.0,
        eos_id=tokenizer.eos_token_id,
        layout=layout,
    )
    said = zip(batch.index, texts(tokenizer, sample.tokens, sample.mask), strict=True)
    return [{"prompt": tokenizer_lib.prompt_text(prompts[index]), "response": text} for index, text in said]


def texts(tokenizer: tokenizer_lib.Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """What each response [B, N] says, without its EOS and the white space around it."""
    special = set(tokenizer.all_special_ids)
    kept = [[i for i in row[on].tolist() if i not in special] for row, on in zip(tokens, mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(kept)]
