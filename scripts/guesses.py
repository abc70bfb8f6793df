"""Counts what an exact speculative step would gain: guesses of next tokens, checked by one pass over several columns.

    python scripts/guesses.py --model runs/quickstart/ppo/model

The guesses are the tokens that followed the last few ones of a row where these stood before, in its prompt or answer.
One holds if it is the token that the sampler draws in its place, with the row's own noise, and so it holds as often as
its probability says; in the place of the first that does not hold, the token that was drawn stands. So the answers are
those of `sampling.generate`, in which guesses are counted here. A step without a guess reads one column, as ever.

The first table has the time of a pass over several columns of each row, behind half a cache; the second the tokens that
a step gives, and from both how many times as fast one row would be, or the first number of `rows`, if all of them had a
guess in the same steps. Looking for guesses is not in that time.
"""

import dataclasses
import functools
import operator
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlhf_jax import models
from rlhf_jax.data import pipeline, sources
from rlhf_jax.models.cache import Cache
from rlhf_jax.rollouts import sampling
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, NonNegative, Seed, Settings
from rlhf_jax.types import InputError, Params, named_key


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    model: Path = Path("runs/quickstart/ppo/model")  # model directory
    data: str = "world:rows=256"  # prompts, all in one batch
    data_dir: Path = Path("runs/data")  # directory of prepared data sets, which runs share
    prompt_length: Count = 20  # most tokens of a prompt
    max_new_tokens: Count = 16  # of an answer
    temperature: NonNegative = 1.0  # 0 is greedy
    matches: tuple[Count, ...] = (1, 2, 3)  # last tokens that have to stand before a guess
    guesses: tuple[Count, ...] = (1, 2, 4, 8)  # at most, in a step
    rows: tuple[Count, ...] = (1, 4, 16, 64)  # of the passes that are timed
    passes: Count = 16  # one after the other, in a program
    timed: Count = 5  # repetitions, of all widths in turn
    processor: bool = False  # take the processor's time, on a machine that others use
    seed: Seed = 0  # of sampling
    device: Literal["cpu", "gpu", "tpu"] | None = None  # None is the best there is


class Found(NamedTuple):
    """The steps after the first token of some answers."""

    tokens: int  # that they gave
    steps: int
    guessing: int  # steps that had a guess

    def times_as_fast(self, cost: float) -> float:
        """How many times as fast the steps are as one for each token, where one with guesses takes `cost` of them."""
        return self.tokens / (self.steps - self.guessing + self.guessing * cost)


def main(cfg: Config) -> dict[str, Any]:
    """Time the passes, count the guesses, and print both tables."""
    if cfg.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(cfg.device, cfg.device))
    model = models.load(cfg.model)
    widths = (1, *(guesses + 1 for guesses in cfg.guesses))
    lines = [["rows", "columns: 1", *map(str, widths[1:])], ["---"] * (1 + len(widths))]
    times: dict[int, list[float]] = {}
    for rows in cfg.rows:
        times[rows] = pass_seconds(model, rows, widths, cfg)
        ratios = (f"{1e3 * x:.2f} ms, {x / times[rows][0]:.2f} x" for x in times[rows])
        lines.append([str(rows), *ratios])
    print(table(lines))
    prompts, answers = sample(model, cfg)
    if max(map(len, answers)) == 1:
        raise InputError(
            f"{cfg.data}: no answer has a second token to guess; raise max_new_tokens, or name other prompts"
        )
    lines = [["last tokens", "guesses", "tokens a step", "steps with a guess", "times as fast"], ["---"] * 5]
    counts: dict[tuple[int, int], Found] = {}
    for match in cfg.matches:
        for guesses, seconds in zip(cfg.guesses, times[cfg.rows[0]][1:], strict=True):
            parts = [count(*pair, match, guesses) for pair in zip(prompts, answers, strict=True)]
            counts[match, guesses] = found = Found(*map(sum, zip(*parts, strict=True)))
            gain = found.times_as_fast(seconds / times[cfg.rows[0]][0])
            share = found.guessing / found.steps
            lines.append([f"{match}", f"{guesses}", f"{found.tokens / found.steps:.2f}", f"{share:.0%}", f"{gain:.2f}"])
    print(f"\n{len(answers)} answers of {np.mean([len(answer) for answer in answers]):.1f} tokens\n\n{table(lines)}")
    return {"seconds": times, "counts": counts}


def pass_seconds(model: models.Model, rows: int, widths: Sequence[int], cfg: Config) -> list[float]:
    """The median time of a pass over each of these numbers of columns of so many rows, as conversations read them."""
    size = cfg.prompt_length + cfg.max_new_tokens + max(widths)
    cache = Cache.by_row(model.config, rows, size).replace(column=jnp.full(rows, size // 2))
    run = jax.jit(functools.partial(passes, model.config, cfg.passes), donate_argnums=2)
    clock = time.process_time if cfg.processor else time.perf_counter
    times: dict[int, list[float]] = {width: [] for width in widths}
    for repetition in range(1 + cfg.timed):
        for width in widths:
            start = clock()
            _, cache = jax.block_until_ready(run(model.params, jnp.ones((rows, width), jnp.int32), cache))
            if repetition:  # the first one compiles
                times[width].append((clock() - start) / cfg.passes)
    return [statistics.median(times[width]) for width in widths]


def passes(config: models.Config, number: int, params: Params, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
    """The tokens after so many passes, each over the likeliest ones that the one before gave, at the same columns."""
    module = models.Transformer(config)
    append = models.bind(module, models.Transformer.append_hidden)
    unembed = models.bind(module, models.Transformer.unembed)

    def one(_: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        tokens, cache = state
        hidden, cache = append(params, tokens, jnp.zeros_like(cache.column), cache)
        return jnp.argmax(unembed(params, hidden), axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, number, one, (tokens, cache))


def sample(model: models.Model, cfg: Config) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of the prompts, and those of an answer to each."""
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    prompts, counts = pipeline.every_prompt(rows, models.tokenizer_of(model), length=cfg.prompt_length)
    print(f"\n{cfg.data}: {counts}")
    sampled = sampling.Config(cfg.max_new_tokens, cfg.temperature, eos_id=models.stop_ids(model))
    key = named_key(cfg.seed, "guesses")
    on_device = jax.device_put(prompts)
    found = jax.device_get(sampling.generate(model, model.params, on_device.tokens, on_device.mask, key, sampled))
    real = lambda tokens, mask: [row[on].tolist() for row, on in zip(tokens, mask, strict=True)]
    return real(prompts.tokens, prompts.mask), real(found.tokens, found.mask)


def count(prompt: list[int], answer: list[int], match: int, guesses: int) -> Found:
    """The steps of one answer, where up to so many tokens that followed the last `match` ones are guessed."""
    done, steps, guessing = 1, 0, 0
    while done < len(answer):
        guessed = follow(prompt + answer[:done], match)[:guesses]
        hold = int(np.argmin([*map(operator.eq, guessed, answer[done:]), False]))
        done, steps, guessing = min(done + hold + 1, len(answer)), steps + 1, guessing + bool(guessed)
    return Found(max(len(answer) - 1, 0), steps, guessing)


def follow(row: list[int], match: int) -> list[int]:
    """What followed the last `match` tokens of a row where they stood the last time before; nothing if they did not."""
    for end in range(len(row) - 1, match - 1, -1):
        if row[end - match : end] == row[-match:]:
            return row[end:]
    return []


def table(lines: list[list[str]]) -> str:
    """The lines as a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    cli.run(main, Config())
