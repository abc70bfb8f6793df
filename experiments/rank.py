"""Collecting comparisons: a model answers each prompt K times, and simulated labelers rank the answers.

Training prompts are ranked by one labeler each. Held-out prompts, which share no entity with them, are ranked by every
labeler, which shows how often labelers agree.

Run:     python -m experiments.rank --init runs/sft/model
Parent:  none
Result:  in the quickstart, seed 0: 23,512 answers ranked, 1,434 of them cut; labelers agree on 73.6 % of held-out pairs
"""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import models, runs
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.world import World, labelers
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Positive, Seed, Whole
from rlhf_jax.types import InputError, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/rank")  # run directory; rankings go to train.jsonl and held_out.jsonl
    init: Path = Path("runs/sft/model")  # model directory whose answers are ranked
    prompts: Count = 3600  # number of training prompts
    skip: Whole = 0  # number of training prompts to skip, because an earlier round ranked them
    held_out: Count = 384  # number of held-out prompts
    least: Count = 4  # smallest number of answers to a prompt, drawn uniformly from least..most
    most: Count = 9  # largest number of answers to a prompt
    people: Count = 5  # number of simulated labelers
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    max_new_tokens: Count = 16  # most tokens of an answer
    temperature: Positive = 1.0  # sampling temperature of the answers
    batch: Count = 256  # answers to sample at a time, over all devices
    world: Seed = 0  # seed of the world that the prompts come from

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.people < 2:
            raise InputError(f"people={self.people}: expected at least 2 labelers, who may agree")
        if not 2 <= self.least <= self.most:
            raise InputError(f"least={self.least}, most={self.most}: expected 2 <= least <= most answers to rank")


def main(cfg: Config) -> dict[str, float]:
    """Write the rankings; returns {"labeler_agreement": the share of held-out pairs that labelers order alike}."""
    runs.claim(cfg.out, cfg)
    runs.write_config(cfg.out, cfg)
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    world = World.generate(cfg.world)
    people = labelers.labelers(cfg.seed, cfg.people)
    sizes = {"train": (cfg.skip, cfg.prompts), "held_out": (0, cfg.held_out)}
    for split, (skip, count) in sizes.items():
        rng = random.Random(f"{cfg.seed}/{split}")
        spec = f"world:seed={cfg.world},rows={skip + count}"
        rows = sources.rows(spec, "prompts", data_dir=cfg.data_dir, split=f"{split}[{skip}:]")
        prompts, counts = pipeline.every_prompt(rows, tokenizer, length=cfg.prompt_length)
        times = [rng.randint(cfg.least, cfg.most) for _ in prompts.index]
        repeated = jax.tree.map(lambda x, times=times: np.repeat(x, times, axis=0), prompts)
        sampled = rollout.episodes(
            model,
            repeated,
            named_key(cfg.seed, f"rank/{split}/{cfg.skip}"),
            sampling.Config(
                max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, eos_id=models.stop_ids(model)
            ),
            batch=cfg.batch,
            layout=layout,
        )
        texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
        answers = zip(texts, sampled.ended.tolist(), strict=True)
        rankings, lines = [], []
        for index, k in zip(prompts.index, times, strict=True):
            prompt = rows[int(index)]["prompt"]
            responses, ended = zip(*itertools.islice(answers, k), strict=True)
            judges = people if split == "held_out" else [rng.choice(people)]
            ranks = [judge.rank(world, prompt[-1]["content"], responses, cfg.seed) for judge in judges]
            rankings.append(ranks)
            for judge, rank in zip(judges, ranks, strict=True):
                row = {
                    "prompt": prompt,
                    "responses": responses,
                    "ranks": rank,
                    "ratings": [judge.rate(world, prompt[-1]["content"], text, cfg.seed) for text in responses],
                    "ended": ended,
                    "labeler": judge.id,
                }
                lines.append(json.dumps(row) + "\n")
        runs.write(cfg.out / f"{split}.jsonl", "".join(lines))
        print(
            f"{split} prompts: {counts}; {sum(times)} answers, {int(np.sum(~sampled.ended))} of them cut at"
            f" max_new_tokens={cfg.max_new_tokens}, each ranked by {len(judges)} of {len(people)} labelers"
        )
    summary = {"labeler_agreement": labelers.agreement(rankings)}
    print(f"labelers agree on {100 * summary['labeler_agreement']:.1f} % of the held-out pairs that both order")
    return summary


if __name__ == "__main__":
    cli.run(main, Config())
