"""A base model of real text that two CPU cores can pretrain: short stories in simple words (arXiv:2305.07759).

It is what the experiments on published data start from where there is no better model at hand. It has the context for
most of them, and no more: it knows no numbers and hardly anything of people's questions.

Data:    a .txt file of stories between lines `<|endoftext|>`. The full set, two million stories, is
         roneneldan/TinyStories at Hugging Face (CDLA-Sharing-1.0), its TinyStoriesV2-GPT4-train.txt such a file.
Run:     python -m experiments.published.tinystories --data PATH
Parent:  pretrain
Result:  2,317 stories (2 MiB), 920,192 parameters, 300 steps, which is about one pass: 2 min 50 s of processor time on
         two busy CPU cores; loss 7.65 -> 3.69 nats a token (mean of the last 30 steps; nothing is held out). Its
         stories have words and turns of phrase, and hardly a whole sentence.
"""

from pathlib import Path

from experiments import pretrain
from experiments.published import paths
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState

CONFIG = pretrain.Config(
    out=Path("runs/tinystories"),
    data="PATH",
    preset="llama-mini-512",
    vocab_size=2048,
    length=256,
    batch=8,
    steps=300,
    warmup=30,
)


def main(cfg: pretrain.Config) -> TrainState:
    """Pretrain on the stories."""
    paths.check_given(cfg, CONFIG, "TinyStoriesV2-GPT4-train.txt of roneneldan/TinyStories at Hugging Face", "data")
    return pretrain.main(cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
