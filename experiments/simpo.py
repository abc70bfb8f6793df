"""SimPO: preferences by mean log-probability, without a reference model (arXiv:2405.14734).

Nothing holds the policy near where it began but the small learning rate.

Run:     python -m experiments.simpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  dpo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.805 at 1.58 nats, loss on held-out text 0.613 -> 0.772
"""

import dataclasses
from pathlib import Path

from experiments import dpo
from rlhf_jax.algorithms import simpo as simpo_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(dpo.Config):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/simpo")  # run directory; the model goes to its folder "model"
    algorithm: simpo_lib.Config = simpo_lib.Config()  # type: ignore[assignment]  # SimPO's settings in place of DPO's


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return dpo.main(cfg, simpo_lib.train_step, "loss/simpo", with_reference=False)


if __name__ == "__main__":
    cli.run(main, Config())
