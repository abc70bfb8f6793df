"""DPO: the policy learns from the rankings directly, without a reward model and without sampling.

The loss is over all pairs of each prompt's ranked answers (arXiv:2305.18290), from the same rankings as `reward`, or
with `--virtue` from the ratings of one virtue. `--algorithm.loss` is one of ipo, robust, exo and hinge, too; `simpo`,
`orpo` and `slic` are forks without a reference model.

Run:     python -m experiments.dpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  reward
Result:  from the quickstart's models, seed 0: gold 0.493 -> 0.939 at 0.89 nats, loss on held-out text 0.610 -> 0.742
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import optim
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive, Rate, Whole
from rlhf_jax.types import TrainState, Virtue, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/dpo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy and of the frozen reference model
    data: str = "runs/rank/train.jsonl"  # rankings to learn from
    virtue: Virtue | None = None  # learn from the ratings of this virtue, 1 to 7; None: from the ranks
    length: Count = 36  # most tokens of prompt and answer; prompts with a longer answer are refused
    batch: Count = 16  # prompts a step, over all devices
    epochs: Count = 1  # passes over the rankings
    lr: Positive = 3e-4  # peak learning rate; cosine decay to 10 % of it
    warmup: Whole = 8  # optimiser steps of linear learning-rate warm-up
    dropout: Rate = 0.0  # dropout rate of residual branches
    algorithm: dpo_lib.Config = dpo_lib.Config(beta=0.2)
    lora: lora_lib.Config = lora_lib.Config()


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int, train_step: Callable = dpo_lib.train_step
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser for `steps` steps, and the compiled train step, which takes (state, base, batch, reference)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps, cfg.warmup), skip_bad=cfg.skip_bad > 0)
    logprobs_fn = models.logprobs_fn(dataclasses.replace(config, dropout=cfg.dropout))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            train_step,
            logprobs_fn=on(logprobs_fn),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
        ),
    )
    return tx, layout.step(step, donate=(0,))


def main(
    cfg: Config, train_step: Callable = dpo_lib.train_step, loss: str = "loss/dpo", with_reference: bool = True
) -> TrainState:
    """Train, and write the run directory; returns the final state on the host.

    `train_step` may be that of another algorithm, with its settings, whose metric `loss` is shown; it takes no
    reference where `with_reference` is False.
    """
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, length=cfg.length)
    rows = sources.rows(cfg.data, "rankings", data_dir=cfg.data_dir)
    batches = pipeline.rankings(
        rows,
        models.tokenizer_of(model, cfg.control_tokens),
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
        epochs=cfg.epochs,
        virtue=cfg.virtue,
        shares=cfg.compute.shares,
    )
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps

    tx, step_fn = build(cfg, model.config, layout, steps, train_step)
    trained, frozen = lora_lib.split(model.params, cfg.lora, named_key(cfg.seed, "dpo/lora"))
    # Adapters that change nothing yet are the reference model, on the same base.
    references = [layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(trained)))] if with_reference else []
    state = optim.init(trained, tx, named_key(cfg.seed, "dpo"))
    base = layout.state(cfg.compute.freeze(frozen))
    del trained, frozen
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=(loss, "reward/accuracy"))
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
        key = named_key(cfg.seed, "dpo/samples")
        run.samples(steps, rollout.say(model, prompts, key, length=cfg.length, layout=layout))
    plots.curves(
        cfg.out,
        {
            "loss (nats)": [loss],
            "training accuracy (share of pairs)": ["reward/accuracy"],
            "margin of implicit rewards": ["reward/margin"],
        },
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
