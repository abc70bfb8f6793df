"""How far do worked answers to grade-school problems alone take a model? (GSM8K, arXiv:2110.14168)

Data:    gsm8k:PATH, a .jsonl file as in github.com/openai/grade-school-math: train.jsonl (7,473 problems) is all of it
         that is trained on here. The last 473 are held out; test.jsonl, 1,319 more, is what papers report.
Run:     python -m experiments.gsm8k_sft --init runs/tinystories/model
Parent:  sft
"""

from pathlib import Path

from experiments.sft import Config, main
from rlhf_jax import cli

CONFIG = Config(
    out=Path("runs/gsm8k_sft"),
    init=Path("runs/tinystories/model"),
    data="gsm8k:../shared/data/gsm8k_train.jsonl[:7000]",
    text=None,
    length=512,
    batch=8,
)

if __name__ == "__main__":
    cli.run(main, CONFIG)
