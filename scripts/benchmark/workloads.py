"""The workloads: training, sampling, evaluation and PPO iterations, on random weights and tokens."""

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models
from rlhf_jax.algorithms import best_of_n, optim, ppo, reward, sft
from rlhf_jax.data import tokenizer
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import likelihood
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Settings, Whole
from rlhf_jax.types import Metrics, Params, Prompts, Rankings, Tokens, TrainState
from scripts.benchmark import questions, text
from scripts.benchmark.limits import Limits, clock

FIRST = 5  # smaller token ids are special
LAYOUT = parallel.PMAP


# Sizes ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Llama(Settings):
    """The model, where no preset is named."""

    vocab: Count = 4096
    hidden: Count = 256
    intermediate: Count = 688
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 4
    head_dim: Count = 64
    tied_embeddings: bool = True
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5


@dataclasses.dataclass(frozen=True)
class Sft(Settings):
    """One step a repetition, on rows without padding."""

    batch: Count = 16
    target_tokens: Count = 128  # of each row, which has one more
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class Packing(Settings):
    """The same on documents of geometric lengths, packed."""

    batch: Count = 16
    length: Count = 128
    mean: Positive = 40.0  # tokens of a document
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class Decode(Settings):
    """One batch of responses without EOS a repetition."""

    batch: Count = 32
    prompt: Count = 32
    new: Count = 64
    warmup: Count = 2
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Rank(Settings):
    """Several responses to each of some long prompts a repetition, each prompt read once or, in turn, each time."""

    prompts: Count = 8
    responses: Count = 9
    prompt: Count = 256
    new: Count = 32
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class DecodeRagged(Settings):
    """Responses that end early; one pass over all prompts a repetition, at the better of the batch sizes."""

    prompts: Count = 128
    prompt: Count = 32
    max_new: Count = 64
    eos_fraction: Fraction = 0.03  # of the vocabulary
    batches: tuple[Count, ...] = (32, 128)
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Reward(Settings):
    """One step of the reward model on comparisons of two responses a repetition."""

    pairs: Count = 16
    length: Count = 96
    warmup_steps: Count = 3
    timed_steps: Count = 12


@dataclasses.dataclass(frozen=True)
class RewardK(Settings):
    """One step on rankings of K responses, each scored once for all its pairs."""

    prompts: Count = 16
    responses: Count = 9
    length: Count = 96
    warmup_steps: Count = 2
    timed_steps: Count = 6


@dataclasses.dataclass(frozen=True)
class RewardRagged(Settings):
    """One step on comparisons of responses of geometric lengths, beside as many parts of whole rows."""

    pairs: Count = 64
    prompt: Count = 32
    max_new: Count = 64
    mean: Positive = 33.0  # tokens of a response that is not cut
    buckets: Count = 8
    warmup_steps: Count = 2
    timed_steps: Count = 6


@dataclasses.dataclass(frozen=True)
class Ppo(Settings):
    """One iteration a repetition: sample, score by three models, update policy and critic."""

    episodes: Count = 64
    prompt: Count = 32
    new: Count = 32
    eos_fraction: Fraction = 0.0  # of the vocabulary
    epochs: Count = 4
    minibatches: Count = 1
    buckets: Count = 1
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    kl_coef: NonNegative = 0.05
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    temperature: Positive = 1.0
    warmup: Count = 2
    timed: Count = 5


@dataclasses.dataclass(frozen=True)
class Choice(Settings):
    """The log-probabilities of the options of all questions a repetition; a request is an option."""

    questions: Count = 32
    examples: Whole = 5  # in front of each question, its own ones
    question: Count = 48  # tokens of a question and of an example, on average
    options: Count = 4  # of a question
    option: Count = 6  # tokens of an option, on average
    batch: Count = 16  # rows at a time
    warmup: Count = 1
    timed: Count = 3


@dataclasses.dataclass(frozen=True)
class Text(Settings):
    """Text on disk to the first batch, once; the limit is the tokenizer's own rate, with all its threads."""

    megabytes: Positive = 100.0
    small: Positive = 10.0  # megabytes, with whose peak of memory that of the others is compared
    tokenizer: str | None = None  # a directory; None trains one of the model's vocabulary
    length: Count = 1024
    batch: Count = 8


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The model, and the sizes of each workload."""

    device: Literal["cpu", "gpu", "tpu"] | None = None  # None is the best there is
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk
    preset: str | None = None  # a model of models.PRESETS instead of the Llama below
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    learning_rate: Positive = 1e-4
    model: Llama = Llama()
    sft: Sft = Sft()
    decode: Decode = Decode()
    decode_ragged: DecodeRagged = DecodeRagged()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    reward_k9: RewardK = RewardK()
    reward_ragged: RewardRagged = RewardRagged()
    ppo_ragged: Ppo = Ppo(new=64, eos_fraction=0.03, buckets=8)
    packing: Packing = Packing()
    choice: Choice = Choice()  # multiple choice with five examples in the prompt
    rank_prefix: Rank = Rank()
    # Options that share a long prompt.
    choice_prefix: Choice = Choice(questions=24, examples=0, question=512, options=8, option=8)
    text_10gb: Text = Text()  # for ten gigabytes, as in its name, set `megabytes`


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function that is repeated and timed."""

    unit: str
    warmup: int
    timed: int
    repeat: Callable[[int], tuple[float, float]]  # repetition i: how much it did, and its seconds
    least_seconds: Callable[[Limits, float], float]  # for that much
    extra: Callable[[], dict[str, float]] = dict  # further results, found after the timing


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


def architecture(cfg: Config) -> models.Config:
    """The configuration of the model."""
    compute = models.Compute(dtype=cfg.dtype, remat=cfg.remat)
    if cfg.preset is not None:
        return dataclasses.replace(models.preset(cfg.preset), compute=compute)
    m = cfg.model
    return models.llama(
        m.layers,
        m.hidden,
        m.heads,
        m.kv_heads,
        m.intermediate,
        vocab_size=m.vocab,
        head_dim=m.head_dim,
        tie_embeddings=m.tied_embeddings,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        max_length=4096,
        compute=compute,
    )


def peak_mib() -> float:
    """The most memory that was in use: of the first device, or of this process where that is the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# Random inputs --------------------------------------------------------------------------------------------------------


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


# Training -------------------------------------------------------------------------------------------------------------


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


def sampler(
    config: models.Config, new: int, ends: tuple[int, ...], group: int = 1
) -> Callable[[Prompts, int], sampling.Sample]:
    """A function that samples a response to each prompt of a batch, with the noise of a seed."""
    module, sampled = models.Transformer(config), sampling.Config(max_new_tokens=new, eos_id=ends, group=group)

    def step(params: Params, prompts: Prompts, seed: jax.Array, axis: str | None) -> sampling.Sample:
        keys = parallel.row_keys(jax.random.key(seed), prompts.tokens.shape[0], axis)
        return sampling.generate(module, params, prompts.tokens, prompts.mask, keys, sampled)

    params, run = LAYOUT.state(random_params(module, 0)), LAYOUT.step(step)
    return lambda prompts, seed: run(params, LAYOUT.rows(prompts), LAYOUT.state(np.uint32(seed)))


def decode_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.decode
    prompts, sample = random_prompts(config, w.batch, w.prompt), sampler(config, w.new, ())
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=lambda i: clock(w.batch * w.new, lambda: LAYOUT.gather(sample(prompts, i))),
        least_seconds=lambda limits, count: limits.decoding(w.batch, w.prompt, w.batch * w.new),
    )


def rank_prefix_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.rank_prefix
    rows = w.prompts * w.responses
    prompts = best_of_n.repeat(random_prompts(config, w.prompts, w.prompt), w.responses)
    once, each_time = sampler(config, w.new, (), w.responses), sampler(config, w.new, ())
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(rows * w.new, lambda: LAYOUT.gather(once(prompts, i)))
        times.append((taken[1], clock(rows * w.new, lambda: LAYOUT.gather(each_time(prompts, i)))[1]))
        return taken

    def extra() -> dict[str, float]:
        ours, plain = (statistics.median(column) for column in zip(*times[w.warmup :], strict=True))
        return {"times_plain": plain / ours}

    def least_seconds(limits: Limits, count: float) -> float:
        prefill = limits.forward(w.prompts, w.prompt, 1)
        return prefill + limits.decoding(rows, w.prompt, rows * w.new) - limits.forward(rows, w.prompt, 1)

    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        least_seconds=least_seconds,
        extra=extra,
    )


def decode_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    """Responses that end early, at the better of the batch sizes, which is found in the warm-up."""
    w = cfg.decode_ragged
    sample = sampler(config, w.max_new, end_ids(config, w.eos_fraction))
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


# Data -----------------------------------------------------------------------------------------------------------------


def text_10gb_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.text_10gb
    tok = tokenizer.load(w.tokenizer) if w.tokenizer else text.trained(config.vocab_size)
    taken: list[text.Taken] = []
    peaks: list[float] = []

    def repeat(i: int) -> tuple[float, float]:
        taken.append(text.to_first_batch(w.megabytes if i else w.small, tok, w.length, w.batch))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return taken[-1].tokens, taken[-1].seconds

    alone = functools.cache(lambda: text.alone(w.megabytes, tok))

    def extra() -> dict[str, float]:
        ours = taken[-1].processor / taken[-1].tokens
        return {
            "above_small_mib": peaks[-1] - peaks[0],
            "of_limit_processor": alone().processor / alone().tokens / ours,
            "seconds": taken[-1].seconds,
        }

    return Workload(
        unit="tokens_per_s",
        warmup=1,
        timed=1,
        repeat=repeat,
        least_seconds=lambda limits, count: count * alone().seconds / alone().tokens,
        extra=extra,
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
    "reward": reward_workload,
    "ppo": ppo_workload,
    "reward_k9": reward_k9_workload,
    "reward_ragged": reward_ragged_workload,
    "ppo_ragged": ppo_ragged_workload,
    "packing": packing_workload,
    "rank_prefix": rank_prefix_workload,
    "choice": choice_workload,
    "choice_prefix": choice_prefix_workload,
    "text_10gb": text_10gb_workload,
}
