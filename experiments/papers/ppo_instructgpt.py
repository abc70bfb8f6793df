"""Does InstructGPT's PPO, to the letter but for the sizes, do as well as `ppo` on the assistant world?

Run:     python -m experiments.papers.ppo_instructgpt --init runs/sft/model --reward runs/reward/model
Parent:  ppo
Result:  docs/ptx.md, the row InstructGPT
"""

import dataclasses

from experiments import ppo
from experiments.papers import presets
from rlhf_jax.runs import cli

small = ppo.Config()
CONFIG = dataclasses.replace(
    presets.instructgpt,
    prompt_length=small.prompt_length,
    max_new_tokens=small.max_new_tokens,
    text_length=small.text_length,
    batch=small.batch,
    text_batch=small.batch,  # 8 times as many rows of text as episodes, as there
    steps=small.steps,
    lr=small.lr,
    critic_lr=small.critic_lr,
)

if __name__ == "__main__":
    cli.run(ppo.main, CONFIG)
