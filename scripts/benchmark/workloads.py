"""The workloads: training, sampling, evaluation and PPO iterations, on random weights and tokens."""

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import optim, ppo
from rlhf_jax.models import heads
from rlhf_jax.rollouts import likelihood, rollout, sampling, scores
from rlhf_jax.types import Metrics, Tokens, TrainState
from scripts.benchmark import questions
from scripts.benchmark.limits import Limits, clock
from scripts.benchmark.parts import (
    FIRST,
    LAYOUT,
    Workload,
    architecture,
    end_ids,
    random_documents,
    random_ids,
    random_params,
    random_prompts,
    random_rankings,
    reward_trainer,
    sampler,
    sft_trainer,
)
from scripts.benchmark.prefixes import beside_plain, grpo_prefix_workload, rank_prefix_workload, reward_prefix_workload
from scripts.benchmark.sizes import Choice, Config, Ppo
from scripts.benchmark.text import text_10gb_workload

# Measuring ------------------------------------------------------------------------------------------------------------


def measure(cfg: Config, name: str) -> dict[str, Any]:
    """Measure one workload in this process: rates, their share of the limit, and the peak of memory."""
    if cfg.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(cfg.device, cfg.device))
    config = architecture(cfg)
    run = WORKLOADS[name](config, cfg)
    start = time.perf_counter()
    run.repeat(0)
    first = time.perf_counter() - start
    timed = [run.repeat(i) for i in range(1, run.warmup + run.timed)][run.warmup - 1 :]
    peak = peak_mib()
    rates = sorted(amount / seconds for amount, seconds in timed)
    median = statistics.median(rates)
    mean = statistics.mean(amount for amount, _ in timed)
    limit = mean / run.least_seconds(Limits(config), mean)
    return {
        f"median_{run.unit}": median,
        f"best_{run.unit}": rates[-1],
        f"limit_{run.unit}": limit,
        "of_limit": median / limit,
        "peak_mib": peak,
        "first_s": first,
    } | run.extra()


def peak_mib() -> float:
    """The most memory that was in use: of the first device, or of this process where that is the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# Training -------------------------------------------------------------------------------------------------------------


def sft_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.sft
    tokens = random_ids(config, w.batch, w.target_tokens + 1)
    batch = Tokens(tokens=tokens, segment=np.ones_like(tokens), target=np.ones_like(tokens, bool))
    train = sft_trainer(config, cfg)
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(w.batch * w.target_tokens, lambda: train(batch)),
        least_seconds=lambda limits, count: limits.training(w.batch, w.target_tokens, w.target_tokens),
    )


def packing_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.packing
    tokens, segment = random_ids(config, w.batch, w.length), random_documents(w)
    target = np.pad(segment[:, 1:] == segment[:, :-1], ((0, 0), (1, 0)))
    batch = Tokens(tokens=tokens, segment=segment, target=target)
    train = sft_trainer(config, cfg)
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(int(target.sum()), lambda: train(batch)),
        least_seconds=lambda limits, count: limits.training(w.batch, w.length, w.length),
    )


def reward_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.reward
    batch = random_rankings(config, w.pairs, 2, w.length)
    train = reward_trainer(config, cfg)
    return Workload(
        unit="sequences_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(2 * w.pairs, lambda: train(batch)),
        least_seconds=lambda limits, count: limits.training(2 * w.pairs, w.length, 1, logits=False),
    )


def reward_k9_workload(config: models.Config, cfg: Config) -> Workload:
    """Rankings and, in turn with them, as many sequences as pairs of two."""
    w = cfg.reward_k9
    pairs, sequences = w.prompts * w.responses * (w.responses - 1) // 2, w.prompts * w.responses
    batch = random_rankings(config, w.prompts, w.responses, w.length)
    alone = random_rankings(config, sequences // 2, 2, w.length)
    train = reward_trainer(config, cfg)
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(pairs, lambda: train(batch))
        times.append((taken[1], clock(sequences // 2, lambda: train(alone))[1]))
        return taken

    def extra() -> dict[str, float]:
        ranked, one_by_one = (statistics.median(column) for column in zip(*times[w.warmup_steps :], strict=True))
        return {
            "median_sequences_per_s": sequences / ranked,
            "times_pairs_one_by_one": pairs / ranked / ((sequences // 2) / one_by_one),
        }

    return Workload(
        unit="pairs_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=repeat,
        least_seconds=lambda limits, count: limits.training(sequences, w.length, 1, logits=False),
        extra=extra,
    )


def reward_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.reward_ragged
    new = np.minimum(np.random.default_rng(1).geometric(1 / w.mean, (w.pairs, 2)), w.max_new)
    batch = random_rankings(config, w.pairs, 2, w.prompt + w.max_new)
    batch = batch.replace(mask=np.arange(w.prompt + w.max_new) < w.prompt + new[..., None])
    bucketed = reward_trainer(config, cfg, buckets=w.buckets)
    padded = reward_trainer(config, cfg, microbatches=w.buckets)
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(2 * w.pairs, lambda: bucketed(batch))
        times.append((taken[1], clock(2 * w.pairs, lambda: padded(batch))[1]))
        return taken

    def extra() -> dict[str, float]:
        ours, whole = (statistics.median(column) for column in zip(*times[w.warmup_steps :], strict=True))
        return {"times_padded": whole / ours}

    return Workload(
        unit="sequences_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=repeat,
        least_seconds=lambda limits, count: limits.training(2 * w.pairs, w.prompt + new.mean(), 1, logits=False),
        extra=extra,
    )


# Sampling -------------------------------------------------------------------------------------------------------------


def decode_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.decode
    prompts, sample = random_prompts(config, w.batch, w.prompt), sampler(config, sampling.Config(w.new))
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=lambda i: clock(w.batch * w.new, lambda: LAYOUT.gather(sample(prompts, i))),
        least_seconds=lambda limits, count: limits.decoding(w.batch, w.prompt, w.batch * w.new),
    )


def decode_long_workload(config: models.Config, cfg: Config) -> Workload:
    """A cache that grows and, in turn with it, one that has all its columns from the beginning."""
    w = cfg.decode_long
    prompts = random_prompts(config, w.batch, w.prompt)
    sample, plain = (sampler(config, sampling.Config(w.new, parts=parts)) for parts in (4, 1))
    return beside_plain(
        w,
        "tokens_per_s",
        w.batch * w.new,
        lambda i: LAYOUT.gather(sample(prompts, i)),
        lambda i: LAYOUT.gather(plain(prompts, i)),
        lambda limits: limits.decoding(w.batch, w.prompt, w.batch * w.new),
    )


def decode_slots_workload(config: models.Config, cfg: Config) -> Workload:
    """Responses that end early, in slots and, in turn with these, all at once."""
    w = cfg.decode_slots
    prompts, ends = random_prompts(config, w.prompts, w.prompt), end_ids(config, w.eos_fraction)
    slotted, plain = (sampler(config, sampling.Config(w.max_new, eos_id=ends, slots=slots)) for slots in (w.slots, 0))
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        masks: list[np.ndarray] = []
        seconds = [
            clock(1, lambda sample=sample: masks.append(LAYOUT.gather(sample(prompts, i)).mask))[1]
            for sample in (slotted, plain)
        ]
        times.append((seconds[0], seconds[1]))
        return int(masks[0].sum()), seconds[0]

    def extra() -> dict[str, float]:
        ours, at_once = (statistics.median(column) for column in zip(*times[w.warmup :], strict=True))
        return {"times_plain": at_once / ours}

    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=lambda limits, count: limits.decoding(w.prompts, w.prompt, count),
        extra=extra,
    )


def decode_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    """Responses that end early, at the better of the batch sizes, which is found in the warm-up."""
    w = cfg.decode_ragged
    sample = sampler(config, sampling.Config(w.max_new, eos_id=end_ids(config, w.eos_fraction)))
    prompts = random_prompts(config, w.prompts, w.prompt)

    def sample_all(batch: int, i: int) -> tuple[float, float]:
        start, count = time.perf_counter(), 0
        for first, part in rollout.chunks(prompts, batch):
            count += int(LAYOUT.gather(sample(part, 1000 * i + int(first)).mask).sum())
        return count, time.perf_counter() - start

    seconds: dict[int, float] = {}

    def repeat(i: int) -> tuple[float, float]:
        for batch in w.batches if i < w.warmup else ():
            sample_all(batch, i)  # compiles
            seconds[batch] = sample_all(batch, i)[1]
        return sample_all(min(seconds, key=lambda batch: seconds[batch]), 1 + i)

    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=lambda limits, count: limits.decoding(w.prompts, w.prompt, count),
    )


# Evaluation -----------------------------------------------------------------------------------------------------------


def choice_workload(config: models.Config, cfg: Config) -> Workload:
    return options_workload(config, cfg.choice)


def choice_prefix_workload(config: models.Config, cfg: Config) -> Workload:
    return options_workload(config, cfg.choice_prefix)


def options_workload(config: models.Config, w: Choice) -> Workload:
    """Each option's log-probability and, in turn with these, those of options that share nothing with each other."""
    module = models.Transformer(config)
    model = models.Model(config, random_params(module, 0), None, models.bind(module))
    read = likelihood.Reader(model, LAYOUT, w.batch)
    alone = likelihood.Reader(model, LAYOUT, w.batch, share=False)
    sizes = questions.Sizes(w.questions, w.examples, w.question, w.options, w.option)
    asked = [likelihood.Request(*pair) for pair in questions.draw(sizes, FIRST, config.vocab_size)]
    shared = {tuple(request.context) for request in asked}
    columns = sum(map(len, shared)) + sum(len(request.continuation) - 1 for request in asked)
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(len(asked), lambda: read(asked))
        times.append((taken[1], clock(len(asked), lambda: alone(asked))[1]))
        return taken

    def extra() -> dict[str, float]:
        ours, one_by_one = (statistics.median(column) for column in zip(*times[w.warmup :], strict=True))
        return {"times_plain": one_by_one / ours}

    return Workload(
        unit="requests_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=lambda limits, count: limits.forward(
            len(shared),
            columns / len(shared),
            sum(len(request.continuation) for request in asked) / len(shared),
        ),
        extra=extra,
    )


# PPO ------------------------------------------------------------------------------------------------------------------


class Iterations:
    """PPO iterations against a random reward model, as `experiments.ppo` runs them; holds the state."""

    def __init__(self, config: models.Config, cfg: Config, w: Ppo, padded: bool = False) -> None:
        policy, scalar = models.Transformer(config), heads.ScalarModel(config)
        policy_fn, critic_fn = models.part("policy", models.logprobs_fn(config)), heads.critic(config)
        algorithm = ppo.Config(
            epochs=w.epochs,
            minibatches=w.minibatches,
            buckets=w.buckets,
            temperature=w.temperature,
            stop_at_eos=not padded,
            clip=w.clip,
            value_clip=w.value_clip,
            kl_coef=w.kl_coef,
            gamma=w.gamma,
            lam=w.lam,
        )
        ends = end_ids(config, w.eos_fraction)
        sampled = sampling.Config(
            max_new_tokens=w.new,
            temperature=w.temperature,
            eos_id=ends,
            stop_at_eos=algorithm.stop_at_eos,
        )
        tx = ppo.optimizer(optim.adamw(cfg.learning_rate), optim.adamw(cfg.learning_rate))
        trained = {"policy": random_params(policy, 0), "critic": random_params(scalar, 1)}
        self.state: TrainState = LAYOUT.state(ppo.init(trained, tx, algorithm, jax.random.key(1)))
        self.reference = LAYOUT.state(random_params(policy, 0))
        self.key = LAYOUT.state(jax.random.key(2))
        self.collect = rollout.collector(config, LAYOUT, sampled, critic_fn, w.buckets)
        judge = models.Model(config, random_params(scalar, 2), None, scalar.apply)
        self.score = scores.reward_models([judge], ends[0], layout=LAYOUT, buckets=w.buckets)
        step = functools.partial(ppo.train_step, policy_fn=policy_fn, critic_fn=critic_fn, tx=tx, cfg=algorithm)
        self.train = LAYOUT.step(step, donate=(0,))
        self.prompts, self.episodes = random_prompts(config, w.episodes, w.prompt), w.episodes

    def __call__(self, i: int) -> Metrics:
        first = LAYOUT.state(np.uint32(i * self.episodes))
        params = self.state.params | {"reference": self.reference}
        sampled = self.collect(params, LAYOUT.rows(self.prompts), self.key, first)
        self.state, metrics = self.train(self.state, self.score(sampled))
        return LAYOUT.get(metrics)

    def parts(self, i: int) -> list[float]:
        """The seconds of one iteration's rollout, scoring, and updates."""
        first, params = LAYOUT.state(np.uint32(i * self.episodes)), self.state.params | {"reference": self.reference}
        batch, times = LAYOUT.rows(self.prompts), [time.perf_counter()]
        sampled = jax.block_until_ready(self.collect(params, batch, self.key, first))
        times.append(time.perf_counter())
        scored = jax.block_until_ready(self.score(sampled))
        times.append(time.perf_counter())
        self.state, metrics = self.train(self.state, scored)
        jax.block_until_ready(metrics)
        return [after - before for before, after in zip(times, [*times[1:], time.perf_counter()], strict=True)]


def ppo_workload(config: models.Config, cfg: Config) -> Workload:
    return iterations_workload(config, cfg, cfg.ppo)


def ppo_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    """Responses that end early and, in turn with them, our own loop that pads them all."""
    padded = Iterations(config, cfg, dataclasses.replace(cfg.ppo_ragged, buckets=1), padded=True)
    return iterations_workload(config, cfg, cfg.ppo_ragged, padded)


def iterations_workload(config: models.Config, cfg: Config, w: Ppo, padded: Iterations | None = None) -> Workload:
    iterations = Iterations(config, cfg, w)
    tokens: list[float] = []
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        metrics: Metrics = {}
        taken = clock(w.episodes, lambda: metrics.update(iterations(i)) or metrics)
        tokens.append(float(metrics["response/tokens"]) * w.episodes)
        if padded is not None:
            times.append((taken[1], clock(w.episodes, lambda: padded(i))[1]))
        return taken

    def least_seconds(limits: Limits, count: float) -> float:
        new = statistics.mean(tokens[w.warmup :])
        columns = w.prompt + new / w.episodes
        policy = limits.forward(w.episodes, columns, new / w.episodes)
        critic = limits.forward(w.episodes, columns, new / w.episodes, logits=False)
        judge = limits.forward(w.episodes, columns, 1, logits=False)
        updates = w.epochs * (3 * policy + 3 * critic)
        return limits.decoding(w.episodes, w.prompt, new) + policy + critic + judge + updates

    def extra() -> dict[str, float]:
        seconds = zip(*[iterations.parts(1000 + i) for i in range(w.timed)], strict=True)
        collect, score, update = map(statistics.median, seconds)
        found = {"collect_s": collect, "score_s": score, "update_s": update}
        if times:
            ours, whole = (statistics.median(column) for column in zip(*times[w.warmup :], strict=True))
            found["times_padded"] = whole / ours
        return found

    return Workload(
        unit="episodes_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=least_seconds,
        extra=extra,
    )


WORKLOADS: dict[str, Callable[[models.Config, Config], Workload]] = {
    "sft": sft_workload,
    "decode": decode_workload,
    "decode_ragged": decode_ragged_workload,
    "decode_long": decode_long_workload,
    "decode_slots": decode_slots_workload,
    "reward": reward_workload,
    "ppo": ppo_workload,
    "reward_k9": reward_k9_workload,
    "reward_ragged": reward_ragged_workload,
    "ppo_ragged": ppo_ragged_workload,
    "packing": packing_workload,
    "rank_prefix": rank_prefix_workload,
    "reward_prefix": reward_prefix_workload,
    "grpo_prefix": grpo_prefix_workload,
    "choice": choice_workload,
    "choice_prefix": choice_prefix_workload,
    "text_10gb": text_10gb_workload,
}
