"""Pretraining: a GPT learns to predict raw text.

Run:     python -m experiments.pretrain --data world:rows=60000 --steps 2000
Parent:  none
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax import checkpoint, cli, log, models, optim, parallel, plots, rollout, sft, transformer
from rlhf_jax.data import builders, pipeline, tokenizer
from rlhf_jax.types import TrainState, check_positive, named_key


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of the initial weights and of the order of the data
    out: Path = Path("runs/pretrain")  # run directory; the model goes to its folder "model"
    data: str = "world:rows=60000"  # text: the world, a .jsonl or .txt file, or a TFDS name
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    init: Path | None = None  # model directory to go on from; None starts from random weights
    preset: str = "llama-mini"  # architecture of a new model, one of rlhf_jax.transformer.PRESETS; not with --init
    vocab_size: int = 1280  # of the byte-level BPE tokenizer that is trained for a new model; not with --init
    length: int = 64  # tokens in a row; documents are packed into rows
    batch: int = 16  # rows a step, over all devices
    steps: int = 2000  # optimiser steps
    lr: float = 3e-3  # peak learning rate, cosine to 10 % of it
    warmup: int = 60  # steps of linear warm-up
    weight_decay: float = 0.1  # of matrices
    compute: transformer.Compute = transformer.Compute()
    save_every: int = 500  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "length", "batch", "steps", "save_every")


def new_model(cfg: Config, rows: builders.Rows) -> models.Model:
    """Random weights of the preset's shape, with a tokenizer trained on the first documents."""
    texts = [row["text"] for row in itertools.islice(rows, 20_000)]
    tok = tokenizer.train(texts, cfg.vocab_size, cfg.out / "tokenizer")
    config = dataclasses.replace(transformer.preset(cfg.preset), vocab_size=len(tok), compute=cfg.compute)
    module = transformer.Transformer(config)
    ones = jnp.ones((1, 2), jnp.int32)
    params = jax.jit(module.init)(named_key(cfg.seed, "pretrain/init"), ones, ones)["params"]
    return models.Model(config, params, tok, transformer.bind(module))


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    rows = builders.source(cfg.data, "text", data_dir=cfg.data_dir)
    model = models.load(cfg.init, compute=cfg.compute) if cfg.init else new_model(cfg, rows)
    batches = pipeline.text(rows, models.tokenizer_of(model), length=cfg.length, batch=cfg.batch, seed=cfg.seed)
    print(f"{cfg.data}: {batches.counts}")
    print(f"{sum(x.size for x in jax.tree.leaves(model.params)):,} parameters, {jax.device_count()} devices")

    tx = optim.adamw(optim.cosine(cfg.lr, cfg.steps, cfg.warmup), weight_decay=cfg.weight_decay)
    state = parallel.replicate(optim.init(model.params, tx, named_key(cfg.seed, "pretrain")))
    step_fn = parallel.pmap(functools.partial(sft.train_step, apply_fn=model.apply, tx=tx), donate=(0,))
    stream = iter(batches)
    with (
        log.start(cfg.out, cfg, total=cfg.steps, show=("loss/next_token",), wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, cfg.steps + 1):
            state, metrics = step_fn(state, parallel.shard(next(stream)))
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == cfg.steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {"data": stream.get_state()})
        state = parallel.unreplicate(state)
        models.save(model, state.params, cfg.out / "model")
        trained = dataclasses.replace(model, params=state.params)
        begun = [" ".join(row["text"].split()[:8]) for row in itertools.islice(rows, 8)]
        run.samples(cfg.steps, rollout.say(trained, begun, named_key(cfg.seed, "pretrain/samples"), length=cfg.length))
    plots.curves(cfg.out, {"next-token loss (nats)": ["loss/next_token"], "gradient norm": ["grad_norm"]})
    return state


if __name__ == "__main__":
    cli.run(main, Config())
