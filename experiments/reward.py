"""Reward model: a scalar that orders answers as people ranked them.

As InstructGPT (arXiv:2203.02155): Bradley-Terry over all pairs of K = 4..9 ranked answers, with a prompt's pairs in one
batch element, one epoch, cosine decay to 10 %. Training starts from the fine-tuned model with a new head. Afterwards a
gain and bias normalise the scores of the training answers to mean 0 and standard deviation 1.

With `--virtue` it learns from the ratings of one virtue in place of the ranks; so there can be a model for each. With
`--algorithm.loss cost` it is a cost model, as in Safe RLHF (arXiv:2310.12773): larger is worse, and above 0 is harmful.

Run:     python -m experiments.reward --init runs/sft/model --data runs/rank/train.jsonl
Parent:  sft
Result:  in the quickstart, seed 0: 72.5 % of held-out comparisons, where two labelers agree on 73.8 %
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.analysis import calibration
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Row
from rlhf_jax.devices import hosts, parallel, progress
from rlhf_jax.models import heads
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import tokens
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Rate, Seed
from rlhf_jax.types import InputError, Params, Rankings, Virtue, named_key

READ = 32  # rows that are read at once for the tables
COLUMNS, SHOWN = ("prompt", "response", "rank", "score"), 4  # of the table of samples, and its rankings


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/reward")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory to start from
    data: str = "runs/rank/train.jsonl"  # rankings to learn from
    held_out: str | None = "runs/rank/held_out.jsonl"  # rankings to measure accuracy on; None: measure nothing
    virtue: Virtue | None = None  # learn from the ratings of this virtue, 1 to 7; None: from the ranks
    length: Count = 36  # most tokens of prompt and answer; prompts with a longer answer are refused
    batch: Count = 16  # prompts a step, over all devices
    epochs: Count = 1  # passes over the rankings
    lr: Positive = 5e-4  # peak learning rate; cosine decay to 10 % of it
    dropout: Rate = 0.0  # dropout rate of residual branches
    weight_decay: NonNegative = 0.0  # decoupled weight decay of matrices
    algorithm: reward_lib.Config = reward_lib.Config()
    lora: lora_lib.Config = lora_lib.Config()
    head_seed: Seed | None = None  # seed of the new head, one for models that are to be averaged; None: seed
    token_samples: Count = 48  # rankings, held out if there are any, whose answers are recorded token by token
    normalize_first: bool = False  # also normalise scores before training, as Ziegler et al. (arXiv:1909.08593)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.costs and self.virtue is None:
            raise InputError("loss=cost learns which answers are harmful from ratings: add --virtue harmless")
        if self.costs and self.normalize_first:
            raise InputError("normalize_first has no effect on a cost model, whose 0 has a meaning: leave it out")

    @property
    def costs(self) -> bool:
        """Whether the model is a cost model, whose scores are not normalised."""
        return self.algorithm.loss == "cost"


def record(out: Path, pairs: calibration.Pairs, ties: int) -> float:
    """Write the calibration of scores that are not normalised to calibration.json and .png; returns the accuracy.

    `ties` is the number of tied pairs, which no scores can order correctly; it is reported beside the accuracy.
    """
    error, reliability = calibration.reliability(pairs.margin)
    panels = {
        f"accuracy by confidence (error {error:.3f})": reliability,
        "accuracy by margin of scores": calibration.binned(np.abs(pairs.margin), pairs.margin),
        "accuracy by extra tokens of the preferred": calibration.binned(pairs.longer, pairs.margin),
    }
    accuracy = float(calibration.correct(pairs.margin).mean())
    count = len(pairs.margin)
    result: dict = {"accuracy": accuracy, "expected_calibration_error": error, "pairs": count, "ties": ties}
    result |= {label: [one._asdict() for one in bins] for label, bins in panels.items()}
    runs.write(out / "calibration.json", json.dumps(result, indent=2) + "\n")
    lines = {label: {"held out": [(one.at, one.accuracy) for one in bins]} for label, bins in panels.items()}
    plots.lines(out / "calibration.png", lines, x="")
    best = f"; {ties} more are ties: of all, at most {100 * count / (count + ties):.1f} % can be right" if ties else ""
    print(f"accuracy on held-out comparisons: {100 * accuracy:.1f} % of {count}, where chance has 50 %{best}")
    return accuracy


def table(rows: Iterable[Row], tokenizer: tokenizer_lib.Tokenizer, running_fn: Callable, length: int) -> list:
    """A table of the responses in `rows` with prompt, rank and score; text beyond `length` tokens is not scored.

    `running_fn` gives the score of each row through each of its columns. Of these, `value` has those of the response.
    """
    rows = list(rows)
    prompts, responses = [row["prompt"] for row in rows], [row["responses"] for row in rows]
    ended = [row.get("ended", [True] * len(row["responses"])) for row in rows]
    starts, ends = tokenizer_lib.render(tokenizer, prompts, responses, ended)
    pairs = [(start, end) for start, each in zip(starts, ends, strict=True) for end in each]
    count = -(-len(pairs) // READ) * READ
    ids = np.full((count, length), tokenizer_lib.pad_id(tokenizer))
    mask = np.zeros(ids.shape, bool)
    for b, (start, end) in enumerate(pairs):
        sequence = np.append(start, end)[:length]
        ids[b, : len(sequence)], mask[b, : len(sequence)] = sequence, True
    parts = []
    with progress.bar(count // READ, what="token by token", unit="batch", delay=10.0) as shown:
        for first in range(0, count, READ):
            parts.append(running_fn(ids[first : first + READ], mask[first : first + READ]))
            shown.update()
    running, known = np.concatenate(parts), dict[int, str]()
    answers = [
        (n, row["prompt"], *pair, said)
        for n, (row, told) in enumerate(zip(rows, ended, strict=True))
        for *pair, said in zip(row["responses"], row["ranks"], told, strict=True)
    ]
    return [
        {
            "ranking": n,
            "prompt": tokenizer_lib.prompt_text(prompt),
            "response": text,
            "rank": rank,
            "score": float(running[b, mask[b].sum() - 1]),
            "ended": said,
            "prompt_tokens": tokens.spell(tokenizer, ids[b, : len(start)], known),
            "tokens": tokens.spell(tokenizer, ids[b, len(start) :][mask[b, len(start) :]], known),
            "value": running[b, len(start) :][mask[b, len(start) :]],
        }
        for b, ((n, prompt, text, rank, said), (start, _)) in enumerate(zip(answers, pairs, strict=True))
    ]


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser for `steps` steps, and the compiled train step (state, base, batch) and scores (params, batch)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay, skip_bad=cfg.skip_bad > 0)
    with_dropout = heads.score_fn(dataclasses.replace(config, dropout=cfg.dropout))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            reward_lib.train_step,
            score_fn=on(with_dropout),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    scores = functools.partial(reward_lib.scores, score_fn=heads.score_fn(config), buckets=cfg.algorithm.buckets)
    return tx, layout.step(step, donate=(0,)), layout.step(scores)


def split(cfg: Config, config: models.Config, policy: Params) -> tuple[Params, Params]:
    """The trained parameters of a reward model that starts from a language model, and the frozen base weights."""
    seed = cfg.seed if cfg.head_seed is None else cfg.head_seed
    params = heads.from_policy(policy, config, named_key(seed, "reward/head"))
    trained, frozen = lora_lib.split(params, cfg.lora, named_key(cfg.seed, "reward/lora"))
    return trained, cfg.compute.freeze(frozen)


def main(cfg: Config) -> dict[str, float]:
    """Train, and write the run directory; returns {"accuracy": the share of held-out pairs ordered correctly}."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, cfg.length)
    tokenizer = models.tokenizer_of(model, cfg.control_tokens)
    source = functools.partial(sources.rows, kind="rankings", data_dir=cfg.data_dir)
    read = functools.partial(
        pipeline.rankings,
        tokenizer=tokenizer,
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
        virtue=cfg.virtue,
        shares=cfg.compute.shares,
    )
    train, held_out = source(cfg.data), source(cfg.held_out) if cfg.held_out else None
    batches = read(train, epochs=cfg.epochs)
    held_out_batches = read(held_out, epochs=1) if held_out else None
    print(f"{cfg.data}: {batches.counts}")
    if held_out_batches:
        print(f"{cfg.held_out}: {held_out_batches.counts}")
    steps = batches.steps

    tx, step_fn, scores = build(cfg, model.config, layout, steps)
    trained, frozen = split(cfg, model.config, model.params)
    base = layout.state(frozen)
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters

    def score_all(trained: Params, batches: pipeline.Batches[Rankings]) -> tuple[np.ndarray, ...]:
        """The score, rank and length in tokens of all responses [B, K], on the host."""
        params = lora_lib.attach(base, layout.state(trained), cfg.lora)
        parts = []
        with progress.bar(batches.steps, what="scoring", unit="batch", delay=10.0) as shown:
            for batch in batches:
                score = layout.gather(scores(params, layout.rows(batch)))
                parts.append((score, *hosts.join((batch.rank, batch.mask.sum(axis=2, dtype=np.int32)))))
                shown.update()
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))

    def normalize(trained: Params) -> Params:
        """The parameters whose scores have mean 0 and standard deviation 1 on the training answers; costs stay."""
        if cfg.costs:
            return trained
        score, rank, _ = score_all(trained, read(train, epochs=1))
        return reward_lib.normalize(trained, float(score[rank >= 0].mean()), float(score[rank >= 0].std()))

    state = optim.init(normalize(trained) if cfg.normalize_first else trained, tx, named_key(cfg.seed, "reward"))
    del trained, frozen  # they would fill the memory beside what is made of them
    loss_name = f"loss/{cfg.algorithm.loss}"
    limits = runs.Limits(show=(loss_name, "reward/accuracy"))
    with runs.Run(cfg, layout, state, {"data": batches}, steps, limits) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, base, layout.rows(next(run.streams["data"])))
            run.record(step, state, metrics)
        params = lora_lib.merge(layout.get(base), normalize(layout.get(state).params), cfg.lora)
        running_fn = jax.jit(models.bind(heads.ScalarModel(model.config)))
        read_rows = lambda tokens, mask: hosts.to_host(running_fn(params, tokens, mask))
        judged = table(itertools.islice(held_out or train, cfg.token_samples), tokenizer, read_rows, cfg.length)
        run.samples(steps, [{name: row[name] for name in COLUMNS} for row in judged if row["ranking"] < SHOWN])
        run.tokens(steps, [{"part": "ranked", **row} for row in judged])
    models.save(model, params, cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(cfg.out, {"loss (nats)": [loss_name], "training accuracy (share of pairs)": ["reward/accuracy"]})
    if held_out_batches is None:
        return {}
    score, rank, length = score_all(layout.get(state).params, held_out_batches)
    score = -score if cfg.costs else score  # the order of the ranks: the less harmful answer is the better
    return {"accuracy": record(cfg.out, calibration.pairs(score, rank, length), calibration.ties(rank))}


if __name__ == "__main__":
    cli.run(main, Config())
