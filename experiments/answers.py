"""Answers of one or several models, for people to judge: they go into the store that `scripts/people.sh` serves.

The server starts this in a process of its own when it is given models, so that the pages need no JAX. It can also be
run by itself, also on another machine, and also while the store is served.

Run:     python -m experiments.answers --db runs/people/people.db --model runs/quickstart/sft/model
Parent:  rank
Result:  200 prompts of the world with 4 answers each, in seconds
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import rank
from rlhf_jax import models
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.devices.compute import Compute
from rlhf_jax.people import arena, record
from rlhf_jax.people.exchange import Overlap
from rlhf_jax.people.forms import Task
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Positive, Seed, Settings, Share, Whole
from rlhf_jax.types import InputError, named_key

Said = tuple[str, bool, str]  # an answer, whether it ended, and the model


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    db: Path = Path("runs/people/people.db")  # the store, which is created if it is not there
    # Model directories, which share the answers; none (--task demonstrate): people write them.
    model: tuple[Path, ...] = (Path("runs/quickstart/sft/model"),)
    data: str = "world"  # prompts, as in every experiment
    prompts: Count = 200  # number of prompts
    k: Count = 4  # answers to a prompt, over all models; in an arena each answers once
    task: Task = "rank"  # what people are asked
    pairs: Count = 1  # of models that meet over a prompt of an arena; all pairs meet equally often
    round: Whole = 0  # number by which the labels can be told from those of other rounds
    overlap: Count = 1  # people who answer the same item
    overlap_share: Share = 1.0  # of the items, that so many answer; the others have one
    # Most tokens of an answer; None: 16 to prompts of the world, as in `rank`, which `reward` keeps with its prompt; to
    # others 256, or half of a smaller context.
    max_new_tokens: Count | None = None
    temperature: Positive = 1.0  # sampling temperature
    batch: Count = 64  # answers to sample at a time, over all devices
    seed: Seed = 0  # of sampling
    record: Whole = 0  # number under which the store has what is asked and how far it is; 0: none, so it begins anew
    data_dir: Path = Path("runs/data")  # directory of prepared data sets, which runs share
    compute: Compute = Compute()
    devices: parallel.Config = parallel.Config()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "arena":
            arena.check(self.model, self.pairs)
        elif self.k < max(len(self.model), 1 if self.task == "demonstrate" else 2):
            raise InputError(f"k={self.k}: expected at least 2 answers, and one of each of {len(self.model)} models")
        if not self.model and self.task != "demonstrate":
            raise InputError(f"--model: a task {self.task} needs a model; people write answers in --task demonstrate")
        if self.task == "compare" and self.k != 2:
            raise InputError(f"k={self.k}: expected 2 answers to compare; --task rank orders more")


def main(cfg: Config) -> dict[str, int]:
    """Write the answers as they are sampled; returns how many items were added, and how many were there already."""
    if not cfg.model:
        return _unanswered(cfg)
    layout = parallel.layout(cfg.devices)
    loaded = [models.load(path, compute=cfg.compute, place=layout.sharding) for path in cfg.model]
    context = min(model.config.max_length for model in loaded)
    default = rank.Config.max_new_tokens if sources.is_world(cfg.data) else 256
    answer = min(cfg.max_new_tokens or default, context // 2)
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    some = list(itertools.islice(rows, cfg.prompts))
    prepared = []
    for model in loaded:
        tokenizer = models.tokenizer_of(model)
        prompts, counts = pipeline.every_prompt(some, tokenizer, length=context - answer)
        print(f"{cfg.data}: {counts}")
        prepared.append(prompts)
    usable = sorted(set.intersection(*(set(prompts.index.tolist()) for prompts in prepared)))
    asked = dict(zip(usable, _asked(cfg), strict=False))
    overlap = Overlap(cfg.overlap, cfg.overlap_share)
    added = present = same = 0
    with Store(cfg.db) as store:
        done = record.done(store, cfg.record)
        for first in range(0, len(usable), cfg.batch // 4 or 1):
            chosen = usable[first : first + (cfg.batch // 4 or 1)]
            if first + len(chosen) <= done:
                present += sum(len(asked[index]) for index in chosen)
                continue
            said: dict[int, dict[int, list[Said]]] = {index: {} for index in chosen}
            for number, (model, prompts) in enumerate(zip(loaded, prepared, strict=True)):
                share = {index: max(numbers.count(number) for numbers in asked[index]) for index in chosen}
                places = np.flatnonzero(np.isin(prompts.index, chosen))
                places = np.repeat(places, [share[index] for index in prompts.index[places].tolist()])
                if not len(places):
                    continue
                part = jax.tree.map(lambda x, places=places: x[places], prompts)
                sampled = rollout.episodes(
                    model,
                    part,
                    named_key(cfg.seed, f"answers/{cfg.round}/{number}/{first}"),
                    sampling.Config(max_new_tokens=answer, temperature=cfg.temperature, eos_id=models.stop_ids(model)),
                    batch=cfg.batch,
                    layout=layout,
                )
                tokenizer = models.tokenizer_of(model)
                texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
                for index, text, ended in zip(part.index.tolist(), texts, sampled.ended.tolist(), strict=True):
                    said[index].setdefault(number, []).append((text, ended, str(cfg.model[number])))
            items = [
                _item(cfg, some[index]["prompt"], [said[index][m][n] for m, n in _numbered(numbers)], overlap)
                for index in chosen
                for numbers in asked[index]
            ]
            new, old = store.add(items)
            added, present = added + new, present + old
            same += sum(arena.is_same(item.responses) for item in items)
            record.note(store, cfg.record, first + len(chosen))
            print(f"answers to {min(first + len(chosen), len(usable))} of {len(usable)} prompts", flush=True)
        record.finish(store, cfg.record)
    if cfg.task == "arena":
        print(f"{same} of {added + present} battles have the same answer from both models: people are told so")
    return {"added": added, "present": present}


def _unanswered(cfg: Config) -> dict[str, int]:
    """Add the prompts alone; returns how many were added, and how many were there already."""
    rows = itertools.islice(sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir), cfg.prompts)
    overlap = Overlap(cfg.overlap, cfg.overlap_share)
    items = (Item(prompt=row["prompt"], task=cfg.task, round=cfg.round) for row in rows)
    with Store(cfg.db) as store:
        added, present = store.add(dataclasses.replace(item, overlap=overlap.of(item)) for item in items)
        record.finish(store, cfg.record)
    print(f"{cfg.data}: {added} prompts added, {present} were there already", flush=True)
    return {"added": added, "present": present}


def _asked(cfg: Config) -> Iterator[Sequence[tuple[int, ...]]]:
    """Yield the items of one prompt after another, each as the numbers of the models whose answers it has."""
    if cfg.task == "arena":
        yield from arena.pairs(len(cfg.model), cfg.pairs, cfg.seed)
    while True:
        yield [tuple(n % len(cfg.model) for n in range(cfg.k))]


def _numbered(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each number of a model with how often it occurred before."""
    return [(number, numbers[:place].count(number)) for place, number in enumerate(numbers)]


def _item(cfg: Config, prompt: object, answers: list[Said], overlap: Overlap) -> Item:
    """The item of a prompt, with its answers in an order that does not tell the models."""
    random.Random(f"{cfg.seed}/{prompt}").shuffle(answers)
    texts, ended, names = zip(*answers, strict=True)
    item = Item(prompt=prompt, responses=texts, task=cfg.task, models=names, ended=ended, round=cfg.round)
    return dataclasses.replace(item, overlap=overlap.of(item))


if __name__ == "__main__":
    cli.run(main, Config())
