"""SLiC-HF: a margin between log-probabilities, and the likelihood of the best answer (arXiv:2305.10425).

The answer that people ranked first is the target whose likelihood is kept up.

Run:     python -m experiments.slic --init runs/sft/model --data runs/rank/train.jsonl
Parent:  dpo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.480 at 0.59 nats, loss on held-out text 0.613 -> 0.640
"""

import dataclasses
from pathlib import Path

from experiments import dpo
from rlhf_jax.algorithms import slic as slic_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(dpo.Config):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/slic")  # run directory; the model goes to its folder "model"
    algorithm: slic_lib.Config = slic_lib.Config()  # type: ignore[assignment]  # SLiC's settings in place of DPO's


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return dpo.main(cfg, slic_lib.train_step, "loss/slic", with_reference=False)


if __name__ == "__main__":
    cli.run(main, Config())
