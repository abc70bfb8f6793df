"""From prompts to a rollout: sample responses, and record what policy, reference and critic say of them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms.advantages import extend_to_first_pad
from rlhf_jax.data import pipeline
from rlhf_jax.data import rows as rows_lib
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import hosts, parallel, progress, ragged
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError, Params, Prompts, Rollout, ValueFn

Rows = TypeVar("Rows", Prompts, Rollout)


def collect(
    params: dict[str, Params],
    prompts: Prompts,
    key: jax.Array,
    first: jax.Array,
    *,
    policy: sampling.HasConfig,
    cfg: sampling.Config,
    critic_fn: ValueFn | None = None,
    buckets: int = 1,
    axis: str | None = None,
) -> Rollout:
    """Sample one response to each prompt, still without a score.

    Row b of the global batch samples with `fold_in(key, first + b)`, or with `fold_in(key, first[b])` where `first` [B]
    has a number for each row. `params` holds "policy" and, where the rollout is to have their word, "reference" and,
    with `critic_fn`, "critic": both read the responses in so many `buckets`, see `ragged`. The reference reads the
    prompt of a `cfg.group` once, where that pays. The behaviour log-probabilities are the sampler's own. Without
    `cfg.stop_at_eos` every response has all its columns and each counts, as in Ziegler et al. 2019.
    """
    prompt_tokens, prompt_mask = sampling.left_pad(prompts.tokens, prompts.mask)
    if first.ndim:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first)
    else:
        keys = parallel.row_keys(key, prompts.tokens.shape[0], axis, first)
    sample = sampling.generate(policy, params["policy"], prompt_tokens, prompt_mask, keys, cfg)
    tokens = jnp.concatenate([prompt_tokens, sample.tokens], axis=1)
    mask = jnp.concatenate([prompt_mask, sample.mask], axis=1)
    logprobs_fn, start = models.logprobs_fn(policy.config), prompt_tokens.shape[1] - 1

    def read(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        logp_ref = value = None
        if "reference" in params:
            logp_ref, _ = logprobs_fn(
                params["reference"],
                tokens,
                mask,
                start=start,
                temperature=cfg.temperature,
                group=cfg.group,
            )
        if critic_fn is not None:
            value = critic_fn(params, tokens, mask, start)
        return logp_ref, value

    logp_ref = value = None
    if "reference" in params or critic_fn is not None:
        # A critic is asked for the value of the first column after a response too: PPO may put the score there.
        live = extend_to_first_pad(sample.mask)
        logp_ref, value = ragged.in_buckets(read, live, buckets, tokens, mask, group=cfg.group)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=sample.mask,
        logp=sample.logp,
        logp_ref=None if logp_ref is None else jnp.where(sample.mask, logp_ref, 0.0),
        value=value,
        ended=jnp.any(jnp.isin(sample.tokens, jnp.array(cfg.ends, jnp.int32)) & sample.mask, axis=1),
        index=prompts.index,
    )


def collector(
    config: models.Config,
    layout: parallel.Layout,
    cfg: sampling.Config,
    critic_fn: ValueFn | None = None,
    buckets: int = 1,
) -> Callable[..., Rollout]:
    """`collect` by a model of this architecture, compiled and placed: it takes (params, prompts, key, first)."""
    policy = models.Transformer(config)
    return layout.step(
        functools.partial(
            collect,
            policy=policy,
            cfg=cfg,
            critic_fn=critic_fn,
            buckets=buckets,
        )
    )


def chunks(rows: Rows, batch: int) -> Iterator[tuple[np.uint32, Rows]]:
    """`rows` in batches of `batch`, each with the number of its first one; the last batch wraps round.

    Of each batch a process gets its own rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    for first in range(0, count, batch):
        index = np.arange(first, first + batch) % count
        index = hosts.share(index)
        yield np.uint32(first), jax.tree.map(functools.partial(np.take, indices=index, axis=0), rows)


WIDTHS, STEP, BATCHES = 4, 32, 8  # of prompts: at most, columns between two, and batches that each takes to be worth it


def by_width(sizes: np.ndarray, columns: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """The numbers of the rows of each batch [batch], the largest sizes first, and the width that is enough for it.

    Each width is a program to compile, so there are few: equal steps, of at least `STEP`, up to that of the largest
    size, which is at most `columns`, and no more than so many batches make up for. The last batch is filled up with its
    last row.
    """
    columns, batches = min(columns, STEP * -(-int(sizes.max()) // STEP)), -(-len(sizes) // batch)
    widths = np.array(ragged.widths(columns, max(1, min(WIDTHS, columns // STEP, batches // BATCHES))))
    order = np.argsort(-sizes, kind="stable")
    for first in range(0, len(sizes), batch):
        numbers = order[np.minimum(np.arange(first, first + batch), len(sizes) - 1)]
        yield numbers, int(widths[np.searchsorted(widths, sizes[numbers[0]])])


def whole_groups(batch: int, group: int) -> int:
    """The most rows up to `batch` of which every device has whole groups; `batch` where that is too few for any."""
    each = group * jax.device_count()
    return batch // each * each or batch


class Sampler:
    """`collect` for any number of prompts, by programs that are compiled once; see `episodes`."""

    def __init__(self, config: models.Config, layout: parallel.Layout, cfg: sampling.Config, batch: int):
        self._layout, self._batch = layout, whole_groups(batch, cfg.group)
        self._collect = collector(config, layout, cfg)

    def __call__(
        self,
        params: dict[str, Params],
        prompts: Prompts,
        key: jax.Array,
        score: Callable[[Rollout], Rollout] | None = None,
    ) -> Rollout:
        """The episodes of these parameters, which are placed; the key is not."""
        layout, keys = self._layout, self._layout.state(key)
        count, columns = prompts.tokens.shape
        noise = np.arange(count) if prompts.noise is None else prompts.noise
        real_last = np.argsort(prompts.mask, axis=1, kind="stable")
        tokens, mask = (np.take_along_axis(np.asarray(x), real_last, axis=1) for x in (prompts.tokens, prompts.mask))
        parts, order = [], []
        for numbers, width in progress.of(list(by_width(mask.sum(axis=1), columns, self._batch)), "sampling"):
            front = columns - width  # columns of padding in every row
            part = Prompts(tokens=tokens[numbers, front:], mask=mask[numbers, front:], index=prompts.index[numbers])
            rows = layout.rows(hosts.share(part)), keys, layout.rows(hosts.share(noise[numbers].astype(np.uint32)))
            sampled = self._collect(params, *rows)
            sampled = layout.gather(score(sampled) if score else sampled)
            whole = np.concatenate([tokens[numbers, :front], sampled.tokens], axis=1)
            on = np.concatenate([mask[numbers, :front], sampled.mask], axis=1)
            parts.append(sampled.replace(tokens=whole, mask=on))
            order.append(numbers)
        place = np.argsort(np.concatenate(order)[:count])
        return jax.tree.map(lambda *xs: np.concatenate(xs)[place], *parts)


_sampler = functools.lru_cache(maxsize=16)(Sampler)


def episodes(
    model: models.Model,
    prompts: Prompts,
    key: jax.Array,
    cfg: sampling.Config,
    *,
    batch: int,
    reference: models.Model | None = None,
    score: Callable[[Rollout], Rollout] | None = None,
    layout: parallel.Layout = parallel.PMAP,
) -> Rollout:
    """`collect` for any number of prompts, at most `batch` at a time over all devices; the result lies on the host.

    Prompts of like length share a batch, see `by_width`; where it has room for that, a batch has whole groups. The
    result has the rows of `prompts`, in their order, and as wide. `score` is a source of `scores`, if there is to be
    one. What row b samples depends on `key`, `prompts.noise[b]` (b by default) and its prompt, not on `batch`. The
    programs of the last few settings are kept, so that the next model does not compile them anew.
    """
    params = {"policy": model.params} | ({} if reference is None else {"reference": reference.params})
    return _sampler(model.config, layout, cfg, batch)(layout.state(params), prompts, key, score)


def say(
    model: models.Model,
    prompts: Sequence[tokenizer_lib.Prompt],
    key: jax.Array,
    *,
    length: int,
    layout: parallel.Layout = parallel.PMAP,
) -> list[dict[str, str]]:
    """A response to each prompt that takes up at most half of `length` tokens, as rows of a table of samples."""
    tokenizer = models.tokenizer_of(model)
    half = min(length, model.config.max_length) // 2
    try:
        batch, _ = pipeline.every_prompt([{"prompt": prompt} for prompt in prompts], tokenizer, length=half)
    except InputError:  # they are all too long: there is nothing to show
        return []
    rows = jax.device_count() * -(-len(batch.index) // jax.device_count())
    cfg = sampling.Config(max_new_tokens=half, eos_id=models.stop_ids(model))
    sampled = episodes(model, batch, key, cfg, batch=rows, layout=layout)
    responses = zip(sampled.index, texts(tokenizer, sampled.response_tokens, sampled.response_mask), strict=True)
    return [{"prompt": tokenizer_lib.prompt_text(prompts[index]), "response": text} for index, text in responses]


def texts(tokenizer: tokenizer_lib.Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response [B, N], without special tokens and the white space around it."""
    special = set(tokenizer.all_special_ids)
    kept = [[i for i in row[on].tolist() if i not in special] for row, on in zip(tokens, mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(kept)]


def table(rows: rows_lib.Rows, tokenizer: tokenizer_lib.Tokenizer, episodes: Rollout, count: int) -> list[dict]:
    """Prompt and response of the first `count` episodes, with their score, KL and cost, if there are any.

    `rows` are what their index counts.
    """
    episodes = jax.tree.map(lambda x: x[:count], episodes)
    responses = texts(tokenizer, episodes.response_tokens, episodes.response_mask)
    numbers = {"score": episodes.score, "cost": episodes.cost}
    if episodes.logp_ref is not None:
        numbers["kl"] = np.sum(np.where(episodes.response_mask, episodes.logp - episodes.logp_ref, 0.0), axis=1)
    return [
        {"prompt": tokenizer_lib.prompt_text(rows[int(episodes.index[b])]["prompt"]), "response": response}
        | {name: float(values[b]) for name, values in numbers.items() if values is not None}
        for b, response in enumerate(responses)
    ]
