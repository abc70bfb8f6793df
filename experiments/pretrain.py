"""Pretraining: a GPT learns to predict raw text.

Run:     python -m experiments.pretrain --data world:rows=60000 --steps 2000
Parent:  none
Result:  in the quickstart, seed 0: loss on held-out text 0.606 nats a token, gold 0.249
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.data import pipeline, sources, tokenizer
from rlhf_jax.data.rows import Rows
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import checkpoint, cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Whole
from rlhf_jax.types import Tokens, TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/pretrain")  # run directory; the model goes to its folder "model"
    data: str = "world:rows=60000"  # source of text: the world, a .jsonl or .txt file, or a TFDS name
    # Source of text to measure the loss on; None: the held-out split of the world, if `data` is the world.
    held_out: str | None = None
    held_out_every: Whole = 100  # steps between losses on held-out text; 0: never
    init: Path | None = None  # model directory to continue from; None starts from random weights
    preset: str = "llama-mini"  # architecture of a new model, a name of rlhf_jax.models.PRESETS; unused with --init
    vocab_size: Count = 1280  # tokens of the BPE tokenizer trained for a new model; unused with --init
    length: Count = 64  # tokens in a row; several documents are packed into each row
    batch: Count = 16  # rows of text a step, over all devices
    steps: Count = 2000  # optimiser steps
    lr: Positive = 3e-3  # peak learning rate; cosine decay to 10 % of it
    warmup: Whole = 60  # optimiser steps of linear learning-rate warm-up
    weight_decay: NonNegative = 0.1  # decoupled weight decay of matrices
    saves: checkpoint.Config = checkpoint.Config(every=500)


def new_model(cfg: Config, rows: Rows) -> models.Model:
    """A model of the preset's architecture with random weights, and a tokenizer trained on the first documents."""
    texts = [row["text"] for row in itertools.islice(rows, 20_000)]
    with tempfile.TemporaryDirectory() as scratch:  # all processes train the same tokenizer, and the first one keeps it
        folder = cfg.out / "tokenizer" if hosts.first() else Path(scratch)
        tok = tokenizer.train(texts, cfg.vocab_size, folder)
    config = dataclasses.replace(models.preset(cfg.preset), vocab_size=len(tok), compute=cfg.compute)
    module = models.Transformer(config)
    ones = jnp.ones((1, 2), jnp.int32)
    params = jax.jit(module.init)(named_key(cfg.seed, "pretrain/init"), ones, ones)["params"]
    return models.Model(config, params, tok, models.bind(module))


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, the compiled train step (state, batch), and the held-out loss (params, batches)."""
    schedule = optim.cosine(cfg.lr, cfg.steps, cfg.warmup)
    tx = optim.adamw(schedule, weight_decay=cfg.weight_decay, skip_bad=cfg.skip_bad > 0)
    logprobs_fn = models.logprobs_fn(config)
    step = functools.partial(
        sft.train_step,
        logprobs_fn=logprobs_fn,
        tx=tx,
        microbatches=cfg.devices.microbatches,
        balance=models.balance_weight(cfg.balance, config),
    )
    held_out_loss = functools.partial(sft.held_out_loss, logprobs_fn=logprobs_fn)
    return tx, layout.step(step, donate=(0,)), layout.step(held_out_loss)


def read_held_out(cfg: Config, tok: tokenizer.Tokenizer) -> Tokens | None:
    """All batches of held-out text, stacked on a leading axis; None if there is none, or if it is never looked at."""
    if not cfg.held_out_every:
        return None
    rows = sources.held_out(cfg.held_out, cfg.data, "text", data_dir=cfg.data_dir)
    if rows is None:
        print("no held-out text: name some by --held-out to see the loss on it")
        return None
    batches = pipeline.text(rows, tok, length=cfg.length, batch=cfg.batch, seed=None, epochs=1)
    print(f"held out: {batches.counts}")
    return pipeline.stack(batches)


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory; returns the final state on the host."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    rows = sources.rows(cfg.data, "text", data_dir=cfg.data_dir)
    layout = parallel.layout(cfg.devices)
    load = functools.partial(models.load, compute=cfg.compute, place=layout.sharding)
    model = load(cfg.init) if cfg.init else new_model(cfg, rows)
    models.check_length(model.config, cfg.length)
    tok = models.tokenizer_of(model, cfg.control_tokens)
    batches = pipeline.text(rows, tok, length=cfg.length, batch=cfg.batch, seed=cfg.seed)
    print(f"{cfg.data}: {batches.counts}")
    held_out = read_held_out(cfg, tok)
    print(f"{sum(x.size for x in jax.tree.leaves(model.params)):,} parameters, {jax.device_count()} devices")

    tx, step_fn, held_out_loss = build(cfg, model.config, layout)
    held_out = layout.rows(held_out, rows_axis=1)
    state = optim.init(model.params, tx, named_key(cfg.seed, "pretrain"))
    limits = runs.Limits(show=("loss/next_token", "loss/held_out"))
    with runs.Run(cfg, layout, state, {"data": batches}, cfg.steps, limits) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, layout.rows(next(run.streams["data"])))
            if held_out is not None and ((step - 1) % cfg.held_out_every == 0 or step == cfg.steps):
                metrics |= held_out_loss(state.params, held_out)
            run.record(step, state, metrics)
        state = layout.get(state)
        models.save(model, state.params, cfg.out / "model")
        runs.share(cfg.out / "model")
        trained = dataclasses.replace(model, params=state.params)
        openings = [" ".join(row["text"].split()[:8]) for row in itertools.islice(rows, 8)]
        key = named_key(cfg.seed, "pretrain/samples")
        run.samples(cfg.steps, rollout.say(trained, openings, key, length=cfg.length, layout=layout))
    plots.curves(
        cfg.out, {"next-token loss (nats)": ["loss/next_token", "loss/held_out"], "gradient norm": ["grad_norm"]}
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
