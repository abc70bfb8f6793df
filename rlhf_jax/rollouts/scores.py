"""Where the score of a response comes from: reward models, a function of its text, or a model's word on each token.

A source takes episodes, laid out over devices by its `parallel.Layout`, and returns them with their scores. So
`source(collect(...))` is a whole rollout, and a new kind of reward is a new function of that shape.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.data.builders import Row, Rows
from rlhf_jax.data.tokenizer import Prompt, Tokenizer
from rlhf_jax.devices import parallel, ragged
from rlhf_jax.logprobs import response_mask
from rlhf_jax.models import Model, heads
from rlhf_jax.rollouts import rollout
from rlhf_jax.types import InputError, Params, Rollout, ScoreFn

Source = Callable[[Rollout], Rollout]
ScoreText = Callable[[Prompt, str], float]  # (prompt, response) -> score


def readable(episodes: Rollout, eos_id: int) -> jax.Array:
    """[B, P + N] bool: the prompt, and the response through its first EOS, even where it went on."""
    new_tokens = episodes.response_mask.shape[1]
    read = episodes.response_mask & response_mask(episodes.tokens[:, -new_tokens:], eos_id)
    return jnp.concatenate([episodes.mask[:, :-new_tokens], read], axis=1)


def score_responses(
    params: Params,
    episodes: Rollout,
    *,
    score_fn: ScoreFn,
    eos_id: int,
    pessimism: float = 0.0,
    buckets: int = 1,
    axis: str | None = None,
) -> Rollout:
    """The episodes with the mean score of an ensemble, less `pessimism` times its standard deviation.

    `params` are those of reward models of one architecture, stacked on a leading axis; one alone gives its own score.
    They read the responses in so many `buckets`, see `ragged`.
    """
    read = readable(episodes, eos_id)
    live = read[:, -episodes.response_mask.shape[1] :]

    def score(one: Params) -> jax.Array:
        judge = lambda tokens, read: score_fn(one, tokens, read)
        return ragged.in_buckets(judge, live, buckets, episodes.tokens, read)

    per_model = jax.lax.map(score, params)
    if len(per_model) == 1:
        return episodes.replace(score=per_model[0])
    spread = jnp.std(per_model, axis=0)
    return episodes.replace(score=jnp.mean(per_model, axis=0) - pessimism * spread, disagreement=spread)


def score_tokens(
    params: Params, episodes: Rollout, *, apply_fn: Callable, eos_id: int, axis: str | None = None
) -> Rollout:
    """The episodes with a scalar model's word on each response token as its reward, and no score of the whole."""
    new_tokens = episodes.response_mask.shape[1]
    read = readable(episodes, eos_id)
    per_token = apply_fn(params, episodes.tokens, read, columns=slice(-new_tokens, None))
    token_score = jnp.where(read[:, -new_tokens:], per_token, 0.0)
    return episodes.replace(token_score=token_score, score=jnp.zeros_like(per_token[:, 0]))


def scorer(
    rewards: Sequence[Model],
    score_text: ScoreText | None,
    rows: Rows,
    tokenizer: Tokenizer,
    layout: parallel.Layout,
    pessimism: float = 0.0,
    buckets: int = 1,
) -> Source:
    """`text_function` where there is a function of the text, else `reward_models`.

    Raises InputError where there is nothing to score by.
    """
    if score_text is not None:
        return text_function(score_text, rows, tokenizer, layout)
    if not rewards:
        raise InputError("reward: expected at least one model directory")
    return reward_models(rewards, tokenizer.eos_token_id, pessimism, layout, buckets)


def reward_models(
    models: Sequence[Model],
    eos_id: int,
    pessimism: float = 0.0,
    layout: parallel.Layout = parallel.PMAP,
    buckets: int = 1,
) -> Source:
    """The mean score of one or several reward models, less `pessimism` times their standard deviation.

    Raises InputError unless they have one architecture.
    """
    first, *others = models
    if any(other.config != first.config for other in others):
        raise InputError("the reward models of an ensemble differ in architecture: train them from the same model")
    params = layout.frozen(stacked([model.params for model in models], first.config))
    return functools.partial(scoring(first.config, eos_id, pessimism, layout, buckets), params)


def stacked(params: Sequence[Params], config: models.Config) -> Params:
    """Those of reward models of one architecture, as `score_responses` takes them."""
    return jax.tree.map(lambda *x: jnp.stack(x), *map(config.compute.freeze, params))


def scoring(
    config: models.Config, eos_id: int, pessimism: float, layout: parallel.Layout, buckets: int = 1
) -> Callable:
    """`score_responses` by models of this architecture, placed: it takes (params, episodes)."""
    return layout.step(
        functools.partial(
            score_responses,
            score_fn=heads.score_fn(config),
            eos_id=eos_id,
            pessimism=pessimism,
            buckets=buckets,
        )
    )


def token_model(model: Model, eos_id: int, layout: parallel.Layout = parallel.PMAP) -> Source:
    """A scalar model whose word on each token is that token's reward."""
    apply_fn = models.bind(heads.ScalarModel(model.config))
    step = layout.step(functools.partial(score_tokens, apply_fn=apply_fn, eos_id=eos_id))
    return functools.partial(step, layout.frozen(model.config.compute.freeze(model.params)))


def text_function(
    function: ScoreText,
    rows: Rows | Sequence[Row],
    tokenizer: Tokenizer,
    layout: parallel.Layout = parallel.PMAP,
) -> Source:
    """`function(prompt, response)` on the host, where `rows` are what the episodes' `index` counts.

    The response ends before its first EOS, even where it went on.
    """

    def source(episodes: Rollout) -> Rollout:
        host = layout.fetch({"tokens": episodes.tokens, "mask": episodes.response_mask, "index": episodes.index})
        tokens = host["tokens"][:, -host["mask"].shape[1] :]
        read = host["mask"] & np.asarray(response_mask(jnp.asarray(tokens), tokenizer.eos_token_id))
        said = rollout.texts(tokenizer, tokens, read)
        score = [function(rows[int(index)]["prompt"], text) for index, text in zip(host["index"], said, strict=True)]
        return episodes.replace(score=layout.rows(np.array(score, np.float32)))

    return source
