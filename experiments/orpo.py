"""ORPO: fine-tuning and preferences in one loss, without a reference model (arXiv:2403.07691).

The paper starts from the pretrained model; so may this, by --init runs/pretrain/model.

Run:     python -m experiments.orpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  dpo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.654 at 0.20 nats, loss on held-out text 0.613 -> 0.638
"""

import dataclasses
from pathlib import Path

from experiments import dpo
from rlhf_jax.algorithms import orpo as orpo_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(dpo.Config):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/orpo")  # run directory; the model goes to its folder "model"
    algorithm: orpo_lib.Config = orpo_lib.Config()  # type: ignore[assignment]  # ORPO's settings in place of DPO's


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return dpo.main(cfg, orpo_lib.train_step, "loss/orpo", with_reference=False)


if __name__ == "__main__":
    cli.run(main, Config())
