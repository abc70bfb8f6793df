"""The parts of the workloads: the model, random inputs, trainers and samplers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models
from rlhf_jax.algorithms import optim, reward, sft
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import Metrics, Params, Prompts, Rankings, Tokens
from scripts.benchmark.limits import Limits
from scripts.benchmark.sizes import Config, Packing

FIRST = 5  # smaller token ids are special
LAYOUT = parallel.PMAP


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function that is repeated and timed."""

    unit: str
    warmup: int
    timed: int
    repeat: Callable[[int], tuple[float, float]]  # repetition i: how much it did, and its seconds
    least_seconds: Callable[[Limits, float], float]  # for that much
    extra: Callable[[], dict[str, float]] = dict  # further results, found after the timing


def architecture(cfg: Config) -> models.Config:
    """The configuration of the model."""
    compute = models.Compute(dtype=cfg.dtype, remat=cfg.remat)
    if cfg.preset is not None:
        return dataclasses.replace(models.preset(cfg.preset), compute=compute)
    m = cfg.model
    return dataclasses.replace(
        models.llama(m.layers, m.hidden, m.heads, m.kv_heads, m.intermediate, m.vocab, max_length=4096),
        head_dim=m.head_dim,
        tie_embeddings=m.tied_embeddings,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        compute=compute,
    )


def random_ids(config: models.Config, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(FIRST, config.vocab_size, shape, dtype=np.int32)


def random_documents(w: Packing) -> np.ndarray:
    """The number of the document that each token belongs to, [batch, length]; the last of a row is cut."""
    starts = np.random.default_rng(1).random((w.batch, w.length)) < 1 / w.mean
    starts[:, 0] = True
    return np.cumsum(starts, axis=1, dtype=np.int32)


def random_rankings(config: models.Config, prompts: int, responses: int, length: int) -> Rankings:
    tokens = random_ids(config, prompts, responses, length)
    rank = np.broadcast_to(np.arange(responses, dtype=np.int32), (prompts, responses))
    return Rankings(tokens=tokens, mask=np.ones_like(tokens, bool), start=np.zeros(prompts, np.int32), rank=rank)


def random_prompts(config: models.Config, rows: int, length: int) -> Prompts:
    tokens = random_ids(config, rows, length)
    return Prompts(tokens=tokens, mask=np.ones_like(tokens, bool), index=np.arange(rows, dtype=np.int32))


def end_ids(config: models.Config, fraction: float) -> tuple[int, ...]:
    """The last `fraction` of the vocabulary; without any, a token that there is not."""
    count = round(fraction * config.vocab_size)
    return tuple(range(config.vocab_size - count, config.vocab_size)) or (config.vocab_size,)


def random_params(module: Any, seed: int) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(module.init)(jax.random.key(seed), tokens, tokens)["params"]


class Trainer:
    """Steps of one kind on batches of one shape; holds the state."""

    def __init__(self, step: Callable, params: Params, tx: optax.GradientTransformation) -> None:
        self.state = LAYOUT.state(optim.init(params, tx, jax.random.key(1)))
        self.step = LAYOUT.step(step, donate=(0,))

    def __call__(self, batch: Tokens | Rankings) -> Metrics:
        self.state, metrics = self.step(self.state, LAYOUT.rows(batch))
        return metrics


def sft_trainer(config: models.Config, cfg: Config) -> Trainer:
    tx = optim.adamw(cfg.learning_rate)
    step = functools.partial(sft.train_step, logprobs_fn=models.logprobs_fn(config), tx=tx)
    return Trainer(step, random_params(models.Transformer(config), 0), tx)


def reward_trainer(config: models.Config, cfg: Config, buckets: int = 1, microbatches: int = 1) -> Trainer:
    tx = optim.adamw(cfg.learning_rate)
    step = functools.partial(
        reward.train_step,
        score_fn=heads.score_fn(config),
        tx=tx,
        cfg=reward.Config(buckets=buckets),
        microbatches=microbatches,
    )
    return Trainer(step, random_params(heads.ScalarModel(config), 0), tx)


def sampler(config: models.Config, sampled: sampling.Config) -> Callable[[Prompts, int], sampling.Sample]:
    """A function that samples a response to each prompt of a batch, with the noise of a seed."""
    module = models.Transformer(config)

    def step(params: Params, prompts: Prompts, seed: jax.Array, axis: str | None) -> sampling.Sample:
        keys = parallel.row_keys(jax.random.key(seed), prompts.tokens.shape[0], axis)
        return sampling.generate(module, params, prompts.tokens, prompts.mask, keys, sampled)

    params, run = LAYOUT.state(random_params(module, 0)), LAYOUT.step(step)
    return lambda prompts, seed: run(params, LAYOUT.rows(prompts), LAYOUT.state(np.uint32(seed)))
