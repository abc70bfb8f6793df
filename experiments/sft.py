"""Supervised fine-tuning: a pretrained model learns to answer as the demonstrations do.

As InstructGPT (arXiv:2203.02155, appendix C.1): 16 epochs, cosine decay to 10 %, no warm-up, residual dropout 0.2,
loss on the answers alone.

Run:     python -m experiments.sft --init runs/pretrain/model
Parent:  pretrain
"""

import dataclasses
import functools
from pathlib import Path

import jax

from rlhf_jax import checkpoint, cli, log, models, optim, parallel, plots, sft, transformer
from rlhf_jax.data import builders, pipeline
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of dropout and of the order of the data
    out: Path = Path("runs/sft")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/pretrain/model")  # model directory to start from
    data: str = "world:rows=1000"  # demonstrations: the world or a .jsonl file
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    length: int = 64  # tokens in a row; demonstrations are packed into rows, longer ones truncated
    batch: int = 16  # rows a step, over all devices
    epochs: int = 16  # passes over the demonstrations
    lr: float = 1e-3  # peak learning rate, cosine to 10 % of it
    dropout: float = 0.2  # residual dropout
    weight_decay: float = 0.0  # of matrices
    save_every: int = 500  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    model = models.load(cfg.init)
    rows = builders.source(cfg.data, "demonstrations", data_dir=cfg.data_dir)
    batches = pipeline.demonstrations(
        rows, models.tokenizer_of(model), length=cfg.length, batch=cfg.batch, seed=cfg.seed, epochs=cfg.epochs
    )
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps

    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay)
    state = parallel.replicate(optim.init(model.params, tx, jax.random.key(cfg.seed)))
    apply_fn = transformer.bind(transformer.Transformer(dataclasses.replace(model.config, dropout=cfg.dropout)))
    step_fn = parallel.pmap(functools.partial(sft.train_step, apply_fn=apply_fn, tx=tx), donate=(0,))
    stream = iter(batches)
    with (
        log.start(cfg.out, cfg, total=steps, show=("loss/next_token",), wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, steps + 1):
            state, metrics = step_fn(state, parallel.shard(next(stream)))
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {"data": stream.get_state()})
    state = parallel.unreplicate(state)
    models.save(model, state.params, cfg.out / "model")
    plots.curves(cfg.out, {"loss on the answers (nats)": ["loss/next_token"], "gradient norm": ["grad_norm"]})
    return state


if __name__ == "__main__":
    cli.run(main, Config())
