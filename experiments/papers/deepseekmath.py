"""DeepSeekMath (arXiv:2402.03300): fine-tuning, reward model and GRPO with outcome supervision, at 7B.

These are configurations, and none was trained here: scripts/tpu_compile.py compiles them for a TPU slice. Each number
has its section beside it. The paper does not give the reward model's batch and epochs, the length of questions, and of
GRPO the number of steps (here one pass over the questions), the schedule of the learning rate, Adam's settings and the
clip, which has no effect on one update a rollout. What differs: the reward model learns from rankings of answers, where
theirs has labels of steps (arXiv:2312.08935), and the learning rate of `sft` falls to 10 %, where theirs is constant.

Data:    "around 144K questions" of GSM8K and MATH, as {"prompt"}; gsm8k:PATH reads the first of these
Run:     python -m experiments.papers.deepseekmath grpo-7b --init DIR --reward DIR --data gsm8k:train.jsonl
         python scripts/tpu_compile.py --experiment deepseekmath:grpo-7b --topology v5p:2x4x4 --devices.fsdp 32 \\
             --devices.microbatches 8 --devices.offload True
Parent:  sft, reward, grpo
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

from pathlib import Path

from experiments import grpo, reward, sft
from rlhf_jax import models
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.runs import cli

MODELS = {"7b": "deepseek-7b"}  # of models.PRESETS
COMPUTE = models.Compute("bfloat16", remat="full", frozen="bfloat16", chunk=512)
QUESTIONS = 144_000  # 4.2: "around 144K questions"
GROUP, BATCH = 64, 1024  # 4.2: outputs of each question, and a batch of training, read as outputs


def out(name: str) -> Path:
    """The run directory of a stage."""
    return Path("runs/deepseekmath") / name


SFT = sft.Config(
    out=out("sft-7b"),
    init=Path("deepseek"),  # DeepSeekMath-Base
    data="demonstrations.jsonl",  # 3.1: 776K examples
    text=None,
    length=4096,  # 3.2: examples are concatenated up to 4K tokens
    batch=256,  # 3.2, for 500 steps
    lr=5e-5,  # 3.2
    compute=COMPUTE,
)

REWARD = reward.Config(
    out=out("reward-7b"),
    init=Path("deepseek"),  # 4.2: DeepSeekMath-Base
    data="rankings.jsonl",
    held_out=None,
    length=1024 + 512,
    batch=256,
    lr=2e-5,  # 4.2
    compute=COMPUTE,
)

GRPO = grpo.Config(
    out=out("grpo-7b"),
    init=out("sft-7b") / "model",  # 4.2: DeepSeekMath-Instruct
    reward=(out("reward-7b") / "model",),
    data="questions.jsonl",
    text=None,
    prompt_length=512,
    max_new_tokens=1024,  # 4.2: max length
    batch=BATCH,
    steps=QUESTIONS * GROUP // BATCH,
    lr=1e-6,  # 4.2
    schedule="constant",
    warmup=0,
    algorithm=grpo_lib.Config(
        group=GROUP,
        kl_coef=0.04,  # 4.2
        kl_in="loss",  # 4.1.1, eq. 3 and 4
        scale=True,  # 4.1.2: outcome supervision
        epochs=1,  # 4.2: a single update of the policy after each exploration
        minibatches=1,
    ),
    compute=COMPUTE,
)

STAGES: dict[str, tuple] = {
    "sft-7b": (sft.main, SFT),
    "reward-7b": (reward.main, REWARD),
    "grpo-7b": (grpo.main, GRPO),
}

if __name__ == "__main__":
    cli.run_stage(STAGES)
