"""Workloads in which several answers share a long prompt."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import best_of_n, grpo, optim, updates
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.types import Metrics, TrainState
from scripts.benchmark.limits import Limits, clock
from scripts.benchmark.parts import (
    LAYOUT,
    Workload,
    end_ids,
    random_params,
    random_prompts,
    random_rankings,
    reward_trainer,
    sampler,
)
from scripts.benchmark.sizes import Config, Decode, Rank


def beside_plain(
    w: Rank | Decode,
    unit: str,
    amount: float,
    once: Callable[[int], Any],
    each_time: Callable[[int], Any],
    least: Callable[[Limits], float],
) -> Workload:
    """A workload that computes something once and, in turn with it, our own plain way that does so each time."""
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(amount, lambda: once(i))
        times.append((taken[1], clock(amount, lambda: each_time(i))[1]))
        return taken

    def extra() -> dict[str, float]:
        ours, plain = (statistics.median(column) for column in zip(*times[w.warmup :], strict=True))
        return {"times_plain": plain / ours}

    return Workload(
        unit=unit,
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=lambda limits, count: least(limits),
        extra=extra,
    )


def forward(limits: Limits, w: Rank, read: int, logits: bool = True) -> float:
    """The least seconds of one forward pass over the prompts, once, and over the answers to them."""
    rows = w.prompts * w.responses
    answers = limits.forward(rows, w.prompt + w.new, read, logits) - limits.forward(rows, w.prompt, 0, logits=False)
    return limits.forward(w.prompts, w.prompt, 0, logits=False) + answers


def decoding(limits: Limits, w: Rank) -> float:
    """The least seconds of sampling, where each prompt is read once for its answers."""
    rows = w.prompts * w.responses
    return limits.decoding(rows, w.prompt, rows * w.new, w.prompts)


def with_shared_prompts(config: models.Config, share: bool) -> models.Config:
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, share_prompts=share))


def rank_prefix_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.rank_prefix
    rows = w.prompts * w.responses
    prompts = best_of_n.repeat(random_prompts(config, w.prompts, w.prompt), w.responses)
    once = sampler(config, sampling.Config(w.new, group=w.responses))
    each_time = sampler(config, sampling.Config(w.new))
    return beside_plain(
        w,
        "tokens_per_s",
        rows * w.new,
        lambda i: LAYOUT.gather(once(prompts, i)),
        lambda i: LAYOUT.gather(each_time(prompts, i)),
        lambda limits: decoding(limits, w),
    )


def reward_prefix_workload(config: models.Config, cfg: Config) -> Workload:
    """Steps of the K-way ranking loss."""
    w = cfg.reward_prefix
    batch = random_rankings(config, w.prompts, w.responses, w.prompt + w.new)
    batch.tokens[:, :, : w.prompt] = batch.tokens[:, :1, : w.prompt]
    batch = batch.replace(start=np.full(w.prompts, w.prompt, np.int32), prefix=w.prompt)
    once, each_time = (reward_trainer(with_shared_prompts(config, share), cfg) for share in (True, False))
    return beside_plain(
        w,
        "sequences_per_s",
        w.prompts * w.responses,
        lambda i: once(batch),
        lambda i: each_time(batch),
        lambda limits: 3 * forward(limits, w, 1, logits=False),
    )


class Iterations:
    """GRPO iterations against a random reward model, as `experiments.grpo` runs them; holds the state."""

    def __init__(self, config: models.Config, cfg: Config, w: Rank, share: bool) -> None:
        config = with_shared_prompts(config, share)
        policy, scalar = models.Transformer(config), heads.ScalarModel(config)
        algorithm, tx, ends = grpo.Config(group=w.responses), optim.adamw(cfg.learning_rate), end_ids(config, 0.0)
        trained = {"policy": random_params(policy, 0)}
        self.state: TrainState = LAYOUT.state(updates.init(trained, tx, algorithm, jax.random.key(1)))
        self.reference = LAYOUT.state(random_params(policy, 0))
        self.key = LAYOUT.state(jax.random.key(2))
        group = w.responses if share else 1
        sampled = sampling.Config(max_new_tokens=w.new, eos_id=ends, group=group)
        self.collect = rollout.collector(config, LAYOUT, sampled)
        judge = models.Model(config, random_params(scalar, 2), None, scalar.apply)
        self.score = scores.reward_models([judge], ends[0], layout=LAYOUT, group=group)
        policy_fn = models.part("policy", models.logprobs_fn(config))
        step = functools.partial(grpo.train_step, policy_fn=policy_fn, tx=tx, cfg=algorithm)
        self.train = LAYOUT.step(step, donate=(0,))
        self.prompts = best_of_n.repeat(random_prompts(config, w.prompts, w.prompt), w.responses)
        self.episodes = w.prompts * w.responses

    def __call__(self, i: int) -> Metrics:
        first = LAYOUT.state(np.uint32(i * self.episodes))
        params = self.state.params | {"reference": self.reference}
        sampled = self.collect(params, LAYOUT.rows(self.prompts), self.key, first)
        self.state, metrics = self.train(self.state, self.score(sampled))
        return LAYOUT.get(metrics)


def grpo_prefix_workload(config: models.Config, cfg: Config) -> Workload:
    """Whole iterations: sample, score by reference and reward model, update once."""
    w = cfg.grpo_prefix

    def least(limits: Limits) -> float:
        return decoding(limits, w) + 4 * forward(limits, w, w.new) + forward(limits, w, 1, logits=False)

    return beside_plain(
        w,
        "episodes_per_s",
        w.prompts * w.responses,
        Iterations(config, cfg, w, share=True),
        Iterations(config, cfg, w, share=False),
        least,
    )
