"""Fine-tuning language models from human preferences (arXiv:1909.08593) with GPT-2: the settings of each stage.

These are configurations, and none was trained here: scripts/tpu_compile.py compiles them for a TPU slice
(`papers.sentiment` is the recipe at a size that two CPU cores train, with real text). Each number is that of the
authors' code, launch.py of github.com/openai/lm-human-preferences, or of `presets.ziegler2019`. What differs: their
answers are cut at the first full stop (stories) or line break (summaries) after 16 or 55 tokens and scored -1 without
one, where here the model's EOS stands for it; a reward model's learning rate falls to 10 %, not to 0.

Data:    choices of the best of four, as {"prompt", "responses", "ranks"}, and prompts: openings of stories in books,
         articles of CNN and Daily Mail, posts of Reddit
Run:     python -m experiments.papers.ziegler2019 reward-books --init openai-community/gpt2 --data CHOICES
         python -m experiments.papers.ziegler2019 ppo-books --init openai-community/gpt2 --reward DIR --data PROMPTS
         python scripts/tpu_compile.py --experiment ziegler2019:ppo-books --topology v5e:2x4
Parent:  reward, presets
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

import dataclasses
from pathlib import Path

from experiments import ppo, reward
from experiments.papers import presets
from rlhf_jax import models
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.runs import cli

MODELS = dict.fromkeys(("books", "cnndm", "tldr"), "gpt2")  # initial_model 124M; of models.PRESETS
EPISODES = 1_000_000  # total_episodes


@dataclasses.dataclass(frozen=True)
class Task:
    """The lengths of a task, in tokens, and the sampling temperature."""

    query: int  # query_length, with prefix and suffix
    response: int  # response_length
    temperature: float


TASKS = {
    "books": Task(query=64, response=24, temperature=0.7),
    "cnndm": Task(query=512, response=75, temperature=0.5),  # 500 and "Article:", "TL;DR:"
    "tldr": Task(query=512, response=75, temperature=0.7),
}


def out(name: str) -> Path:
    """The run directory of a stage."""
    return Path("runs/ziegler2019") / name


def judge(name: str, lr: float, batch: int) -> reward.Config:
    """Reward model: softmax over the best of four, one epoch, normalised before and after."""
    return reward.Config(
        out=out(f"reward-{name}"),
        init=Path("gpt2"),
        data="choices.jsonl",
        held_out=None,
        length=TASKS[name].query + TASKS[name].response,
        batch=batch,
        lr=lr,
        normalize_first=True,  # normalize_before
        algorithm=reward_lib.Config(loss="choice"),  # labels.type best_of_4
    )


def improve(name: str, lr: float, batch: int, kl_coef: float, kl_target: float | None) -> ppo.Config:
    """PPO on a million episodes; the KL coefficient adapts where there is a target, and rewards are whitened there."""
    task = TASKS[name]
    return dataclasses.replace(
        presets.ziegler2019,
        out=out(f"ppo-{name}"),
        init=Path("gpt2"),
        reward=(out(f"reward-{name}") / "model",),
        data="prompts.jsonl",
        prompt_length=task.query,
        max_new_tokens=task.response,
        batch=batch,
        steps=EPISODES // batch,
        lr=lr,
        critic_lr=lr,  # one optimiser for both
        algorithm=dataclasses.replace(
            presets.ziegler2019.algorithm,
            temperature=task.temperature,
            kl_coef=kl_coef,
            kl_target=kl_target,
            whiten_rewards=kl_target is not None,
        ),
        compute=models.Compute(),  # float32
    )


STAGES: dict[str, tuple] = {
    "reward-books": (reward.main, judge("books", lr=5e-5, batch=32)),
    "reward-cnndm": (reward.main, judge("cnndm", lr=2.5e-5, batch=16)),
    "reward-tldr": (reward.main, judge("tldr", lr=2.5e-5, batch=16)),
    "ppo-books": (ppo.main, improve("books", lr=1e-5, batch=512, kl_coef=0.15, kl_target=6.0)),
    "ppo-cnndm": (ppo.main, improve("cnndm", lr=2e-6, batch=32, kl_coef=0.01, kl_target=None)),
    "ppo-tldr": (ppo.main, improve("tldr", lr=2e-6, batch=32, kl_coef=0.03, kl_target=None)),
}

if __name__ == "__main__":
    cli.run_stage(STAGES)
