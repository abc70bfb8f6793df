"""KTO: the policy learns from thumbs, responses labelled good or bad one by one (arXiv:2402.01306).

The thumbs that people gave in a chat are such data (`--data people:PATH`), and {"prompt", "completion", "label"} in a
file.

Run:     python -m experiments.kto --init runs/sft/model
Parent:  dpo
Result:  from a quickstart's models, seed 0, and 4,000 thumbs of the world's answers: gold 0.469 -> 0.875 at 0.87 nats,
         loss on held-out text 0.616 -> 0.772
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
from rlhf_jax.algorithms import kto as kto_lib
from rlhf_jax.algorithms import optim
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive, Rate, Whole
from rlhf_jax.types import TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/kto")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy and of the frozen reference model
    data: str = "world:rows=4000"  # thumbs to learn from: the world, a file, or people:PATH
    length: Count = 36  # most tokens of prompt and answer; longer ones are refused
    batch: Count = 32  # responses a step, over all devices
    epochs: Count = 1  # passes over the thumbs
    lr: Positive = 3e-4  # peak learning rate; cosine decay to 10 % of it
    warmup: Whole = 8  # optimiser steps of linear learning-rate warm-up
    dropout: Rate = 0.0  # dropout rate of residual branches
    algorithm: kto_lib.Config = kto_lib.Config(beta=0.2)
    lora: lora_lib.Config = lora_lib.Config()


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser for `steps` steps, and the compiled train step, which takes (state, base, batch, reference)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps, cfg.warmup), skip_bad=cfg.skip_bad > 0)
    logprobs_fn = models.logprobs_fn(dataclasses.replace(config, dropout=cfg.dropout))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            kto_lib.train_step,
            logprobs_fn=on(logprobs_fn),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    return tx, layout.step(step, donate=(0,))


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory; returns the final state on the host."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, length=cfg.length)
    rows = sources.rows(cfg.data, "thumbs", data_dir=cfg.data_dir)
    batches = pipeline.thumbs(
        rows,
        models.tokenizer_of(model, cfg.control_tokens),
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
        epochs=cfg.epochs,
    )
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps

    tx, step_fn = build(cfg, model.config, layout, steps)
    trained, frozen = lora_lib.split(model.params, cfg.lora, named_key(cfg.seed, "kto/lora"))
    # Adapters that change nothing yet are the reference model, on the same base.
    reference = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(trained)))
    state = optim.init(trained, tx, named_key(cfg.seed, "kto"))
    base = layout.state(cfg.compute.freeze(frozen))
    del trained, frozen
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=("loss/kto", "kl/reference"))
    with runs.Run(cfg, layout, state, {"data": batches}, steps, limits) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, base, layout.rows(next(run.streams["data"])), reference)
            run.record(step, state, metrics)
        state = layout.get(state)
        model = dataclasses.replace(model, params=lora_lib.merge(layout.get(base), state.params, cfg.lora))
        models.save(model, model.params, cfg.out / "model")
        runs.share(cfg.out / "model")
        prompts = [row["prompt"] for row in itertools.islice(rows, 8)]
        key = named_key(cfg.seed, "kto/samples")
        run.samples(steps, rollout.say(model, prompts, key, length=cfg.length, layout=layout))
    plots.curves(
        cfg.out,
        {
            "loss": ["loss/kto"],
            "implicit reward of good and bad answers": ["reward/good", "reward/bad"],
            "reference point (nats)": ["kl/reference"],
        },
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
