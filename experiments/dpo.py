"""DPO: the policy learns from the rankings directly, without a reward model and without sampling.

The loss is over all pairs of each prompt's ranked answers (arXiv:2305.18290), from the same rankings as `reward`, or
with `--virtue` from the ratings of one virtue. `--algorithm.loss` is one of ipo, robust, exo and hinge, too; `simpo`,
`orpo` and `slic` are forks without a reference model, and `kto` is one that learns from thumbs.

Run:     python -m experiments.dpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  reward
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.928 at 1.02 nats, loss on held-out text 0.613 -> 0.755
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import optim
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Rows
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive, Rate, Whole
from rlhf_jax.types import TrainState, Virtue, named_key


@dataclasses.dataclass(frozen=True)
class Offline(runs.Config):
    """The settings of learning from labelled answers, of whichever kind the labels are."""

    init: Path = Path("runs/sft/model")  # model directory of the policy and of the frozen reference model
    data: str = "runs/rank/train.jsonl"  # rankings to learn from
    length: Count = 36  # most tokens of prompt and answer; prompts with a longer answer are refused
    batch: Count = 16  # prompts a step, over all devices
    epochs: Count = 1  # passes over the data
    lr: Positive = 3e-4  # peak learning rate
    schedule: optim.Schedule = "cosine"  # decay of the learning rate: cosine to 10 %, linear to 0, or none
    warmup: Whole = 8  # optimiser steps of linear learning-rate warm-up
    dropout: Rate = 0.0  # dropout rate of residual branches
    algorithm: dpo_lib.Config = dpo_lib.Config(beta=0.2)
    lora: lora_lib.Config = lora_lib.Config()


@dataclasses.dataclass(frozen=True)
class Config(Offline):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/dpo")  # run directory; the model goes to its folder "model"
    virtue: Virtue | None = None  # learn from the ratings of this virtue, 1 to 7; None: from the ranks


def read(cfg: Config, tokenizer: tokenizer_lib.Tokenizer) -> tuple[Rows, pipeline.Batches]:
    """The rankings that `cfg` names, and batches of them."""
    rows = sources.rows(cfg.data, "rankings", data_dir=cfg.data_dir)
    return rows, pipeline.rankings(
        rows,
        tokenizer,
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
        epochs=cfg.epochs,
        virtue=cfg.virtue,
        shares=cfg.compute.shares,
    )


def build(
    cfg: Offline, config: models.Config, layout: parallel.Layout, steps: int, train_step: Callable = dpo_lib.train_step
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser for `steps` steps, and the compiled train step, which takes (state, base, batch, reference)."""
    tx = optim.adamw(optim.schedule(cfg.schedule, cfg.lr, steps, cfg.warmup), skip_bad=cfg.skip_bad > 0)
    logprobs_fn = models.logprobs_fn(dataclasses.replace(config, dropout=cfg.dropout))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            train_step,
            logprobs_fn=on(logprobs_fn),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    return tx, layout.step(step, donate=(0,))


def main(
    cfg: Offline,
    train_step: Callable = dpo_lib.train_step,
    loss: str = "loss/dpo",
    with_reference: bool = True,
    read: Callable[[Any, tokenizer_lib.Tokenizer], tuple[Rows, pipeline.Batches]] = read,
    keys: str = "dpo",
) -> TrainState:
    """Train, and write the run directory; returns the final state on the host.

    `train_step` may be that of another algorithm, with its settings, whose metric `loss` is shown; it takes no
    reference where `with_reference` is False. `read` opens its data, and `keys` begins the names of its random keys.
    """
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, cfg.length)
    rows, batches = read(cfg, models.tokenizer_of(model, cfg.control_tokens))
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps

    tx, step_fn = build(cfg, model.config, layout, steps, train_step)
    trained, frozen = lora_lib.split(model.params, cfg.lora, named_key(cfg.seed, f"{keys}/lora"))
    # Adapters that change nothing yet are the reference model, on the same base.
    references = [layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(trained)))] if with_reference else []
    state = optim.init(trained, tx, named_key(cfg.seed, keys))
    base = layout.state(cfg.compute.freeze(frozen))
    del trained, frozen
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=(loss, "reward/accuracy", "kl/reference"))
    with runs.Run(cfg, layout, state, {"data": batches}, steps, limits) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, base, layout.rows(next(run.streams["data"])), *references)
            run.record(step, state, metrics)
        state = layout.get(state)
        model = dataclasses.replace(model, params=lora_lib.merge(layout.get(base), state.params, cfg.lora))
        models.save(model, model.params, cfg.out / "model")
        runs.share(cfg.out / "model")
        prompts = [row["prompt"] for row in itertools.islice(rows, 8)]
        key = named_key(cfg.seed, f"{keys}/samples")
        run.samples(steps, rollout.say(model, prompts, key, length=cfg.length, layout=layout))
    plots.curves(
        cfg.out,
        {
            "loss": [loss],
            "training accuracy (share of pairs)": ["reward/accuracy"],
            "margin of implicit rewards": ["reward/margin"],
            "implicit reward of good and bad answers": ["reward/good", "reward/bad"],
            "reference point (nats)": ["kl/reference"],
        },
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
