"""How far does PPO get when its score is the gold score itself? What a perfect reward model would be worth.

Run:     python -m experiments.ppo_gold --init runs/sft/model --reward runs/reward/model
Parent:  ppo
"""

from pathlib import Path

from experiments.ppo import Config, main
from rlhf_jax import cli
from rlhf_jax.data.tokenizer import Prompt, prompt_text
from rlhf_jax.data.world import World
from rlhf_jax.types import TrainState


def against_gold(cfg: Config) -> TrainState:
    """PPO on gold scores, stretched from [0, 1] to [-1, 1]; the reward model serves as the critic's start alone."""
    world = World.generate(0)

    def score(prompt: Prompt, response: str) -> float:
        return 2 * world.gold(prompt_text(prompt), response).score - 1

    return main(cfg, score)


if __name__ == "__main__":
    cli.run(against_gold, Config(out=Path("runs/ppo_gold")))
