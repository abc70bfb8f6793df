"""The N+ implementation details of RLHF with PPO (arXiv:2403.17031): summaries of Reddit posts with Pythia.

These are configurations, and none was trained here: scripts/tpu_compile.py compiles them for a TPU slice. Each number
is that of the authors' code, github.com/vwxyzjn/summarize_from_feedback_details (sft.py, reward.py, its sbatches and
ppo_left_padding.py), or of `presets.stiennon2020`, which has the EOS trick and where the score is added. What differs:
demonstrations are packed, so that a batch counts rows of `length`; learning rates of the first two stages fall to 10 %,
not to 0, and their Adam has an eps of 1e-8, not 1e-5; there is no weight decay, where PyTorch's AdamW has .01; a reward
model has mean 0 and standard deviation 1 on its training answers.

Data:    as `papers.tldr_stiennon2020`
Run:     python -m experiments.papers.tldr_huang2024 sft-1b --init EleutherAI/pythia-1b-deduped \\
             --data template:tldr.jsonl:train.jsonl
         python -m experiments.papers.tldr_huang2024 reward-1b --data tldr:comparisons.json
         python -m experiments.papers.tldr_huang2024 ppo-1b --data template:tldr.jsonl:train.jsonl
Parent:  papers.tldr_stiennon2020
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

import dataclasses
from pathlib import Path

from experiments import ppo, reward, sft
from experiments.papers import presets
from rlhf_jax import models
from rlhf_jax.runs import cli

MODELS = {"1b": "pythia-1b", "2.8b": "pythia-2.8b", "6.9b": "pythia-6.9b"}  # of models.PRESETS
COMPUTE = models.Compute("bfloat16", remat="full")  # deepspeed.yaml: mixed_precision bf16
POSTS = "template:tldr.jsonl:train.jsonl"
LR = 3e-6  # of every stage and size


def out(name: str) -> Path:
    """The run directory of a stage."""
    return Path("runs/tldr_huang2024") / name


def tune(size: str) -> sft.Config:
    """Fine-tuning: one epoch, batch 128, cosine."""
    return sft.Config(
        out=out(f"sft-{size}"),
        init=Path("pythia"),  # EleutherAI/pythia-1b-deduped, -2.8b-deduped, -6.9b-deduped
        data=POSTS,
        text=None,
        length=562,  # max_sft_query_response_length
        batch=128,  # 8 GPUs of 16 accumulation steps
        epochs=1,
        lr=LR,
        dropout=0.0,  # disable_dropout
        compute=COMPUTE,
    )


def judge(size: str) -> reward.Config:
    """Reward model: one epoch, batch 64, cosine, from the fine-tuned model."""
    return reward.Config(
        out=out(f"reward-{size}"),
        init=out(f"sft-{size}") / "model",
        data="tldr:comparisons.json",
        held_out=None,
        length=638,  # max_rm_query_response_length
        batch=64,  # 8 GPUs of 8 accumulation steps
        epochs=1,
        lr=LR,
        compute=COMPUTE,
    )


def improve(size: str) -> ppo.Config:
    """PPO: a million episodes, 512 a step, four epochs; the critic starts from the reward model."""
    return dataclasses.replace(
        presets.stiennon2020,
        out=out(f"ppo-{size}"),
        init=out(f"sft-{size}") / "model",
        reward=(out(f"reward-{size}") / "model",),
        data=POSTS,
        prompt_length=512,  # README: queries of 512 tokens
        lr=LR,
        critic_lr=LR,
        compute=COMPUTE,
    )


STAGES: dict[str, tuple] = (
    {f"sft-{size}": (sft.main, tune(size)) for size in MODELS}
    | {f"reward-{size}": (reward.main, judge(size)) for size in MODELS}
    | {f"ppo-{size}": (ppo.main, improve(size)) for size in MODELS}
)

if __name__ == "__main__":
    cli.run_stage(STAGES)
