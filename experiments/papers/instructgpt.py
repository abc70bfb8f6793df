"""InstructGPT (arXiv:2203.02155) at 1.3B, 6B and 175B: the settings of each stage, to the letter of appendix C.

These are configurations, and none was trained here: tests/experiments/test_recipes.py traces and lowers the train step
of every stage at full size, which takes no memory, and compiles one of 175B. What differs from the paper:
demonstrations are packed, so that a batch counts rows of `length`, not demonstrations; the trunk is bfloat16 where it
was float16; the warm-up of PPO starts from 0, not from a tenth; a reward model has mean 0 and standard deviation 1 on
its training answers, where demonstrations had 0. By default every device holds the whole model; the larger ones need a
mesh, and docs/scaling.md says what was compiled for which.

Data:    its authors published neither demonstrations nor rankings; the nearest are dolly:PATH (15,000 demonstrations
         by people, databricks/databricks-dolly-15k at Hugging Face) and hh:PATH (Anthropic/hh-rlhf, K = 2).
Run:     python -m experiments.papers.instructgpt init-1.3b --init DIR --data dolly:databricks-dolly-15k.jsonl \\
             --text TEXT
         python -m experiments.papers.instructgpt reward --init DIR --data RANKINGS --held-out RANKINGS
         python -m experiments.papers.instructgpt ppo-1.3b --init DIR --reward DIR --data PROMPTS --text TEXT
Parent:  sft, reward, presets
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

import dataclasses
from pathlib import Path

from experiments import ppo, reward, sft
from experiments.papers import presets
from rlhf_jax import models
from rlhf_jax.runs import cli

MODELS = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6.7b", "175b": "gpt3-175b"}  # of models.PRESETS
COMPUTE = models.Compute("bfloat16", remat="full")  # C: half precision, float32 master copies
LENGTH = 2048  # tokens; C: a context of 2k


def out(name: str) -> Path:
    """The run directory of a stage."""
    return Path("runs/instructgpt") / name


def tune(size: str, lr: float, batch: int) -> sft.Config:
    """Fine-tuning (C.1): 16 epochs, cosine to 10 % without warm-up, dropout .2."""
    return sft.Config(
        out=out(f"sft-{size}"),
        init=Path("gpt3"),
        data="demonstrations.jsonl",
        text=None,
        length=LENGTH,
        batch=batch,
        epochs=16,
        lr=lr,
        dropout=0.2,
        compute=COMPUTE,
    )


def tune_mixed(size: str, lr: float, batch: int, text_batch: int) -> sft.Config:
    """The fine-tuning that PPO starts from (C.3): 2 epochs, pretraining data mixed in; the paper names no dropout."""
    return dataclasses.replace(
        tune(size, lr, batch),
        out=out(f"init-{size}"),
        text="text.jsonl",
        text_batch=text_batch,
        epochs=2,
        dropout=0.0,
    )


# C.1: batch 32, at 175B 8; the learning rates are of a search.
SFT = {
    "1.3b": tune("1.3b", lr=9.65e-6, batch=32),
    "6b": tune("6b", lr=9.65e-6, batch=32),
    "175b": tune("175b", lr=5.03e-6, batch=8),
}

# C.3: batches of 32 and 8 as above, of which 10 % are pretraining data: here one row in 8, so that batches divide over
# devices.
INIT = {
    "1.3b": tune_mixed("1.3b", lr=5e-6, batch=28, text_batch=4),
    "6b": tune_mixed("6b", lr=1.04e-5, batch=28, text_batch=4),
    "175b": tune_mixed("175b", lr=2.45e-6, batch=7, text_batch=1),
}

# C.2: one reward model of 6B for policies of every size.
REWARD = reward.Config(
    out=out("reward"),
    init=out("init-6b") / "model",  # C.2: GPT-3 tuned on public tasks; SFT models, it says, do as well
    data="rankings.jsonl",  # K = 4 to 9 answers a prompt
    held_out=None,
    length=LENGTH,
    batch=64,  # prompts: up to 2,304 pairs
    epochs=1,  # more over-fit
    lr=9e-6,  # cosine to 10 %
    compute=COMPUTE,
)


def improve(size: str, lr: float, critic_lr: float) -> ppo.Config:
    """PPO-ptx (C.4): `presets.instructgpt`, with critic and reward model of 6B whatever the policy."""
    return dataclasses.replace(
        presets.instructgpt,
        out=out(f"ppo-{size}"),
        init=out(f"init-{size}") / "model",
        reward=(REWARD.out / "model",),
        data="prompts.jsonl",
        text="text.jsonl",
        lr=lr,
        critic_lr=critic_lr,
        compute=COMPUTE,
    )


# C.4 gives the critic's learning rate; the policy's, which it does not, is that of the SFT model of C.1.
PPO = {
    "1.3b": improve("1.3b", lr=9.65e-6, critic_lr=9e-6),
    "6b": improve("6b", lr=9.65e-6, critic_lr=9e-6),
    "175b": improve("175b", lr=5.03e-6, critic_lr=5e-6),
}

STAGES: dict[str, tuple] = (
    {f"sft-{size}": (sft.main, config) for size, config in SFT.items()}
    | {f"init-{size}": (sft.main, config) for size, config in INIT.items()}
    | {"reward": (reward.main, REWARD)}
    | {f"ppo-{size}": (ppo.main, config) for size, config in PPO.items()}
)

if __name__ == "__main__":
    cli.run_stage(STAGES)
