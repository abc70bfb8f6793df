"""Summaries of Reddit posts from human feedback (arXiv:2009.01325) at 1.3B and 6.7B: the settings of each stage.

The paper's appendix B.1 where it gives a number, else "The N+ implementation details" (arXiv:2403.17031). These are
configurations, and none was trained here: tests/experiments/test_recipes.py traces and lowers the train step of every
stage at full size, which takes no memory. What differs: demonstrations are packed, so that a batch counts rows of
`length`; the trunk is bfloat16 where it was float16; learning rates of the first two stages fall to 10 %, not to 0; a
reward model has mean 0 and standard deviation 1 on its training answers, where reference summaries had 0.

Data:    comparisons, tldr:PATH: the files dataset/comparisons/batch*.json of github.com/openai/summarize-from-feedback,
         one behind the other. Demonstrations and prompts: its datasets/tldr_3_filtered/train.jsonl (116,722 posts) by
         template:TEMPLATES:PATH, with {"prompt": "SUBREDDIT: r/{subreddit}\\n\\nTITLE: {title}\\n\\nPOST: {post}\\n\\n
         TL;DR:", "target": " {summary}"} on the one line of TEMPLATES.
Run:     python -m experiments.papers.tldr_stiennon2020 sft-1.3b --init DIR --data template:tldr.jsonl:train.jsonl
         python -m experiments.papers.tldr_stiennon2020 reward-1.3b --data tldr:comparisons.json
         python -m experiments.papers.tldr_stiennon2020 ppo-1.3b --data template:tldr.jsonl:train.jsonl
Parent:  sft, reward, presets
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

import dataclasses
from pathlib import Path

from experiments import ppo, reward, sft
from experiments.papers import presets
from rlhf_jax import models
from rlhf_jax.runs import cli

MODELS = {"1.3b": "gpt3-1.3b", "6.7b": "gpt3-6.7b"}  # of models.PRESETS
COMPUTE = models.Compute("bfloat16", remat="full")  # B.1: half precision, float32 weights
POSTS = "template:tldr.jsonl:train.jsonl"


def out(name: str) -> Path:
    """The run directory of a stage."""
    return Path("runs/tldr") / name


def tune(size: str, lr: float) -> sft.Config:
    """Fine-tuning (B.1): one epoch, batch 128, cosine."""
    return sft.Config(
        out=out(f"sft-{size}"),
        init=Path("gpt3"),
        data=POSTS,
        text=None,
        length=562,  # details: post and summary
        batch=128,
        epochs=1,
        lr=lr,
        dropout=0.0,
        compute=COMPUTE,
    )


def judge(size: str, lr: float) -> reward.Config:
    """Reward model (B.1): one epoch, batch 64, cosine, from the fine-tuned model."""
    return reward.Config(
        out=out(f"reward-{size}"),
        init=out(f"sft-{size}") / "model",
        data="tldr:comparisons.json",
        held_out=None,
        length=638,  # details: post and summary, which are longer here than those of people
        batch=64,
        lr=lr,
        compute=COMPUTE,
    )


def improve(size: str, lr: float, batch: int) -> ppo.Config:
    """PPO (B.1): a million episodes, 4 epochs of each batch, linear to 0, KL .05; critic from the reward model."""
    return dataclasses.replace(
        presets.stiennon2020,
        out=out(f"ppo-{size}"),
        init=out(f"sft-{size}") / "model",
        reward=(out(f"reward-{size}") / "model",),
        data=POSTS,
        prompt_length=512,  # details
        lr=lr,
        critic_lr=lr,
        batch=batch,
        steps=1_000_000 // batch,
        compute=COMPUTE,
    )


STAGES: dict[str, tuple] = {  # B.1: the learning rates, each of a sweep, and the batches of PPO
    "sft-1.3b": (sft.main, tune("1.3b", lr=6.35e-5)),
    "sft-6.7b": (sft.main, tune("6.7b", lr=2.83e-5)),
    "reward-1.3b": (reward.main, judge("1.3b", lr=1.5e-5)),
    "reward-6.7b": (reward.main, judge("6.7b", lr=5e-6)),
    "ppo-1.3b": (ppo.main, improve("1.3b", lr=1.5e-5, batch=512)),
    "ppo-6.7b": (ppo.main, improve("6.7b", lr=7e-6, batch=256)),
}

if __name__ == "__main__":
    cli.run_stage(STAGES)
