"""Where a policy goes that follows a reward model without restraint: points of KL, gold and proxy.

Gold is what each answer is worth (rlhf_jax/data/world); the proxy is the reward model's score; the KL is from the
fine-tuned model.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from experiments import ppo
from experiments.studies import study
from experiments.studies.tables import Point
from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.tokenizer import prompt_text
from rlhf_jax.data.world import World
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.runs import log
from rlhf_jax.settings import Count
from rlhf_jax.types import Rollout, named_key

BATCH = 256  # answers sampled or scored at once, over all devices
WORLD = World.generate(0)


# The type of the stage is quoted: by the time it was evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Reward models are followed without restraint: no KL penalty, no pretraining text."""

    answers: Count = 32  # to each prompt, of which best-of-n takes n at most
    answered: Count = 192  # prompts of best-of-n
    ppo: "ppo.Config" = ppo.Config(
        steps=40,
        text=None,
        algorithm=ppo_lib.Config(minibatches=4, kl_coef=0.0, unfinished_score=-1.0),
        samples_every=1,  # and as many as there are, so that gold is known along the run
        samples=64,
        token_samples=0,
    )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Answers of the model that `run` starts from, of which its reward model picks."""

    out: Path
    run: ppo.Config
    prompts: int
    answers: int  # to each prompt


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that came from where `run` starts, or that start itself."""

    out: Path
    run: ppo.Config
    model: Path
    prompts: int


def ppo_course(cfg: Config, seed: int, judge: Path) -> list[Point]:
    """The course of PPO, which is run for it: a point for where it starts, then those along the run."""
    run = study.ppo_run(cfg, seed, judge, cfg.out / f"seed{seed}" / f"ppo-{judge.parent.name}")
    runs.once(ppo.main, run)
    start = runs.once(measure, Trained(run.out / "start", run, run.init, 8 * cfg.answered))
    return [start, *read_course(run.out)]


def best_of_n_course(cfg: Config, seed: int, judge: Path) -> list[Point]:
    """The best of 1, 2, 4, .. `cfg.answers` answers. Their KL is a bound where answers are alike."""
    run = study.ppo_run(cfg, seed, judge, cfg.out / f"seed{seed}" / f"best-of-n-{judge.parent.name}")
    return runs.once(measure_picks, Candidates(run.out, run, cfg.answered, cfg.answers))["points"]


def read_course(run: Path, points: int = 10) -> list[Point]:
    """The course of a run that is done: means over its samples, in order, in as many windows of steps."""
    tables: dict[int, list[dict]] = {}
    for row in log.read(run, "samples.jsonl"):
        tables.setdefault(row["step"], []).append(row)
    windows = np.array_split(np.array(sorted(tables)), min(points, len(tables)))
    rows = [[row for step in window for row in tables[step]] for window in windows]
    return [
        {
            "kl": float(np.mean([row["kl"] for row in window])),
            "gold": float(np.mean([gold_score(row["prompt"], row["response"]) for row in window])),
            "proxy": float(np.mean([row["score"] for row in window])),
        }
        for window in rows
    ]


def measure(trained: Trained) -> Point:
    """The place of a model, by answers to many prompts. That of the start has KL 0, since gains are counted from it."""
    episodes, gold = score_answers(trained.run, trained.model, trained.prompts)
    kl = 0.0
    if trained.model != trained.run.init:
        ratio = np.where(episodes.response_mask, episodes.logp - episodes.logp_ref, 0.0)
        kl = float(np.sum(ratio, axis=1).mean())
    return {"kl": kl, "gold": float(gold.mean()), "proxy": float(episodes.score.mean())}


def measure_picks(candidates: Candidates) -> dict[str, list[Point]]:
    """The expected gold and proxy of the best of n answers, for n = 1, 2, 4, .. of them."""
    episodes, gold = score_answers(candidates.run, candidates.run.init, candidates.prompts, candidates.answers)
    picked_by, proxy, worth = (
        x.reshape(-1, candidates.answers) for x in (best_of_n.selection_scores(episodes), episodes.score, gold)
    )
    points = [
        {
            "kl": best_of_n.kl(n),
            "gold": best_of_n.expected(picked_by, worth, n),
            "proxy": best_of_n.expected(picked_by, proxy, n),
        }
        for n in (2**k for k in range(candidates.answers.bit_length()))
    ]
    return {"points": points}


def gold_score(prompt: str, response: str) -> float:
    """The worth of an answer in the world of the studies, 0 to 1."""
    return WORLD.gold(prompt, response).score


def score_answers(run: ppo.Config, model: Path, prompts: int, times: int = 1) -> tuple[Rollout, np.ndarray]:
    """Answers of a model to prompts of `run.data`, each asked so many times in turn, and gold of each answer [B].

    The prompts lie evenly in those that policies train on. `run` says how answers are sampled, what reward models score
    them, and by `init` what the KL is measured from.
    """
    layout = parallel.layout(run.devices)
    same_sampling = dataclasses.replace(run, reward=(), critic="policy", out=Path())
    sampled, gold = sample_answers(same_sampling, model, prompts, times)
    rewards = [models.load_reward(path, compute=run.compute, place=layout.sharding) for path in run.reward]
    score = scores.reward_models(rewards, models.stop_ids(rewards[0]), layout=layout, group=times)
    parts = [layout.gather(score(layout.rows(part))) for _, part in rollout.chunks(sampled, BATCH)]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(sampled.index)], *parts), gold


@functools.lru_cache(maxsize=1)
def sample_answers(run: ppo.Config, model: Path, prompts: int, times: int) -> tuple[Rollout, np.ndarray]:
    """The answers of `score_answers` without scores, sampled once for all the reward models that are asked next."""
    found = answers(run, model, prompts, times)
    return found.sampled, np.array([gold_score(prompt, text) for prompt, text in found.texts])


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of a model, and their texts beside those of the prompts."""

    sampled: Rollout
    texts: list[tuple[str, str]]  # (prompt, answer)


def answers(run: ppo.Config, model: Path, prompts: int, times: int = 1) -> Answers:
    """The answers of `score_answers` without scores, and with their texts."""
    layout = parallel.layout(run.devices)
    policy, reference = (models.load(path, compute=run.compute, place=layout.sharding) for path in (model, run.init))
    tokenizer = models.tokenizer_of(policy)
    rows = sources.rows(run.data, "prompts", data_dir=run.data_dir)
    asked = [rows[int(index)] for index in np.linspace(0, len(rows) - 1, prompts)]
    sampled = rollout.episodes(
        policy,
        best_of_n.repeat(pipeline.every_prompt(asked, tokenizer, length=run.prompt_length)[0], times),
        named_key(run.seed, "study/answers"),
        sampling.Config(
            max_new_tokens=run.max_new_tokens,
            temperature=run.algorithm.temperature,
            eos_id=models.stop_ids(policy),
            group=times,
        ),
        batch=BATCH,
        reference=reference,
        layout=layout,
    )
    texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
    asked_texts = [prompt_text(asked[int(index)]["prompt"]) for index in sampled.index]
    return Answers(sampled, list(zip(asked_texts, texts, strict=True)))
