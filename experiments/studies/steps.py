"""Do rewards of single steps teach a policy to count? Sums of the world that are solved in steps.

A model is fine-tuned on solutions, half of which have a fault. A process reward model learns from labels of steps up
to the first wrong one, as PRM800K has them. PPO and GRPO then get the logarithm of its probability that a step is
right, at the end of each step, and no other reward. Sums of the training rows, and others, tell how many solutions are
right in all steps, and how many in the answer.

Run:     python -m experiments.studies.steps --init runs/quickstart/sft/model
Parent:  sft, process_reward, ppo, grpo
Result:  from a quickstart's SFT model, seed 0: of 256 training and 256 other sums 22 and 11 % are right in all steps
         after fine-tuning, 28 and 10 % after PPO, 22 and 11 % after GRPO, with standard errors of 2 to 3 %: no clear
         gain. The process reward model finds 97 % of the right steps, but only 19 % of the wrong ones
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments import grpo, ppo, process_reward, sft
from rlhf_jax import models, runs
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.data import pipeline
from rlhf_jax.data.rows import Row
from rlhf_jax.data.world import World
from rlhf_jax.data.world import steps as sums
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Seed
from rlhf_jax.types import named_key


# The types of the stages are quoted, since inside the class a field's name hides the module of the same name.
@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the study; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/steps")  # run directory; each stage has a folder in it
    init: Path = Path("runs/quickstart/sft/model")  # model directory that is fine-tuned on solutions
    world: Seed = 0  # seed of the world
    solutions: Count = 4000  # solutions to fine-tune on, whose sums are the prompts of PPO and GRPO
    labelled: Count = 4000  # solutions whose steps are labelled
    held_out: Count = 256  # solutions of training sums, and of others, by which the models are measured
    sft: "sft.Config" = sft.Config(text=None, epochs=1, batch=32)
    process_reward: "process_reward.Config" = process_reward.Config()
    ppo: "ppo.Config" = ppo.Config(
        reward=(),
        critic="policy",
        text=None,
        prompt_length=32,
        max_new_tokens=32,
        steps=40,
        algorithm=ppo_lib.Config(minibatches=4, kl_coef=0.05, unfinished_score=-4.0),
    )
    grpo: "grpo.Config" = grpo.Config(
        text=None,
        prompt_length=32,
        max_new_tokens=32,
        steps=40,
        algorithm=grpo_lib.Config(minibatches=4, group=4, kl_coef=0.05, kl_in="reward", unfinished_score=-4.0),
    )


@dataclasses.dataclass(frozen=True)
class Stages:
    """The configuration of each stage."""

    sft: "sft.Config"
    process_reward: "process_reward.Config"
    ppo: "ppo.Config"
    grpo: "grpo.Config"


def stages(cfg: Config) -> Stages:
    """The stages; raises InputError for a flag without effect."""
    tuned, process = cfg.out / "sft" / "model", cfg.out / "process_reward" / "model"
    return Stages(
        sft=cli.hand_down(
            "sft",
            cfg.sft,
            cfg,
            out=cfg.out / "sft",
            init=cfg.init,
            data=str(cfg.out / "solutions.jsonl"),
        ),
        process_reward=cli.hand_down(
            "process_reward",
            cfg.process_reward,
            cfg,
            out=cfg.out / "process_reward",
            init=tuned,
            data=f"world:seed={cfg.world},rows={cfg.labelled}",
            held_out=str(cfg.out / "held_out.jsonl"),
        ),
        ppo=cli.hand_down(
            "ppo",
            cfg.ppo,
            cfg,
            out=cfg.out / "ppo",
            init=tuned,
            data=str(cfg.out / "solutions.jsonl"),
            process=scores.Process(model=process),
        ),
        grpo=cli.hand_down(
            "grpo",
            cfg.grpo,
            cfg,
            out=cfg.out / "grpo",
            init=tuned,
            data=str(cfg.out / "solutions.jsonl"),
            process=scores.Process(model=process),
        ),
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write solutions as rows that are demonstrations, labelled steps and prompts at once."""
    lines = [json.dumps(row | {"completion": "\n".join(row["steps"])}) + "\n" for row in rows]
    runs.write(path, "".join(lines))


def measure(cfg: Config, model: Path, tuned: Path) -> dict[str, float]:
    """The shares of sums that a model solves rightly in all steps, and in the answer; and its KL on training sums."""
    layout = parallel.layout(cfg.devices)
    loaded = models.load(model, compute=cfg.compute, place=layout.sharding)
    reference = models.load(tuned, compute=cfg.compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(loaded)
    world = World.generate(cfg.world)
    found: dict[str, float] = {}
    for split in ("train", "held_out"):
        rows = [*sums.rows(world, cfg.held_out, seed=9, held_out=split == "held_out")]
        prompts, _ = pipeline.every_prompt(rows, tokenizer, length=cfg.ppo.prompt_length)
        sampled = rollout.episodes(
            loaded,
            prompts,
            named_key(cfg.seed, f"steps/{split}"),
            sampling.Config(max_new_tokens=cfg.ppo.max_new_tokens, eos_id=models.stop_ids(loaded)),
            batch=cfg.ppo.batch,
            reference=reference,
            layout=layout,
        )
        texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
        lines = [text.split("\n") for text in texts]
        asked = [rows[int(index)]["sum"] for index in sampled.index]
        right = [sums.is_right(start, up, steps) for (start, up), steps in zip(asked, lines, strict=True)]
        answers = [steps[-1] == sums.solution(*pair)[-1] for pair, steps in zip(asked, lines, strict=True)]
        found |= {
            f"{split}/right_in_all_steps": float(np.mean(right)),
            f"{split}/right_answer": float(np.mean(answers)),
        }
        if split == "train":
            ratio = np.where(sampled.response_mask, sampled.logp - sampled.logp_ref, 0.0)
            found["kl"] = float(np.sum(ratio, axis=1).mean())
    return found


def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Run the stages that have not been run; returns the measures of each policy by name."""
    stage = stages(cfg)
    runs.claim(cfg.out, cfg)
    runs.write_config(cfg.out, cfg)
    world = World.generate(cfg.world)
    write(cfg.out / "solutions.jsonl", sums.rows(world, cfg.solutions, seed=8))
    held_out = sums.rows(world, cfg.held_out, seed=9, held_out=True)
    write(cfg.out / "held_out.jsonl", map(sums.to_first_fault, held_out))
    runs.once(sft.main, stage.sft)
    found = {"process_reward": runs.once(process_reward.main, stage.process_reward)}
    runs.once(ppo.main, stage.ppo)
    runs.once(grpo.main, stage.grpo)
    tuned = stage.sft.out / "model"
    for name, out in {"sft": stage.sft.out, "ppo": stage.ppo.out, "grpo": stage.grpo.out}.items():
        found[name] = measure(cfg, out / "model", tuned)
        print(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in found[name].items()))
    runs.write(cfg.out / "steps.json", json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    cli.run(main, Config())
