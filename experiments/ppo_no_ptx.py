"""What does PPO forget without the pretraining mix? The loss on pretraining text tells (experiments.evaluate).

Run:     python -m experiments.ppo_no_ptx --init runs/sft/model --reward runs/reward/model
Parent:  ppo
Result:  docs/ptx.md, the row PPO
"""

from pathlib import Path

from experiments.ppo import Config, main
from rlhf_jax.runs import cli

CONFIG = Config(text=None, out=Path("runs/ppo_no_ptx"))

if __name__ == "__main__":
    cli.run(main, CONFIG)
