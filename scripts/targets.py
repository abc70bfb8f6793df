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
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    model: Path = Path("runs/quickstart/sft/model")  # directory with the tokenizer
    data: str = "world:rows=100"  # demonstrations: the world or a .jsonl file
    rows: Count = 3  # to show, from the first one on
    length: Count = 1024  # tokens of a row, beyond which it is cut
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept


def main(cfg: Config) -> None:
    tokenizer = tokenizer_lib.load(cfg.model)
    special = {"EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id, "padding": tokenizer_lib.pad_id(tokenizer)}
    names = {use: "none" if i is None else f"{tokenizer.convert_ids_to_tokens(i)} {i}" for use, i in special.items()}
    print(", ".join(f"{use} {name}" for use, name in names.items()))
    source = sources.rows(cfg.data, "demonstrations", data_dir=cfg.data_dir)
    for number, row in enumerate(itertools.islice(source, cfg.rows)):
        try:
            batches = pipeline.demonstrations([row], tokenizer, length=cfg.length, batch=1, seed=0, epochs=1)
        except InputError as error:
            raise InputError(f"{source.where(number)}: {str(error).removeprefix('row 1: ')}") from error
        for batch in batches:
            print(f"\nrow {number + 1}\n{pipeline.listing(batch, tokenizer)}")


if __name__ == "__main__":
    cli.run(main, Config())
