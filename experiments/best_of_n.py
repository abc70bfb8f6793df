"""Best-of-n: the fine-tuned model answers n times, and the reward model picks. What PPO has to beat, without training.

Run:     python -m experiments.best_of_n --model runs/sft/model --reward runs/reward/model --best-of 16
Parent:  evaluate
Result:  from a quickstart's models, seed 0, best of 16: gold 0.465 -> 0.808 at 1.84 nats
"""

from pathlib import Path

from experiments.evaluate import Config, main
from rlhf_jax.runs import cli

CONFIG = Config(model=Path("runs/sft/model"), reward=Path("runs/reward/model"), best_of=16)

if __name__ == "__main__":
    cli.run(main, CONFIG)
