"""RLOO: REINFORCE with the other answers to the same prompt as the baseline (arXiv:2402.14740).

Run:     python -m experiments.rloo --init runs/sft/model --reward runs/reward/model
Parent:  grpo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.814 at 0.47 nats, loss on held-out text 0.613 -> 0.633
"""

import dataclasses
from pathlib import Path

from experiments import grpo
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(grpo.Config):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/rloo")  # run directory; the model goes to its folder "model"
    algorithm: rloo_lib.Config = rloo_lib.Config(  # type: ignore[assignment]  # RLOO's settings in place of GRPO's
        minibatches=4, group=4, kl_coef=0.2, ptx_coef=3.0, unfinished_score=-1.0
    )


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return grpo.main(cfg, rloo_lib.train_step, assess=rloo_lib.assess)


if __name__ == "__main__":
    cli.run(main, Config())
