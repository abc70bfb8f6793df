"""Collecting comparisons: a model answers each prompt K times, and simulated labelers, or people, rank the answers.

Training prompts are ranked by one labeler each. Held-out prompts, which share no entity with them, are ranked by every
labeler, which shows how often labelers agree.

With `--db` people rank them on the pages of `scripts/people.sh`, each held-out prompt by `--overlap` of them. The run
waits until enough answers are in; killed meanwhile, it goes on when the same command is run again, without sampling or
asking anything twice.

With `--judge.model` or `--judge.url` a judge compares all pairs of the answers to a prompt in both orders, by a rubric.

Run:     python -m experiments.rank --init runs/sft/model
Parent:  none
Result:  in the quickstart, seed 0: 23,512 answers ranked, 1,427 of them cut; labelers agree on 73.8 % of held-out pairs
"""

import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import models, runs
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.data.world import World, labelers
from rlhf_jax.devices import hosts, parallel, progress
from rlhf_jax.people import guidelines
from rlhf_jax.people.asking import Asked
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli, log
from rlhf_jax.settings import Count, Positive, Seed, Share, Whole
from rlhf_jax.types import InputError, named_key

SPLITS = "train", "held_out"
_MOST = 26  # answers that a page can show: each has a letter


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/rank")  # run directory; rankings go to train.jsonl and held_out.jsonl
    init: Path = Path("runs/sft/model")  # model directory whose answers are ranked
    prompts: Count = 3600  # number of training prompts
    skip: Whole = 0  # number of training prompts to skip, because an earlier round ranked them
    held_out: Count = 384  # number of held-out prompts
    least: Count = 4  # smallest number of answers to a prompt, drawn uniformly from least..most
    most: Count = 9  # largest number of answers to a prompt
    people: Count = 5  # number of simulated labelers
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    max_new_tokens: Count = 16  # most tokens of an answer
    temperature: Positive = 1.0  # sampling temperature of the answers
    batch: Count = 256  # answers to sample at a time, over all devices
    world: Seed = 0  # seed of the world that the prompts come from
    judge: judge_lib.Config = judge_lib.Config()  # ranks in place of simulated labelers, by a rubric
    db: Path | None = None  # store of scripts/people.sh, where people rank the answers; None: simulated labelers do
    data: str | None = (
        None  # with db or a judge: prompts, as in every experiment, the first of them held out; None: the world
    )
    overlap: Count = 2  # with db: number of people who rank the answers to each held-out prompt
    enough: Share = 1.0  # with db: share of the rankings, of each kind of prompt, at which the run goes on
    round: Whole = 0  # with db: number by which the labels can be told from those of other rounds

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.people < 2:
            raise InputError(f"people={self.people}: expected at least 2 labelers, who may agree")
        if not 2 <= self.least <= self.most:
            raise InputError(f"least={self.least}, most={self.most}: expected 2 <= least <= most answers to rank")
        if self.db is not None and self.most > _MOST:
            raise InputError(f"most={self.most}: expected at most {_MOST} answers, which a page can show to people")
        if self.db is not None and self.judge.given:
            raise InputError("db and judge: either people or a judge rank the answers; leave out one of them")
        idle: tuple[str, ...] = ("data", "overlap", "enough")
        who, hint = "simulated labelers", "name the store of people by --db"
        if self.db is not None:
            who, idle, hint = "people", ("people",), "leave it out"
        elif self.judge.given:
            who, idle, hint = "a judge", ("people", "overlap", "enough"), "leave it out"
        for name in idle:
            if getattr(self, name) != getattr(Config, name):
                verb = "ranks" if who == "a judge" else "rank"
                raise InputError(f"{name}={getattr(self, name)} has no effect where {who} {verb}: {hint}")


def main(cfg: Config) -> dict[str, float]:
    """Write the rankings; returns {"labeler_agreement": the share of held-out pairs that labelers order alike}.

    It is empty where no two people ranked the same answers. A judge's is {"judge_consistency": the share of held-out
    pairs on which it says the same in both orders}.
    """
    runs.claim(cfg.out, cfg)
    runs.write_config(cfg.out, cfg)
    if cfg.judge.given:
        return {"judge_consistency": compare(cfg)}
    if cfg.db is None:
        rankings = simulate(cfg, sample(cfg))
    else:
        asked = dataclasses.replace(cfg, overlap=Config.overlap, enough=Config.enough, round=Config.round)
        runs.once(keep, asked, answers_folder(cfg))
        rankings = ask(cfg, cfg.db)
    try:
        agreement = labelers.agreement([[row["ranks"] for row in rows] for rows in rankings])
    except InputError as error:
        if cfg.db is None:
            raise
        print(error)
        return {}
    print(f"labelers agree on {100 * agreement:.1f} % of the held-out pairs that both order")
    return {"labeler_agreement": agreement}


# -- answers -----------------------------------------------------------------------------------------------------------


def sample(cfg: Config) -> dict[str, list[Row]]:
    """Sample answers to the prompts of both splits; returns a row {"prompt", "responses", "ended"} for each prompt."""
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    found: dict[str, list[Row]] = {}
    for split in SPLITS:
        rows = prompts_of(cfg, split)
        prompts, counts = pipeline.every_prompt(rows, tokenizer, length=cfg.prompt_length)
        times, _ = draw(cfg, split, len(prompts.index))
        repeated = jax.tree.map(lambda x, times=times: np.repeat(x, times, axis=0), prompts)
        repeated = repeated.replace(noise=np.arange(sum(times)))
        together = alike(cfg, times, prompts.tokens.shape[1])
        parts = [
            rollout.episodes(
                model,
                jax.tree.map(lambda x, numbers=numbers: x[numbers], repeated),
                named_key(cfg.seed, f"rank/{split}/{cfg.skip}"),
                sampling.Config(
                    max_new_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature,
                    eos_id=models.stop_ids(model),
                    group=group,
                ),
                batch=cfg.batch,
                layout=layout,
            )
            for group, numbers in together
        ]
        order = np.argsort(np.concatenate([numbers for _, numbers in together]))
        sampled = jax.tree.map(lambda *rows, order=order: np.concatenate(rows)[order], *parts)
        texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
        answers = zip(texts, sampled.ended.tolist(), strict=True)
        found[split] = []
        for index, k in zip(prompts.index, times, strict=True):
            responses, ended = zip(*itertools.islice(answers, k), strict=True)
            found[split].append({"prompt": rows[int(index)]["prompt"], "responses": responses, "ended": ended})
        print(
            f"{split} prompts: {counts}; {sum(times)} answers, {int(np.sum(~sampled.ended))} of them cut at"
            f" max_new_tokens={cfg.max_new_tokens}"
        )
    return found


def alike(cfg: Config, times: list[int], columns: int) -> list[tuple[int, np.ndarray]]:
    """Answers that are sampled together, by their numbers, and how many of those that follow each other share a prompt.

    Prompts of so many columns that it pays to read each of them once are apart by their number of answers, each of
    which takes a program of its own.
    """
    of = np.repeat(times, times)  # [B], the number of answers to its prompt
    if not cfg.compute.shares(columns, cfg.max_new_tokens, cfg.least):
        return [(int(np.gcd.reduce(of)), np.arange(len(of)))]
    return [(k, np.flatnonzero(of == k)) for k in sorted(set(times))]


def prompts_of(cfg: Config, split: str) -> Rows | list[Row]:
    """The prompts of a split. Data without splits has the held-out prompts first."""
    skip, count = (cfg.skip, cfg.prompts) if split == "train" else (0, cfg.held_out)
    if cfg.data is None:
        spec = f"world:seed={cfg.world},rows={skip + count}"
        return sources.rows(spec, "prompts", data_dir=cfg.data_dir, split=f"{split}[{skip}:]")
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    first = cfg.held_out + skip if split == "train" else 0
    if first >= len(rows):
        raise InputError(f"{cfg.data} has {len(rows)} prompts: none is left after {cfg.held_out} held out, {skip} used")
    return [rows[n] for n in range(first, min(first + count, len(rows)))]


def draw(cfg: Config, split: str, count: int) -> tuple[list[int], random.Random]:
    """The number of answers to each of `count` prompts, and the generator, which goes on to draw their labelers."""
    rng = random.Random(f"{cfg.seed}/{split}")
    return [rng.randint(cfg.least, cfg.most) for _ in range(count)], rng


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a JSON Lines file."""
    runs.write(path, "".join(json.dumps(row) + "\n" for row in rows))


# -- simulated labelers ------------------------------------------------------------------------------------------------


def simulate(cfg: Config, answers: dict[str, list[Row]]) -> list[list[Row]]:
    """Write the rankings of simulated labelers; returns those of each held-out prompt."""
    world = World.generate(cfg.world)
    people = labelers.labelers(cfg.seed, cfg.people)
    for split, rows in answers.items():
        _, rng = draw(cfg, split, len(rows))
        rankings = []
        for row in rows:
            asked, responses = row["prompt"][-1]["content"], row["responses"]
            judges = people if split == "held_out" else [rng.choice(people)]
            rankings.append(
                [
                    {
                        "prompt": row["prompt"],
                        "responses": responses,
                        "ranks": judge.rank(world, asked, responses, cfg.seed),
                        "ratings": [judge.rate(world, asked, text, cfg.seed) for text in responses],
                        "ended": row["ended"],
                        "labeler": judge.id,
                    }
                    for judge in judges
                ]
            )
        write(cfg.out / f"{split}.jsonl", itertools.chain.from_iterable(rankings))
        print(f"{split} prompts: each ranked by {len(rankings[0])} of {len(people)} labelers")
    return rankings


# -- a judge -----------------------------------------------------------------------------------------------------------


def compare(cfg: Config) -> float:
    """Write a judge's rankings; returns the share of held-out pairs on which it says the same in both orders.

    A ranking without a verdict on one of its pairs is left out, and counted.
    """
    judge = judge_lib.load(cfg.judge, parallel.layout(cfg.devices), cfg.compute, cfg.seed)
    assert judge is not None
    consistent = 0.0
    for split, rows in sample(cfg).items():
        rankings: list[judge_lib.Ranking] = []
        parts = [rows[first : first + cfg.batch] for first in range(0, len(rows), cfg.batch)]
        for part in progress.of(parts, f"judging {split} answers"):
            rankings += judge.rank([row["prompt"] for row in part], [row["responses"] for row in part])
        kept = [
            row | {"ranks": ranking.ranks, "labeler": str(cfg.judge)}
            for row, ranking in zip(rows, rankings, strict=True)
            if ranking.ranks is not None
        ]
        pairs = sum(ranking.pairs for ranking in rankings)
        missing = sum(ranking.missing for ranking in rankings)
        swayed = sum(ranking.swayed for ranking in rankings)
        consistent = 1 - swayed / max(pairs - missing, 1)
        print(
            f"{split} prompts: {len(kept)} of {len(rows)} ranked; {missing} of {pairs} pairs without a verdict, whose"
            f" rankings are left out; {100 * consistent:.1f} % of the others alike in both orders"
        )
        if not kept:
            raise InputError(
                f"the judge {cfg.judge} ranked none of the {len(rows)} {split} prompts: expected replies that end"
                " with a line 'Verdict: A', 'Verdict: B' or 'Verdict: tie'"
            )
        write(cfg.out / f"{split}.jsonl", kept)
    return consistent


# -- people ------------------------------------------------------------------------------------------------------------


def answers_folder(cfg: Config) -> Path:
    """The folder in which the answers wait for people."""
    return cfg.out / "answers"


def keep(cfg: Config) -> None:
    """Sample the answers and write them, so that a run that goes on waiting needs neither the model nor the time."""
    for split, rows in sample(cfg).items():
        write(answers_folder(cfg) / f"{split}.jsonl", rows)


def ask(cfg: Config, db: Path) -> list[list[Row]]:
    """Have people rank the answers, wait, and write their rankings; returns those of each held-out prompt."""
    answers = {split: log.read(answers_folder(cfg), f"{split}.jsonl") for split in SPLITS}
    items = {split: [_item(cfg, split, row) for row in rows] for split, rows in answers.items()}
    db.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:

        def put() -> Asked:
            store = opened.enter_context(Store(db))
            guidelines.begin(store, cfg.data or f"world:seed={cfg.world}")
            return Asked(store, items)

        asked = hosts.first_does(put)
        if asked:  # None on all processes but the first
            print(f"people rank them on the pages of: scripts/people.sh --db {db} --prompts 0", flush=True)
        while not hosts.first_decides(lambda: asked is not None and asked.ready(cfg.enough)):
            pass
        rows = hosts.first_does(lambda: asked.rows() if asked else {}) or {}
        for split in SPLITS:
            write(cfg.out / f"{split}.jsonl", rows.get(split, []))
        hosts.first_does(lambda: asked.retire() if asked else None)
    held_out = log.read(cfg.out, "held_out.jsonl")
    same = itertools.groupby(held_out, key=lambda row: (row["prompt"], row["responses"]))
    return [list(group) for _, group in same]


def _item(cfg: Config, split: str, row: Row) -> Item:
    """The item by which people are asked about the answers of a row."""
    return Item(
        prompt=row["prompt"],
        responses=tuple(row["responses"]),
        models=(str(cfg.init),) * len(row["responses"]),
        ended=tuple(row["ended"]),
        round=cfg.round,
        overlap=cfg.overlap if split == "held_out" else 1,
    )


if __name__ == "__main__":
    cli.run(main, Config())
