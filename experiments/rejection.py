"""Rejection sampling fine-tuning: the fine-tuned model learns from the best of its own answers.

Of n answers to each prompt the one with the highest score becomes a demonstration (arXiv:2307.09288, section 3.2.3).
Then `sft` trains on these, with pretraining text mixed in.

Run:     python -m experiments.rejection --init runs/sft/model --reward runs/reward/model
Parent:  sft, best_of_n
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.758 at 0.31 nats, loss on held-out text 0.613 -> 0.630
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments import sft
from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Positive, Range
from rlhf_jax.types import InputError, TrainState, named_key


# The type of the stage is quoted, since inside the class a field's name hides the module of the same name.
@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/rejection")  # run directory; the best answers go to best.jsonl, the model to "sft/model"
    init: Path = Path("runs/sft/model")  # model directory to sample from, and to fine-tune
    reward: Path = Path("runs/reward/model")  # model directory of the reward model that selects answers
    judge: judge_lib.Config = judge_lib.Config()  # selects answers in place of the reward model, by a rubric
    data: str = "world:rows=8000"  # source of prompts: the world or a .jsonl file
    prompts: Count = 2000  # number of prompts to answer
    # Answers to each prompt, of which the best becomes a demonstration.
    best_of: Annotated[int, Range(least=2, unit="answers to pick from")] = 4
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    max_new_tokens: Count = 16  # most tokens of an answer
    temperature: Positive = 1.0  # sampling temperature of the answers
    batch: Count = 256  # answers to sample at a time, over all devices
    sft: "sft.Config" = sft.Config(lr=3e-4, epochs=1)


def sft_config(cfg: Config) -> sft.Config:
    """The configuration of fine-tuning on the best answers; raises InputError for a flag without effect."""
    return cli.hand_down("sft", cfg.sft, cfg, out=cfg.out / "sft", init=cfg.init, data=str(cfg.out / "best.jsonl"))


def main(cfg: Config) -> TrainState:
    """Sample, select, fine-tune, and write the run directory; returns the final state of fine-tuning."""
    tune = sft_config(cfg)
    runs.claim(cfg.out, cfg)
    runs.write_config(cfg.out, cfg)
    pick(cfg)
    return sft.main(tune)


def pick(cfg: Config) -> None:
    """Sample, select, and write the best answers to best.jsonl. A function of its own, so that its models are freed."""
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    judge = judge_lib.load(cfg.judge, layout, cfg.compute, cfg.seed)
    tokenizer = models.tokenizer_of(model)
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    first = itertools.islice(rows, cfg.prompts)
    prompts, counts = pipeline.every_prompt(first, tokenizer, length=cfg.prompt_length)
    print(f"{cfg.data}: {counts}")
    if judge:
        score = scores.judged(judge, rows, tokenizer, layout, models.stop_ids(model))
    else:
        reward = models.load_reward(cfg.reward, compute=cfg.compute, place=layout.sharding)
        models.check_vocabularies({cfg.init: model, cfg.reward: reward})
        score = scores.reward_models([reward], models.stop_ids(model), layout=layout, group=cfg.best_of)
        del reward  # as it was loaded: `score` has a copy
    sampled = rollout.episodes(
        model,
        best_of_n.repeat(prompts, cfg.best_of),
        named_key(cfg.seed, "rejection"),
        sampling.Config(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            eos_id=models.stop_ids(model),
            group=cfg.best_of,
        ),
        batch=cfg.batch,
        score=score,
        layout=layout,
    )
    picked = best_of_n.select(sampled, cfg.best_of)
    print(f"mean score: {sampled.score.mean():.2f} of all answers, {picked.score.mean():.2f} of the best of each")
    print(f"{np.sum(~picked.ended)} prompts have no answer that ends, and are left out")
    if not picked.ended.any():
        raise InputError(f"max_new_tokens={cfg.max_new_tokens}: no answer ends within it, so there is nothing to learn")
    answers = rollout.texts(tokenizer, picked.response_tokens, picked.response_mask)
    lines = [
        json.dumps({"prompt": rows[int(index)]["prompt"], "completion": text}) + "\n"
        for index, text in zip(picked.index[picked.ended], itertools.compress(answers, picked.ended), strict=True)
    ]
    runs.write(cfg.out / "best.jsonl", "".join(lines))


if __name__ == "__main__":
    cli.run(main, Config())
