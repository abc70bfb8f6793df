"""How far does PPO get when its score is the gold score itself? What a perfect reward model would be worth.

Run:     python -m experiments.ppo_gold --init runs/sft/model --reward runs/reward/model
Parent:  ppo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.777 at 0.31 nats, loss on held-out text 0.613 -> 0.621
"""

import dataclasses
from pathlib import Path

from experiments import ppo
from rlhf_jax.data.tokenizer import Prompt, prompt_text
from rlhf_jax.data.world import World
from rlhf_jax.runs import cli
from rlhf_jax.settings import Seed
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(ppo.Config):
    """The reward model is only where the critic starts."""

    out: Path = Path("runs/ppo_gold")  # run directory; the model goes to its folder "model"
    world: Seed = 0  # seed of the world that the prompts are of


def main(cfg: Config) -> TrainState:
    """PPO on gold scores, stretched from [0, 1] to [-1, 1]."""
    world = World.generate(cfg.world)

    def score(prompt: Prompt, response: str) -> float:
        return 2 * world.gold(prompt_text(prompt), response).score - 1

    return ppo.main(cfg, score_text=score)


if __name__ == "__main__":
    cli.run(main, Config())
