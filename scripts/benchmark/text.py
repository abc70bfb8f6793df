"""Text of any size, made at random, to the first batch: how many tokens a second, and how much memory that takes."""

import dataclasses
import functools
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import pipeline, recipes, shards, sources, tokenizer
from rlhf_jax.data.tokenizer import Tokenizer
from scripts.benchmark.parts import Workload
from scripts.benchmark.sizes import Config

WORDS = 50_000  # of which a few are in most sentences, as by Zipf
SENTENCES = 20_000
SAMPLE = 4.0  # megabytes on which the tokenizer alone is measured, at most


@dataclasses.dataclass(frozen=True)
class Taken:
    """The time and memory that the way to the first batch took."""

    tokens: int
    seconds: float
    processor: float  # seconds, of all threads


@functools.cache
def sentences() -> list[str]:
    """Sentences of random words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)]
    chance = 1 / np.arange(1, WORDS + 1)
    drawn = rng.choice(WORDS, (SENTENCES, 12), p=chance / chance.sum())
    return [" ".join(words[n] for n in row).capitalize() + "." for row in drawn]


def documents(megabytes: float) -> Iterator[str]:
    """Yield documents of about 1,500 characters, of so many in all."""
    rng, every, left = np.random.default_rng(1), sentences(), megabytes * 1e6
    while left > 0:
        document = f"{left:.0f} " + " ".join(every[n] for n in rng.integers(0, SENTENCES, rng.geometric(1 / 20)))
        yield document
        left -= len(document)


def trained(vocabulary: int) -> Tokenizer:
    """A tokenizer of such documents."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.train(documents(1.0), max(vocabulary, 300), folder)  # which has every byte


def to_first_batch(megabytes: float, tok: Tokenizer, length: int, batch: int) -> Taken:
    """Write a file of such documents, and take the time from there to the first batch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents(megabytes))
        start, processor = time.perf_counter(), time.process_time()
        rows = sources.rows(str(path), "text", data_dir=Path(folder) / "data")
        batches = pipeline.text(rows, tok, length=length, batch=batch, seed=0)
        next(iter(batches))
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        prepared = shards.prepare(rows, recipes.text(tok, length), tok, length)  # finds them
        return Taken(prepared.tokens, seconds, processor)


def alone(megabytes: float, tok: Tokenizer) -> Taken:
    """The time of the tokenizer alone, with its own threads, on such documents, or on some of them."""
    some = list(documents(min(megabytes, SAMPLE)))
    encode: Callable = tok.backend_tokenizer.encode_batch_fast
    encode(some[:64], add_special_tokens=False)  # its threads start
    start, processor = time.perf_counter(), time.process_time()
    tokens = sum(len(one) + 1 for one in encode(some, add_special_tokens=False))
    return Taken(tokens, time.perf_counter() - start, time.process_time() - processor)


def text_10gb_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.text_10gb
    tok = tokenizer.load(w.tokenizer) if w.tokenizer else trained(config.vocab_size)
    taken: list[Taken] = []
    peaks: list[float] = []

    def repeat(i: int) -> tuple[float, float]:
        taken.append(to_first_batch(w.megabytes if i else w.small, tok, w.length, w.batch))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return taken[-1].tokens, taken[-1].seconds

    by_itself = functools.cache(lambda: alone(w.megabytes, tok))

    def extra() -> dict[str, float]:
        ours = taken[-1].processor / taken[-1].tokens
        return {
            "above_small_mib": peaks[-1] - peaks[0],
            "of_limit_processor": by_itself().processor / by_itself().tokens / ours,
            "seconds": taken[-1].seconds,
        }

    return Workload(
        unit="tokens_per_s",
        warmup=1,
        timed=1,
        repeat=repeat,
        least_seconds=lambda limits, count: count * by_itself().seconds / by_itself().tokens,
        extra=extra,
    )
