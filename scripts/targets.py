"""Print the tokens of demonstrations, and which of them count in the loss of fine-tuning.

    python scripts/targets.py --model runs/quickstart/sft/model --data demonstrations.jsonl

Each line shows one token: a star if it counts, its id, and its spelling in the vocabulary.
"""

import dataclasses
import itertools
from pathlib import Path

from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.runs import cli
from rlhf_jax.types import check_positive


@dataclasses.dataclass(frozen=True)
class Config:
    model: Path = Path("runs/quickstart/sft/model")  # model directory whose tokenizer is used
    data: str = "world:rows=100"  # demonstrations: the world or a .jsonl file
    rows: int = 3  # number of rows to print, from the first
    length: int = 1024  # tokens after which a row is truncated
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept

    def __post_init__(self) -> None:
        check_positive(self, "rows", "length")


def main(cfg: Config) -> None:
    tokenizer = tokenizer_lib.load(cfg.model)
    special = {"EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id, "padding": tokenizer_lib.pad_id(tokenizer)}
    names = {use: "none" if i is None else f"{tokenizer.convert_ids_to_tokens(i)} {i}" for use, i in special.items()}
    print(", ".join(f"{use} {name}" for use, name in names.items()))
    source = sources.rows(cfg.data, "demonstrations", data_dir=cfg.data_dir)
    for number, row in enumerate(itertools.islice(source, cfg.rows), start=1):
        batches = pipeline.demonstrations([row], tokenizer, length=cfg.length, batch=1, seed=0, epochs=1)
        for batch in batches:
            print(f"\nrow {number}\n{pipeline.listing(batch, tokenizer)}")


if __name__ == "__main__":
    cli.run(main, Config())
