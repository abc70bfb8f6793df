"""KTO: the policy learns from thumbs, responses labelled good or bad one by one (arXiv:2402.01306).

The thumbs that people gave in a chat are such data (`--data people:PATH`), and {"prompt", "completion", "label"} in a
file.

Run:     python -m experiments.kto --init runs/sft/model
Parent:  dpo
Result:  from a quickstart's models, seed 0, and 4,000 thumbs of the world's answers: gold 0.465 -> 0.856 at 1.01 nats,
         loss on held-out text 0.613 -> 0.785
"""

import dataclasses
from pathlib import Path

from experiments import dpo
from rlhf_jax.algorithms import kto as kto_lib
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Rows
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(dpo.Offline):
    """Defaults are for the assistant world on two CPU cores."""

    out: Path = Path("runs/kto")  # run directory; the model goes to its folder "model"
    data: str = "world:rows=4000"  # thumbs to learn from: the world, a file, or people:PATH
    batch: Count = 32  # responses a step, over all devices
    algorithm: kto_lib.Config = kto_lib.Config(beta=0.2)  # type: ignore[assignment]  # KTO's settings in place of DPO's


def read(cfg: Config, tokenizer: tokenizer_lib.Tokenizer) -> tuple[Rows, pipeline.Batches]:
    """The thumbs that `cfg` names, and batches of them."""
    rows = sources.rows(cfg.data, "thumbs", data_dir=cfg.data_dir)
    return rows, pipeline.thumbs(
        rows,
        tokenizer,
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
        epochs=cfg.epochs,
    )


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    return dpo.main(cfg, kto_lib.train_step, "loss/kto", read=read, keys="kto")


if __name__ == "__main__":
    cli.run(main, Config())
