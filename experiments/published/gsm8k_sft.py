"""How far do worked answers to grade-school problems alone take a model? (GSM8K, arXiv:2110.14168)

Data:    gsm8k:PATH, a .jsonl file as in github.com/openai/grade-school-math: train.jsonl (7,473 problems) is all of it
         that is trained on here. The last 473 are held out; test.jsonl, 1,319 more, is what papers report.
Run:     python -m experiments.published.gsm8k_sft --init runs/tinystories/model --data "gsm8k:PATH[:7000]"
Parent:  sft
Result:  from the tiny model of `tinystories`, with --data "gsm8k:...[:400]" --epochs 1 for the sake of two CPU cores:
         24 steps, loss 7.81 -> 4.23 nats a token; `gsm8k_evaluate` on "gsm8k:...[7000:7128]" with --max-new-tokens 96
         then finds 1 of 126 problems solved (0.8 %), 2 more being too long for it, by chance: no answer comes to its
         ####. A model that can reckon has to come by --init.
"""

from pathlib import Path

from experiments import sft
from experiments.published import paths
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState

CONFIG = sft.Config(
    out=Path("runs/gsm8k_sft"),
    init=Path("runs/tinystories/model"),
    data="gsm8k:PATH[:7000]",
    text=None,
    length=512,
    batch=8,
)


def main(cfg: sft.Config) -> TrainState:
    """Fine-tune on the worked answers."""
    paths.check_given(cfg, CONFIG, paths.GSM8K, "data")
    return sft.main(cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
