"""Evaluation of a model: gold score on held-out prompts, loss on held-out text, KL to a reference.

Gold judges each answer by the facts of the world (rlhf_jax/data/world/gold.py), without a trained model. Held-out
prompts share no person, place, word or sum with the prompts of any training stage, but the pretraining text covers them
all.

Run:     python -m experiments.evaluate --model runs/ppo/model --reference runs/sft/model
Parent:  none
Result:  the tables of README.md
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n, sft
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.world import World
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Positive, Seed
from rlhf_jax.types import InputError, Prompts, Rollout, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    model: Path = Path("runs/ppo/model")  # model directory to evaluate
    reference: Path = Path("runs/sft/model")  # model directory of the reference, to which the KL is measured
    reward: Path | None = None  # model directory of a reward model, for mean score and best-of-n; None: neither
    judge: judge_lib.Config = judge_lib.Config()  # scores in place of the reward model, by a rubric
    out: Path | None = None  # type: ignore[assignment]  # JSON file for the result; None: print only
    prompts: Count = 512  # number of held-out prompts
    texts: Count = 1000  # number of held-out documents
    best_of: Count = 1  # answers to each prompt; above 1 the reward model selects one, and the KL is to the model
    temperature: Positive = 1.0  # sampling temperature of the answers, as in training
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    max_new_tokens: Count = 16  # most tokens of an answer
    text_length: Count = 64  # tokens in a row of held-out text
    batch: Count = 256  # answers or rows of text to compute at a time, over all devices
    world: Seed = 0  # seed of the world that the model was trained on


@functools.lru_cache(maxsize=4)
def nll_step(config: models.Config, layout: parallel.Layout) -> Callable:
    """The compiled `sft.evaluate` of this architecture, which takes (params, batch)."""
    return layout.step(functools.partial(sft.evaluate, logprobs_fn=models.logprobs_fn(config)))


def held_out_nll(cfg: Config, model: models.Model, layout: parallel.Layout) -> float:
    """The mean negative log-likelihood of held-out pretraining text, in nats a token."""
    models.check_length(model.config, cfg.text_length, "text_length")
    rows = sources.rows(f"world:seed={cfg.world},rows={cfg.texts}", "text", data_dir=cfg.data_dir, split="held_out")
    tokenizer = models.tokenizer_of(model)
    batches = pipeline.text(rows, tokenizer, length=cfg.text_length, batch=cfg.batch, seed=0, epochs=1)
    step = nll_step(model.config, layout)
    params = layout.state(model.params)
    totals = [layout.get(step(params, layout.rows(batch))) for batch in batches]
    nll, count = np.sum(jax.device_get(totals), axis=0)
    return float(nll / count)


def episodes(cfg: Config, model: models.Model, rows: Rows, prompts: Prompts, layout: parallel.Layout) -> Rollout:
    """A response to each of `prompts`, with log-probabilities of the reference and scores, on the host.

    `rows` are what the prompts' index counts.
    """
    # The KL of best-of-n is to the model itself and has a formula, so no other reference is needed.
    reference = model if cfg.best_of > 1 else models.load(cfg.reference, compute=cfg.compute, place=layout.sharding)
    loaded, score = {cfg.model: model} | ({} if reference is model else {cfg.reference: reference}), None
    if cfg.reward:
        loaded[cfg.reward] = models.load_reward(cfg.reward, compute=cfg.compute, place=layout.sharding)
        score = scores.reward_models([loaded[cfg.reward]], models.stop_ids(model), layout=layout, group=cfg.best_of)
    if judge := judge_lib.load(cfg.judge, layout, cfg.compute, cfg.seed):
        if cfg.reward:
            raise InputError("reward has no effect where a judge scores: leave out one of them")
        score = scores.judged(judge, rows, models.tokenizer_of(model), layout, models.stop_ids(model))
    models.check_vocabularies(loaded)
    del loaded  # the reward model as it was loaded: `score` has a copy
    if reference.config != model.config:
        raise InputError(f"{cfg.reference} is not of the architecture of {cfg.model}: take the model that it came from")
    if cfg.best_of > 1 and score is None:
        raise InputError(f"best_of={cfg.best_of} needs a reward model to pick by: name one by --reward, or a judge")
    key = named_key(cfg.seed, "evaluate")
    return rollout.episodes(
        model,
        prompts,
        key,
        sampling.Config(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            eos_id=models.stop_ids(model),
            group=cfg.best_of,
        ),
        batch=cfg.batch,
        reference=reference,
        score=score,
        layout=layout,
    )


def main(cfg: Config) -> dict:
    """Evaluate, print, and write the result; returns gold, KL, negative log-likelihood and reward by name."""
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.model, compute=cfg.compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    world = World.generate(cfg.world)
    rows = sources.rows(
        f"world:seed={cfg.world},rows={cfg.prompts}", "prompts", data_dir=cfg.data_dir, split="held_out"
    )
    prompts, counts = pipeline.every_prompt(rows, tokenizer, length=cfg.prompt_length)
    print(f"held-out prompts: {counts}")
    sampled = episodes(cfg, model, rows, best_of_n.repeat(prompts, cfg.best_of), layout)
    if cfg.best_of > 1:
        sampled = best_of_n.select(sampled, cfg.best_of)
    texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
    questions = [rows[int(index)]["prompt"][-1]["content"] for index in sampled.index]
    gold = [world.gold(prompt, text) for prompt, text in zip(questions, texts, strict=True)]
    by_category: dict[str, list[float]] = {}
    for prompt, verdict in zip(questions, gold, strict=True):
        by_category.setdefault(world.parse(prompt).category, []).append(verdict.score)
    result: dict = {
        "gold": float(np.mean([verdict.score for verdict in gold])),
        "gold_by_category": {name: float(np.mean(values)) for name, values in sorted(by_category.items())},
        "answers": [
            {"prompt": prompt, "response": text, "gold": verdict.score, "why": verdict.reason}
            for prompt, text, verdict in zip(questions[:20], texts[:20], gold[:20], strict=True)
        ],
    }
    if cfg.best_of > 1:
        result |= {"n": cfg.best_of, "kl": best_of_n.kl(cfg.best_of)}
    else:
        kl = np.sum(np.where(sampled.response_mask, sampled.logp - sampled.logp_ref, 0.0), axis=1)
        result |= {"kl": float(kl.mean()), "nll": held_out_nll(cfg, model, layout)}
    if sampled.score is not None:
        result["reward"] = float(sampled.score.mean())
    if sampled.unjudged is not None:
        result["unjudged"] = float(sampled.unjudged.mean())
    print("  ".join(f"{name} {value:.3f}" for name, value in result.items() if isinstance(value, float)))
    print("gold by category: " + "  ".join(f"{name} {value:.3f}" for name, value in result["gold_by_category"].items()))
    if cfg.out:
        runs.write(cfg.out, json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    cli.run(main, Config())
