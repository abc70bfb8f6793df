"""Online DPO: the policy learns from preferences between its own answers, by the reward model (arXiv:2402.04792).

Of the answers to each prompt, the best is preferred to the worst, or each to all that score less (`--algorithm.pairs
all`). The losses are those of `dpo`, the reference model is frozen. Few steps of many prompts and several epochs are
the iterative form (arXiv:2405.07863): `--steps 3 --batch 4096 --algorithm.minibatches 64 --algorithm.epochs 2`.

Run:     python -m experiments.online_dpo --init runs/sft/model --reward runs/reward/model
Parent:  grpo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.745 at 0.62 nats, loss on held-out text 0.613 -> 0.632
"""

import dataclasses
from pathlib import Path

from experiments import grpo
from rlhf_jax.algorithms import online_dpo as online_dpo_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(grpo.Config):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/online_dpo")  # run directory; the model goes to its folder "model"
    algorithm: online_dpo_lib.Config = online_dpo_lib.Config(  # type: ignore[assignment]  # online DPO's settings in place of GRPO's
        minibatches=2, group=4, beta=0.2, ptx_coef=3.0, unfinished_score=-1.0
    )


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return grpo.main(cfg, online_dpo_lib.train_step, assess=online_dpo_lib.assess)


if __name__ == "__main__":
    cli.run(main, Config())
