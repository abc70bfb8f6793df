"""Supervised fine-tuning: a pretrained model learns to answer as the demonstrations do.

Cosine decay to 10 %, no warm-up, residual dropout, loss on the answers alone. The defaults are those of the model that
InstructGPT starts PPO from (arXiv:2203.02155, appendix C): 2 epochs, with pretraining text mixed in, so that it forgets
nothing of it: a third of the rows here, a tenth there. InstructGPT's own SFT models: --epochs 16 --dropout 0.2 --text
None.

Run:     python -m experiments.sft --init runs/pretrain/model
Parent:  pretrain
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import checkpoint, cli, log, models, optim, parallel, plots, rollout, sft, transformer
from rlhf_jax import lora as lora_lib
from rlhf_jax.data import builders, pipeline
from rlhf_jax.types import Metrics, Params, Tokens, TrainState, check_positive, named_key


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of dropout and of the order of the data
    out: Path = Path("runs/sft")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/pretrain/model")  # model directory to start from
    data: str = "world:rows=4000"  # demonstrations: the world or a .jsonl file
    text: str | None = "world:rows=60000"  # pretraining text to mix in; None for none
    text_batch: int = 8  # rows of pretraining text a step, over all devices
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    length: int = 64  # tokens in a row; demonstrations are packed into rows, longer ones truncated
    batch: int = 16  # rows a step, over all devices
    epochs: int = 2  # passes over the demonstrations
    lr: float = 1e-3  # peak learning rate, cosine to 10 % of it
    dropout: float = 0.1  # residual dropout
    weight_decay: float = 0.0  # of matrices
    lora: lora_lib.Config = lora_lib.Config()
    compute: transformer.Compute = transformer.Compute()
    save_every: int = 50  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        check_positive(self, "text_batch", "length", "batch", "epochs", "save_every")


def train_step(
    state: TrainState, base: Params, batch: Tokens, *, apply_fn: Callable, lora: lora_lib.Config, **settings: Any
) -> tuple[TrainState, Metrics]:
    """`sft.train_step` of what is trained, on the frozen base."""
    return sft.train_step(state, batch, apply_fn=lora_lib.over(apply_fn, base, lora), **settings)


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    model = models.load(cfg.init, compute=cfg.compute)
    tokenizer = models.tokenizer_of(model)
    rows = builders.source(cfg.data, "demonstrations", data_dir=cfg.data_dir)
    batches = pipeline.demonstrations(
        rows, tokenizer, length=cfg.length, batch=cfg.batch, seed=cfg.seed, epochs=cfg.epochs
    )
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps
    streams = {"data": iter(batches)}
    if cfg.text is not None:
        text_rows = builders.source(cfg.text, "text", data_dir=cfg.data_dir)
        streams["text"] = iter(
            pipeline.text(text_rows, tokenizer, length=cfg.length, batch=cfg.text_batch, seed=cfg.seed + 1)
        )

    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay)
    trained, frozen = lora_lib.split(model.params, cfg.lora, named_key(cfg.seed, "sft/lora"))
    state, base = parallel.replicate((optim.init(trained, tx, named_key(cfg.seed, "sft")), frozen))
    apply_fn = transformer.bind(transformer.Transformer(dataclasses.replace(model.config, dropout=cfg.dropout)))
    step_fn = parallel.pmap(functools.partial(train_step, apply_fn=apply_fn, lora=cfg.lora, tx=tx), donate=(0,))
    with (
        log.start(cfg.out, cfg, total=steps, show=("loss/next_token",), wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, steps + 1):
            batch = jax.tree.map(lambda *rows: np.concatenate(rows), *(next(stream) for stream in streams.values()))
            state, metrics = step_fn(state, base, parallel.shard(batch))
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {name: s.get_state() for name, s in streams.items()})
        state = parallel.unreplicate(state)
        model = dataclasses.replace(model, params=lora_lib.merge(frozen, state.params, cfg.lora))
        models.save(model, model.params, cfg.out / "model")
        asked = [row["prompt"] if "prompt" in row else row["messages"][:-1] for row in itertools.islice(rows, 8)]
        run.samples(steps, rollout.say(model, asked, named_key(cfg.seed, "sft/samples"), length=cfg.length))
    plots.curves(
        cfg.out, {"next-token loss on answers and text (nats)": ["loss/next_token"], "gradient norm": ["grad_norm"]}
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
