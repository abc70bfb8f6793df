"""Instruction tuning: a model learns tasks phrased as instructions, and is tested on clusters that it never sees.

As FLAN (arXiv:2109.01652): tasks in clusters, up to ten templates each, examples-proportional mixing, packed rows, loss
on the answers; clusters that are held out, and those that resemble them, are not learnt from. With examples before the
question and with chains of thought (FLAN v2, arXiv:2301.13688) by --mixture.forms. `--tasks` names collections (world,
flan), clusters, tasks, or files of questions. While it trains, the held-out rows of unseen clusters and of those that
are learnt are asked, by the likelihood of the options (results.json, curves.png). FLAN's own settings:
experiments/papers/flan.py.

Run:     python -m experiments.instruct --init runs/pretrain/model --held-out entailment comparison
Parent:  sft
Result:  docs/instruct.md; SmolLM2-135M, 200 steps on seven real tasks: unseen sentiment 0.58 -> 0.42, facts that are
         learnt 0.51 -> 0.38, 100 questions each (docs/evaluation.md)
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.data.tasks import catalog
from rlhf_jax.data.tasks import mixture as mixture_lib
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.evaluation import tasks as tasks_lib
from rlhf_jax.evaluation.tasks import Result
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Rate, Whole
from rlhf_jax.types import Params, TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the tasks of the assistant world on two CPU cores."""

    out: Path = Path("runs/instruct")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/pretrain/model")  # model directory to start from
    tasks: tuple[str, ...] = ("world",)  # collections, clusters, tasks or files of questions
    held_out: tuple[str, ...] = ("entailment",)  # clusters of these tasks to be tested on, unseen
    held_out_every: Whole = 100  # steps between tests; 0: before the first step and after the last alone
    questions: Count = 64  # held-out rows of each task to be tested on
    mixture: mixture_lib.Config = mixture_lib.Config()
    length: Count = 128  # tokens in a row, into which several questions are packed
    # Most tokens of a question, with the examples before it, and of an answer; None: as many as fit. Longer ones lose
    # examples, or are left out.
    prompt_length: Count | None = None
    target_length: Count | None = None
    batch: Count = 16  # rows a step, over all devices
    steps: Count = 600  # optimiser steps
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: without clipping by the global norm
    lr: Positive = 1e-3  # peak learning rate
    schedule: optim.Schedule = "cosine"  # to 10 % of the peak, or linear (to 0), or constant
    warmup: Whole = 0  # optimiser steps of linear warm-up
    dropout: Rate = 0.0  # dropout rate of residual branches
    weight_decay: NonNegative = 0.0  # decoupled weight decay of matrices
    lora: lora_lib.Config = lora_lib.Config()


def build(cfg: Config, config: models.Config, layout: parallel.Layout) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser, and the compiled train step (state, base, batch)."""
    schedule = optim.schedule(cfg.schedule, cfg.lr, cfg.steps, cfg.warmup)
    optimizer = {"adamw": optim.adamw, "adafactor": optim.adafactor}[cfg.optimizer]
    tx = optimizer(schedule, weight_decay=cfg.weight_decay, skip_bad=cfg.skip_bad > 0)
    logprobs_fn = models.logprobs_fn(dataclasses.replace(config, dropout=cfg.dropout))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            sft.train_step,
            logprobs_fn=on(logprobs_fn),
            tx=tx,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    return tx, layout.step(step, donate=(0,))


def split_tasks(cfg: Config) -> mixture_lib.Split:
    """The tasks to learn from and those to be tested on; prints which are neither."""
    split = mixture_lib.leave_out(catalog.select(cfg.tasks), cfg.held_out)
    if split.left_out:
        print(f"left out, since they are like what is held out: {', '.join(task.name for task in split.left_out)}")
    if split.templates:
        print(f"templates left out, since held-out tasks have them too: {split.templates}")
    return split


class Tests:
    """The held-out questions of unseen clusters and of those that are learnt, asked of a model as it trains."""

    def __init__(self, cfg: Config, model: models.Model, split: mixture_lib.Split, layout: parallel.Layout):
        asked = tasks_lib.Config(
            by="read",
            limit=cfg.questions,
            length=cfg.length,
            template=None,
            chat=cfg.mixture.chat,
        )
        self._unseen = {task.name for task in split.held_out}
        self._evaluation = tasks_lib.Evaluation(
            dataclasses.replace(model, params=None),  # which come with each test
            (*split.held_out, *split.train),
            asked,
            layout=layout,
            data_dir=cfg.data_dir,
        )
        for what, count in self._evaluation.left_out.items():
            print(f"tests: {count} {what}")

    def __call__(self, params: Params) -> list[Result]:
        """How each task is answered with these parameters, which are placed."""
        return self._evaluation(params)

    def metrics(self, answered: Sequence[Result]) -> dict[str, float]:
        """The mean accuracy of unseen and of seen tasks, and of each unseen cluster."""
        groups: dict[str, list[float]] = {"accuracy/unseen": [], "accuracy/seen": []}
        for found in answered:
            unseen = found.task in self._unseen
            groups["accuracy/unseen" if unseen else "accuracy/seen"].append(found.score.value)
            if unseen:
                groups.setdefault(f"unseen/{found.cluster}", []).append(found.score.value)
        return {name: float(np.mean(values)) for name, values in groups.items() if values}

    def report(self, before: Sequence[Result], after: Sequence[Result]) -> list[dict]:
        """A row for each task: what it was, and is, with 95 % intervals, and what a guess would be."""
        return [
            {
                "task": then.task,
                "cluster": then.cluster,
                "unseen": then.task in self._unseen,
                "questions": len(then.answers),
                "chance": then.figures["chance"],
                "before": first.score.value,
                "before_interval": [first.score.low, first.score.high],
                "after": then.score.value,
                "after_interval": [then.score.low, then.score.high],
                "error": then.score.error,
            }
            for first, then in zip(before, after, strict=True)
        ]


def table(rows: list[dict]) -> str:
    """The rows of a report as a table in Markdown, accuracies with 95 % intervals."""
    lines = ["| cluster | task | | questions | chance | before | after |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        before, after = (
            "{:.2f} ({:.2f} to {:.2f})".format(row[when], *row[f"{when}_interval"]) for when in ("before", "after")
        )
        lines.append(
            f"| {row['cluster']} | {row['task']} | {'unseen' if row['unseen'] else ''} | {row['questions']} |"
            f" {row['chance']:.2f} | {before} | {after} |"
        )
    return "\n".join(lines)


def start(cfg: Config, tx: optax.GradientTransformation, params: Params) -> tuple[TrainState, Params]:
    """The state before the first step, and the frozen base weights (empty without LoRA)."""
    trained, frozen = lora_lib.split(params, cfg.lora, named_key(cfg.seed, "instruct/lora"))
    return optim.init(trained, tx, named_key(cfg.seed, "instruct")), cfg.compute.freeze(frozen)


def main(cfg: Config) -> dict[str, list[dict]]:
    """Train, and write the run directory; returns the results, a row for each task, under "tasks"."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    split = split_tasks(cfg)
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, cfg.length)
    tokenizer = models.tokenizer_of(model, cfg.control_tokens)
    mixed = mixture_lib.open_mixture(split.train, cfg.mixture, seed=cfg.seed, data_dir=cfg.data_dir)
    print(f"mixture: {mixed}")
    sizes = mixture_lib.Sizes(length=cfg.length, batch=cfg.batch, prompt=cfg.prompt_length, target=cfg.target_length)
    stream = mixture_lib.Stream(mixed, tokenizer, sizes)
    tests = Tests(cfg, model, split, layout)
    before = tests(layout.state(model.params))

    tx, step_fn = build(cfg, model.config, layout)
    state, frozen = start(cfg, tx, model.params)
    base = layout.state(frozen)
    del frozen
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=("loss/next_token", "accuracy/unseen", "accuracy/seen"))
    with runs.Run(cfg, layout, state, {"data": stream}, cfg.steps, limits) as run:
        state, after = run.state, None
        for step in run:
            state, metrics = step_fn(state, base, layout.rows(hosts.share(next(run.streams["data"]))))
            after = None  # which was before this step
            if step == cfg.steps or (cfg.held_out_every and step % cfg.held_out_every == 0):
                after = tests(lora_lib.attach(base, state.params, cfg.lora))
                metrics |= layout.state(tests.metrics(after))
            run.record(step, state, metrics)
        print(f"mixture: {mixture_lib.counts(run.streams['data'])}")
        rows = tests.report(before, after or tests(lora_lib.attach(base, state.params, cfg.lora)))
        state = layout.get(state)
        model = dataclasses.replace(model, params=lora_lib.merge(layout.get(base), state.params, cfg.lora))
        models.save(model, model.params, cfg.out / "model")
        runs.share(cfg.out / "model")
    if hosts.first():
        print(table(rows))
    runs.write(cfg.out / "results.json", json.dumps({"tasks": rows}, indent=2) + "\n")
    unseen = [f"unseen/{cluster}" for cluster in cfg.held_out]
    plots.curves(
        cfg.out,
        {
            "accuracy, mean over tasks (0 to 1)": ["accuracy/unseen", "accuracy/seen"],
            "accuracy on unseen clusters (0 to 1)": unseen,
            "next-token loss on answers (nats)": ["loss/next_token"],
        },
    )
    return {"tasks": rows}


if __name__ == "__main__":
    cli.run(main, Config())
