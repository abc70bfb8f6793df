"""Supervised fine-tuning: a pretrained model learns to answer as the demonstrations do.

Cosine decay to 10 %, no warm-up, residual dropout, loss only on the answers. The defaults are those of the model from
which InstructGPT starts PPO (arXiv:2203.02155, appendix C): 2 epochs, with pretraining text mixed in against forgetting
(a third of the rows here, a tenth there). InstructGPT's own SFT models: --epochs 16 --dropout 0.2 --text None.

Run:     python -m experiments.sft --init runs/pretrain/model
Parent:  pretrain
Result:  in the quickstart, seed 0: gold 0.249 -> 0.465, loss on held-out text 0.606 -> 0.613 nats a token
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Rate, Whole
from rlhf_jax.types import Params, Tokens, TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/sft")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/pretrain/model")  # model directory to start from
    data: str = "world:rows=4000"  # source of demonstrations: the world or a .jsonl file
    # Source of demonstrations to measure the loss on; None: the held-out split of the world, if `data` is the world.
    held_out: str | None = None
    held_out_every: Whole = 50  # steps between losses on held-out demonstrations; 0: never
    text: str | None = "world:rows=60000"  # source of pretraining text to mix in; None: no text
    text_batch: Count = 8  # rows of pretraining text a step, over all devices
    length: Count = 64  # tokens in a row; demonstrations are packed into rows, and longer ones truncated
    batch: Count = 16  # rows of demonstrations a step, over all devices
    epochs: Count = 2  # passes over the demonstrations
    lr: Positive = 1e-3  # peak learning rate; cosine decay to 10 % of it
    dropout: Rate = 0.1  # dropout rate of residual branches
    weight_decay: NonNegative = 0.0  # decoupled weight decay of matrices
    lora: lora_lib.Config = lora_lib.Config()


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser for `steps` steps, and compiled: train step (state, base, batch), held-out loss (params, rows)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay, skip_bad=cfg.skip_bad > 0)
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
    held_out_loss = functools.partial(sft.held_out_loss, logprobs_fn=models.logprobs_fn(config))
    return tx, layout.step(step, donate=(0,)), layout.step(held_out_loss)


def read_held_out(cfg: Config, tokenizer: Tokenizer) -> Tokens | None:
    """All batches of held-out demonstrations, stacked on a leading axis; None if none are, or are ever looked at."""
    if not cfg.held_out_every:
        return None
    rows = sources.held_out(cfg.held_out, cfg.data, "demonstrations", data_dir=cfg.data_dir)
    if rows is None:
        print("no held-out demonstrations: name some by --held-out to see the loss on them")
        return None
    batches = pipeline.demonstrations(rows, tokenizer, length=cfg.length, batch=cfg.batch, seed=None, epochs=1)
    print(f"held out: {batches.counts}")
    return pipeline.stack(batches)


def start(cfg: Config, tx: optax.GradientTransformation, params: Params) -> tuple[TrainState, Params]:
    """The state before the first step, and the frozen base weights (empty without LoRA)."""
    trained, frozen = lora_lib.split(params, cfg.lora, named_key(cfg.seed, "sft/lora"))
    return optim.init(trained, tx, named_key(cfg.seed, "sft")), cfg.compute.freeze(frozen)


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory; returns the final state on the host."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, cfg.length)
    tokenizer = models.tokenizer_of(model, cfg.control_tokens)
    rows = sources.rows(cfg.data, "demonstrations", data_dir=cfg.data_dir)
    # Dropout depends on a row's place in the batch, so each process makes whole batches here, and then takes its share.
    batches = pipeline.demonstrations(
        rows, tokenizer, length=cfg.length, batch=cfg.batch, seed=cfg.seed, epochs=cfg.epochs
    ).part(0, 1)
    print(f"{cfg.data}: {batches.counts}")
    held_out = read_held_out(cfg, tokenizer)
    streams, steps = {"data": batches}, batches.steps
    if cfg.text is not None:
        text_rows = sources.rows(cfg.text, "text", data_dir=cfg.data_dir)
        texts = pipeline.text(text_rows, tokenizer, length=cfg.length, batch=cfg.text_batch, seed=cfg.seed + 1)
        streams["text"] = texts.part(0, 1)

    tx, step_fn, held_out_loss = build(cfg, model.config, layout, steps)
    held_out = layout.rows(held_out, rows_axis=1)
    state, frozen = start(cfg, tx, model.params)
    base = layout.state(frozen)
    del frozen
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=("loss/next_token", "loss/held_out"))
    with runs.Run(cfg, layout, state, streams, steps, limits) as run:
        state = run.state
        for step in run:
            parts = [next(stream) for stream in run.streams.values()]
            batch = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
            state, metrics = step_fn(state, base, layout.rows(hosts.share(batch)))
            if held_out is not None and ((step - 1) % cfg.held_out_every == 0 or step == steps):
                metrics |= held_out_loss(lora_lib.attach(base, state.params, cfg.lora), held_out)
            run.record(step, state, metrics)
        state = layout.get(state)
        model = dataclasses.replace(model, params=lora_lib.merge(layout.get(base), state.params, cfg.lora))
        models.save(model, model.params, cfg.out / "model")
        runs.share(cfg.out / "model")
        prompts = [row["prompt"] if "prompt" in row else row["messages"][:-1] for row in itertools.islice(rows, 8)]
        key = named_key(cfg.seed, "sft/samples")
        run.samples(steps, rollout.say(model, prompts, key, length=cfg.length, layout=layout))
    panels = {"next-token loss on answers (nats)": ["loss/next_token", "loss/held_out"]}
    if cfg.text is not None:  # the two losses are not of the same kind of rows
        panels = {
            "next-token loss on answers and text (nats)": ["loss/next_token"],
            "loss on held-out answers (nats)": ["loss/held_out"],
        }
    plots.curves(cfg.out, panels | {"gradient norm": ["grad_norm"]})
    return state


if __name__ == "__main__":
    cli.run(main, Config())
