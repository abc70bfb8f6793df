"""Tiny models of the reviews: they train in seconds, and are made of the same functions as large ones."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lessons import language
from rlhf_jax import models
from rlhf_jax.algorithms import optim, ppo, reward, sft, updates
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.types import Params, Prompts, Rankings, Rollout, Tokens, named_key

CONFIG = models.llama(2, 64, 4, 4, 128, vocab_size=len(language.WORDS), max_length=language.LENGTH)
LOGPROBS = models.logprobs_fn(CONFIG)  # (params, tokens, mask) -> log-probabilities of the tokens after the first
SCORE = heads.score_fn(CONFIG)  # (params, tokens, mask) -> a score for each row
CRITIC = heads.critic(CONFIG)  # ({"critic": params}, tokens, mask, start) -> a value for each token
SAMPLING = sampling.Config(max_new_tokens=language.ANSWER, eos_id=language.END)

Ranks = Callable[[list[str], random.Random], list[int]]


def fresh(seed: int) -> Params:
    """Random weights of a language model."""
    tokens = np.ones((1, 2), np.int32)
    return jax.jit(models.Transformer(CONFIG).init)(named_key(seed, "lessons/weights"), tokens, tokens)["params"]


@functools.cache
def guest(steps: int = 1000) -> Params:
    """A language model that writes reviews as guests do, half of them kind: the first lesson's, trained in seconds."""
    tx = optim.adamw(optim.cosine(5e-3, steps, warmup=50))
    state = optim.init(fresh(0), tx, named_key(0, "lessons/guest"))
    step = jax.jit(functools.partial(sft.train_step, logprobs_fn=LOGPROBS, tx=tx))
    texts = language.batches(language.reviews(5000, 0), 64, 0)
    for _ in range(steps):
        state, _ = step(state, language.documents(next(texts)))
    return state.params


def critic() -> Params:
    """A critic with the trunk of `guest`, which at first guesses 0 everywhere."""
    return {"trunk": heads.trunk(guest()), **heads.fresh(CONFIG)}


def labelled(count: int, seed: int | str, ranks: Ranks = language.rank) -> Rankings:
    """Four reviews of each of `count` openings, as a person ranks them."""
    rng = random.Random(f"labels/{seed}")
    texts = language.rivals(count, 4, seed)
    return jax.tree.map(jnp.asarray, language.rankings(texts, [ranks(each, rng) for each in texts]))


def epochs(batch: Rankings, size: int, seed: int) -> Iterator[Rankings]:
    """Random batches of rankings, without end."""
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.choice(len(batch.rank), size, replace=size > len(batch.rank))
        yield jax.tree.map(functools.partial(jnp.take, indices=rows, axis=0), batch)


def judge(
    rankings: Rankings,
    seed: int,
    steps: int,
    score_fn: Callable[..., jax.Array] = SCORE,
    start: Params | None = None,
    lr: float = 1e-3,
) -> Params:
    """A reward model of these rankings; its scores of guests' reviews have mean 0 and standard deviation 1.

    It begins at `start`, by default as `untaught`, and trains as in the fourth lesson.
    """
    tx, step = _teaching(score_fn, lr, steps)
    state = optim.init(untaught(seed) if start is None else start, tx, named_key(seed, "lessons/judge"))
    batches = epochs(rankings, 32, seed)
    for _ in range(steps):
        state, _ = step(state, next(batches))
    tokens, mask = map(jnp.asarray, language.encode(language.reviews(256, "scale")))
    found = score_fn(state.params, tokens, mask)
    return reward.normalize(state.params, float(found.mean()), float(found.std()))


@functools.cache
def _teaching(
    score_fn: Callable[..., jax.Array], lr: float, steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser of a reward model and its train step, compiled once for all that begin alike."""
    tx = optim.adamw(optim.cosine(lr, steps))
    return tx, jax.jit(functools.partial(reward.train_step, score_fn=score_fn, tx=tx))


def untaught(seed: int) -> Params:
    """A reward model before its first ranking: `guest`, and a head of random weights."""
    return heads.from_policy(guest(), CONFIG, named_key(seed, "lessons/head"))


@jax.jit
def score(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The scores that a reward model gives to texts."""
    return SCORE(params, tokens, mask)


def sampling_at(temperature: float) -> sampling.Config:
    """How answers are sampled, at another temperature than 1."""
    return dataclasses.replace(SAMPLING, temperature=temperature)


@functools.partial(jax.jit, static_argnames="cfg")
def answer(params: dict[str, Params], openings: Prompts, key: jax.Array, cfg: sampling.Config = SAMPLING) -> Rollout:
    """One answer to each opening by params["policy"], with what "reference" and "critic" in `params` say of it."""
    critic = CRITIC if "critic" in params else None
    transformer = models.Transformer(CONFIG)
    return rollout.collect(params, openings, key, jnp.uint32(0), policy=transformer, cfg=cfg, critic_fn=critic)


def compiled(train_step: Callable, tx: optax.GradientTransformation, cfg: ppo.Config) -> Callable:
    """A train step of PPO for these models: (state, episodes, text) -> (state, metrics)."""
    policy = models.part("policy", LOGPROBS)
    return jax.jit(functools.partial(train_step, policy_fn=policy, critic_fn=CRITIC, tx=tx, cfg=cfg))


@functools.cache
def ppo_step(epochs: int, minibatches: int, lr: float) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser and train step of a PPO without pretraining text, compiled once: `kl_coef` is in the state."""
    tx = ppo.optimizer(optim.adamw(lr), optim.adamw(1e-3))
    return tx, compiled(ppo.train_step, tx, ppo.Config(epochs=epochs, minibatches=minibatches, ptx_coef=0.0))


@jax.jit
def loss(params: Params, text: Tokens) -> jax.Array:
    """The language model's loss on text, in nats a word."""
    return sft.loss(params, text, LOGPROBS)


def kl(episodes: Rollout) -> float:
    """The mean of ln pi - ln pi_ref over texts, each summed over its words: the KL to the reference, in nats."""
    return float(updates.response_kl(episodes).mean())


def texts(episodes: Rollout) -> list[str]:
    """The whole reviews, opening and answer."""
    return language.decode(episodes.tokens, episodes.mask)


def write(params: Params, count: int, seed: int = 0) -> list[str]:
    """Reviews by this model, of `count` random openings."""
    return texts(answer({"policy": params}, language.prompts(count, seed), named_key(seed, "lessons/write")))


def kindness(reviews: list[str]) -> jax.Array:
    """The kindness of each review."""
    return jnp.array([language.kindness(text) for text in reviews])


def sense(reviews: list[str]) -> float:
    """The share of texts that are reviews, by the grammar of the language."""
    return float(np.mean([language.points(text) is not None for text in reviews]))
