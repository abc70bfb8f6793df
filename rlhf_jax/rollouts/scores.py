"""Where the score of a response comes from: reward models, a judge, a function of its text, rewards of tokens.

A source takes episodes, laid out over devices by its `parallel.Layout`, and returns them with their scores. So
`source(collect(...))` is a whole rollout, and a new kind of reward is a new function of that shape.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import rewards as rewards_lib
from rlhf_jax.data import steps as steps_lib
from rlhf_jax.data.rows import Row, Rows, short
from rlhf_jax.data.tokenizer import Prompt, Tokenizer, prompt_text
from rlhf_jax.devices import hosts, parallel, ragged
from rlhf_jax.logprobs import response_mask
from rlhf_jax.models import Model, heads
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout
from rlhf_jax.settings import Settings
from rlhf_jax.types import InputError, Params, Rollout, ScoreFn

Source = Callable[[Rollout], Rollout]
ScoreText = Callable[[Prompt, str], float]  # (prompt, response) -> score
Ends = int | tuple[int, ...]  # ids that end a response, the tokenizer's EOS first (`models.stop_ids`)


def readable(episodes: Rollout, eos_id: Ends) -> jax.Array:
    """[B, P + N] bool: the prompt, and the response through its first EOS, even where it went on."""
    new_tokens = episodes.response_mask.shape[1]
    read = episodes.response_mask & response_mask(episodes.tokens[:, -new_tokens:], eos_id)
    return jnp.concatenate([episodes.mask[:, :-new_tokens], read], axis=1)


def as_trained(episodes: Rollout, eos_id: Ends) -> jax.Array:
    """[B, P + N], the tokens with the tokenizer's EOS in place of any other id that ends a response.

    A reward model has learnt from answers that all end by that one, whichever of several the policy chooses.
    """
    if isinstance(eos_id, int) or len(eos_id) == 1:
        return episodes.tokens
    first, *others = eos_id
    new_tokens = episodes.response_mask.shape[1]
    response = episodes.tokens[:, -new_tokens:]
    ended = episodes.response_mask & jnp.isin(response, jnp.array(others, response.dtype))
    return jnp.concatenate([episodes.tokens[:, :-new_tokens], jnp.where(ended, first, response)], axis=1)


def score_responses(
    params: Params,
    episodes: Rollout,
    *,
    score_fn: ScoreFn,
    eos_id: Ends,
    pessimism: float = 0.0,
    buckets: int = 1,
    group: int = 1,
    axis: str | None = None,
) -> Rollout:
    """The episodes with the mean score of an ensemble, less `pessimism` times its standard deviation.

    `params` are those of reward models of one architecture, stacked on a leading axis; one alone gives its own score.
    They read the responses in so many `buckets`, see `ragged`, and the prompt of each `group` of consecutive episodes
    once, where that pays.
    """
    per_model = jax.lax.map(lambda one: _read(one, episodes, score_fn, eos_id, buckets, group), params)
    if len(per_model) == 1:
        return episodes.replace(score=per_model[0])
    spread = jnp.std(per_model, axis=0)
    return episodes.replace(score=jnp.mean(per_model, axis=0) - pessimism * spread, disagreement=spread)


def _read(params: Params, episodes: Rollout, score_fn: ScoreFn, eos_id: Ends, buckets: int, group: int) -> jax.Array:
    """The score of each response by one model, which reads them in so many `buckets`. [B]."""
    read, tokens = readable(episodes, eos_id), as_trained(episodes, eos_id)
    prompt = tokens.shape[1] - episodes.response_mask.shape[1]
    judge = functools.partial(score_fn, params, start=prompt - 1, group=group)
    return ragged.in_buckets(judge, read[:, prompt:], buckets, tokens, read, group=group)


def score_each(
    params: Sequence[Params],
    episodes: Rollout,
    *,
    score_fns: Sequence[ScoreFn],
    eos_id: Ends,
    buckets: int = 1,
    group: int = 1,
    axis: str | None = None,
) -> Rollout:
    """The episodes with the score of each model by itself, of which `algorithms.rewards` makes one.

    Until then their score is the mean. The models may differ in architecture.
    """
    pairs = zip(params, score_fns, strict=True)
    each = jnp.stack([_read(one, episodes, score_fn, eos_id, buckets, group) for one, score_fn in pairs], axis=1)
    return episodes.replace(scores=each, score=jnp.mean(each, axis=1))


def score_cost(
    params: Params,
    episodes: Rollout,
    *,
    score_fn: ScoreFn,
    eos_id: Ends,
    buckets: int = 1,
    group: int = 1,
    axis: str | None = None,
) -> Rollout:
    """The episodes with the cost that a cost model gives to each response."""
    return episodes.replace(cost=_read(params, episodes, score_fn, eos_id, buckets, group))


def score_tokens(
    params: Params,
    episodes: Rollout,
    *,
    apply_fn: Callable,
    eos_id: Ends,
    value: str = "scalar",
    marks: steps_lib.Marks | None = None,
    axis: str | None = None,
) -> Rollout:
    """The episodes with a scalar model's output at each response token as its reward, and no score of the whole.

    With `marks` each step has one reward: it stands at the token after which the step is over, and is what the model
    says at the step's last token, as it was trained to. `value` is as in `Process`.
    """
    new_tokens = episodes.response_mask.shape[1]
    read = readable(episodes, eos_id)
    given = read[:, -new_tokens:]
    per_token = apply_fn(params, as_trained(episodes, eos_id), read, columns=slice(-new_tokens, None))
    if value != "scalar":
        per_token = jax.nn.log_sigmoid(per_token) if value == "logarithm" else jax.nn.sigmoid(per_token)
    step = None
    if marks is not None:
        step, column = steps_lib.find(episodes.response_tokens, given, marks)
        given = jnp.asarray(step)
        per_token = jnp.take_along_axis(per_token, jnp.maximum(column, 0), axis=1)
    token_score = jnp.where(given, per_token, 0.0)
    return episodes.replace(token_score=token_score, step=step, score=jnp.zeros_like(per_token[:, 0]))


@dataclasses.dataclass(frozen=True)
class Process(Settings):
    """Rewards of single steps or tokens, by a model that maps each token to a number."""

    model: Path | None = None  # model directory of a process reward model, or of a reward model; None: no such rewards
    at: Literal["step", "token"] = "step"  # a reward at the end of each step, which is a line, or at each token
    # What the reward is: the logarithm of the probability that the step is right, whose sum is that of the whole
    # solution (arXiv:2305.20050); the probability (arXiv:2312.08935); or the model's output itself.
    value: Literal["logarithm", "probability", "scalar"] = "logarithm"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("at", "value"):
            if self.model is None and getattr(self, name) != getattr(Process, name):
                raise InputError(f"process.{name} has no effect without a model: name one by process.model")


@dataclasses.dataclass(frozen=True)
class TokenModel:
    """A model that gives rewards to single steps or tokens."""

    cfg: Process
    model: Model


Other = ScoreText | judge_lib.Judge | TokenModel | None  # what scores responses in place of reward models, if anything


def other(
    score_text: ScoreText | None,
    judge: judge_lib.Config,
    process: Process,
    layout: parallel.Layout,
    compute: models.Compute,
    seed: int,
    reward: Sequence[Path],
) -> Other:
    """The source of scores in place of the reward models, None if these are to score.

    Raises InputError for more than one, and where there are no reward models either.
    """
    given = {
        "a function of the text": score_text is not None,
        "judge": judge.given,
        "process": process.model is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} would both score the responses: leave out one of them")
    if not names and not reward:
        raise InputError("reward: expected at least one model directory")
    if process.model is not None:
        return TokenModel(process, models.load_reward(process.model, compute=compute, place=layout.sharding))
    return judge_lib.load(judge, layout, compute, seed) or score_text


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that score responses."""

    named: tuple[tuple[Path, Model], ...]  # the reward models and, if there is a cost model, that one last
    costs: bool  # whether there is a cost model
    weighted: bool  # keep each reward model's score by itself, for `algorithms.rewards`, not their mean alone
    pessimism: float  # number of the reward models' standard deviations to subtract from their mean

    @property
    def every(self) -> tuple[Model, ...]:
        """The models in the order of `named`."""
        return tuple(model for _, model in self.named)

    @property
    def rewards(self) -> tuple[Model, ...]:
        """The reward models."""
        return self.every[:-1] if self.costs else self.every


def load(
    reward: Sequence[Path],
    cost: Path | None,
    layout: parallel.Layout,
    compute: models.Compute,
    combine: rewards_lib.Config,
    pessimism: float = 0.0,
) -> Models:
    """The reward models of these directories and the cost model, if there is one, for `scorer`."""
    paths = (*reward, *([] if cost is None else [cost]))
    named = tuple((path, models.load_reward(path, compute=compute, place=layout.sharding)) for path in paths)
    return Models(named=named, costs=cost is not None, weighted=bool(combine.weights), pessimism=pessimism)


def scorer(
    scorers: Models,
    other: Other,
    rows: Rows,
    policy: Model,
    layout: parallel.Layout,
    buckets: int = 1,
    group: int = 1,
) -> Source:
    """The source of scores for the policy's responses: `other` if there is one, else the reward models.

    Costs are added if there is a cost model. Each `group` of consecutive episodes has the same prompt.
    """
    eos_id = models.stop_ids(policy)
    if isinstance(other, judge_lib.Judge):
        source = judged(other, rows, models.tokenizer_of(policy), layout, eos_id)
    elif isinstance(other, TokenModel):
        marks = steps_lib.marks(models.tokenizer_of(policy), eos_id) if other.cfg.at == "step" else None
        source = token_model(other.model, eos_id, layout, other.cfg.value, marks)
    elif other is not None:
        source = text_function(other, rows, models.tokenizer_of(policy), layout, eos_id)
    elif scorers.weighted:
        source = each_model(scorers.rewards, eos_id, layout, buckets, group)
    else:
        source = reward_models(scorers.rewards, eos_id, scorers.pessimism, layout, buckets, group)
    if not scorers.costs:
        return source
    add_cost = cost_model(scorers.every[-1], eos_id, layout, buckets, group)
    return lambda episodes: add_cost(source(episodes))


def named(scorers: Models, other: Other) -> dict[Path, Model]:
    """The models that read the responses' tokens, by their directories."""
    models_of = dict(scorers.named)
    if isinstance(other, TokenModel) and other.cfg.model:
        models_of[other.cfg.model] = other.model
    return models_of


def readers(scorers: Models, other: Other) -> tuple[models.Config, ...]:
    """The architectures of the models by which `scorer` has responses read on the devices."""
    costs = [model.config for model in scorers.every[-1:] if scorers.costs]
    if other is None:
        return tuple(model.config for model in scorers.every)
    return (other.model.config, *costs) if isinstance(other, TokenModel) else tuple(costs)


def each_model(
    rewards: Sequence[Model], eos_id: Ends, layout: parallel.Layout = parallel.PMAP, buckets: int = 1, group: int = 1
) -> Source:
    """The score of each of several reward models by itself, see `score_each`."""
    score_fns = tuple(heads.score_fn(reward.config) for reward in rewards)
    step = layout.step(functools.partial(score_each, score_fns=score_fns, eos_id=eos_id, buckets=buckets, group=group))
    params = [layout.frozen(reward.config.compute.freeze(reward.params)) for reward in rewards]
    return functools.partial(step, params)


def cost_model(
    cost: Model, eos_id: Ends, layout: parallel.Layout = parallel.PMAP, buckets: int = 1, group: int = 1
) -> Source:
    """The cost of each response, beside what scores it has, see `score_cost`."""
    score_fn = heads.score_fn(cost.config)
    step = layout.step(functools.partial(score_cost, score_fn=score_fn, eos_id=eos_id, buckets=buckets, group=group))
    return functools.partial(step, layout.frozen(cost.config.compute.freeze(cost.params)))


def reward_models(
    rewards: Sequence[Model],
    eos_id: Ends,
    pessimism: float = 0.0,
    layout: parallel.Layout = parallel.PMAP,
    buckets: int = 1,
    group: int = 1,
) -> Source:
    """The mean score of one or several reward models, less `pessimism` times their standard deviation.

    Raises InputError unless they have one architecture.
    """
    first, *others = rewards
    if any(other.config != first.config for other in others):
        raise InputError("the reward models of an ensemble differ in architecture: train them from the same model")
    params = layout.frozen(stacked([reward.params for reward in rewards], first.config))
    return functools.partial(scoring(first.config, eos_id, pessimism, layout, buckets, group), params)


def stacked(params: Sequence[Params], config: models.Config) -> Params:
    """The parameters of reward models of one architecture, as `score_responses` takes them."""
    return jax.tree.map(lambda *x: jnp.stack(x), *map(config.compute.freeze, params))


@functools.lru_cache(maxsize=4)
def scoring(
    config: models.Config,
    eos_id: Ends,
    pessimism: float,
    layout: parallel.Layout,
    buckets: int = 1,
    group: int = 1,
) -> Callable:
    """`score_responses` by models of this architecture, placed: it takes (params, episodes).

    The last few are kept, so that the next model does not compile its own.
    """
    return layout.step(
        functools.partial(
            score_responses,
            score_fn=heads.score_fn(config),
            eos_id=eos_id,
            pessimism=pessimism,
            buckets=buckets,
            group=group,
        )
    )


def token_model(
    model: Model,
    eos_id: Ends,
    layout: parallel.Layout = parallel.PMAP,
    value: str = "scalar",
    marks: steps_lib.Marks | None = None,
) -> Source:
    """A source whose reward of each token, or with `marks` of each step, is a scalar model's, see `score_tokens`."""
    apply_fn = models.bind(heads.ScalarModel(model.config))
    step = layout.step(functools.partial(score_tokens, apply_fn=apply_fn, eos_id=eos_id, value=value, marks=marks))
    return functools.partial(step, layout.frozen(model.config.compute.freeze(model.params)))


def text_function(
    function: ScoreText,
    rows: Rows | Sequence[Row],
    tokenizer: Tokenizer,
    layout: parallel.Layout = parallel.PMAP,
    eos_id: Ends | None = None,
) -> Source:
    """A source that scores by `function(prompt, response)`, on the host; `rows[index]` has the prompt of an episode.

    The response ends before its first EOS, by default the tokenizer's, even where it went on. Raises InputError, which
    names the function and the response, for a score that is no finite number.
    """

    def source(episodes: Rollout) -> Rollout:
        pairs = _texts(episodes, rows, tokenizer, eos_id, layout.fetch)
        score = [score_text(function, *pair) for pair in zip(*pairs, strict=True)]
        return episodes.replace(score=layout.rows(np.array(score, np.float32)))

    return source


def judged(
    judge: judge_lib.Judge,
    rows: Rows | Sequence[Row],
    tokenizer: Tokenizer,
    layout: parallel.Layout = parallel.PMAP,
    eos_id: Ends | None = None,
) -> Source:
    """A source that asks a judge, with `unjudged` where it gave no score; `rows[index]` has the prompt of an episode.

    The response ends before its first EOS, as for `text_function`.
    """

    def source(episodes: Rollout) -> Rollout:
        score, absent = judge.scores(*_texts(episodes, rows, tokenizer, eos_id, layout.gather))
        found = hosts.share({"score": score, "unjudged": absent})
        return episodes.replace(score=layout.rows(found["score"]), unjudged=layout.rows(found["unjudged"]))

    return source


def _texts(
    episodes: Rollout,
    rows: Rows | Sequence[Row],
    tokenizer: Tokenizer,
    eos_id: Ends | None,
    take: Callable,
) -> tuple[list[Prompt], list[str]]:
    """Prompt and response of each episode, which `take` brings to the host."""
    ends = tokenizer.eos_token_id if eos_id is None else eos_id
    host = take({"tokens": episodes.tokens, "mask": episodes.response_mask, "index": episodes.index})
    tokens = host["tokens"][:, -host["mask"].shape[1] :]
    read = host["mask"] & np.asarray(response_mask(jnp.asarray(tokens), ends))
    return [rows[int(index)]["prompt"] for index in host["index"]], rollout.texts(tokenizer, tokens, read)


def score_text(function: Callable[[Prompt, str], float], prompt: Prompt, response: str) -> float:
    """`function(prompt, response)`, which must be one number that float32 can hold.

    Raises InputError for anything else, None, NaN, True or an array. An exception of the function's own passes through,
    with a note that says of which response it comes.
    """
    where = f"the response {short(response)} to the prompt {short(prompt_text(prompt))}"
    try:
        value = function(prompt, response)
    except InputError as error:
        raise InputError(f"{_name(function)}: {error}, for {where}") from error
    except Exception as error:
        error.add_note(f"{_name(function)} was to score {where}")
        raise
    number = _number(value)
    if number is None:
        found = " ".join(short(value).split())
        raise InputError(
            f"{_name(function)} returned {found} for {where}: expected one finite number in float32's range"
        )
    return number


def _number(value: Any) -> float | None:
    """The value as a float, if it is a real number or an array of one, and float32 can hold it; else None."""
    try:
        if isinstance(value, bool | str | bytes):
            return None
        if not isinstance(value, numbers.Real | Decimal):
            array = np.asarray(value)
            if array.shape or not (
                jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
            ):
                return None
            value = array
        number = float(value)
    except Exception:  # whatever a type of the user's raises where it is no number
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else None


def _name(function: Callable) -> str:
    """The name under which a message speaks of a function."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)
