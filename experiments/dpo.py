"""DPO: the policy learns from the rankings themselves, without a reward model and without sampling.

All pairs of each prompt's ranked answers (arXiv:2305.18290; `--dpo.loss ipo` for arXiv:2310.12036), from the labels
that `reward` learns from.

Run:     python -m experiments.dpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  reward
"""

import dataclasses
import functools
import itertools
from pathlib import Path

from rlhf_jax import checkpoint, cli, log, models, optim, parallel, plots, rollout, transformer
from rlhf_jax import dpo as dpo_lib
from rlhf_jax.data import builders, pipeline
from rlhf_jax.types import TrainState, check_positive, named_key


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of dropout and of the order of the data
    out: Path = Path("runs/dpo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy, and of the reference
    data: str = "runs/rank/train.jsonl"  # rankings to learn from
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    length: int = 36  # tokens of prompt and answer; prompts with a longer answer are refused
    batch: int = 16  # prompts a step, over all devices
    epochs: int = 1  # passes over the rankings
    lr: float = 3e-4  # peak learning rate, cosine to 10 % of it
    warmup: int = 8  # steps of linear warm-up
    dropout: float = 0.0  # residual dropout
    dpo: dpo_lib.Config = dpo_lib.Config(beta=0.2)
    compute: transformer.Compute = transformer.Compute()
    save_every: int = 50  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        check_positive(self, "length", "batch", "epochs", "save_every")


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    model = models.load(cfg.init, compute=cfg.compute)
    rows = builders.source(cfg.data, "rankings", data_dir=cfg.data_dir)
    sizes = {"length": cfg.length, "batch": cfg.batch, "epochs": cfg.epochs}
    batches = pipeline.rankings(rows, models.tokenizer_of(model), **sizes, seed=cfg.seed)
    print(f"{cfg.data}: {batches.counts}")
    steps, stream = batches.steps, iter(batches)

    tx = optim.adamw(optim.cosine(cfg.lr, steps, cfg.warmup))
    state = parallel.replicate(optim.init(model.params, tx, named_key(cfg.seed, "dpo")))
    reference = parallel.replicate(model.params)
    apply_fn = transformer.bind(transformer.Transformer(dataclasses.replace(model.config, dropout=cfg.dropout)))
    step_fn = parallel.pmap(functools.partial(dpo_lib.train_step, apply_fn=apply_fn, tx=tx, cfg=cfg.dpo), donate=(0,))
    shown = ("loss/dpo", "reward/accuracy")
    with (
        log.start(cfg.out, cfg, total=steps, show=shown, wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, steps + 1):
            state, metrics = step_fn(state, parallel.shard(next(stream)), reference)
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {"data": stream.get_state()})
        state = parallel.unreplicate(state)
        models.save(model, state.params, cfg.out / "model")
        trained = dataclasses.replace(model, params=state.params)
        asked = [row["prompt"] for row in itertools.islice(rows, 8)]
        run.samples(steps, rollout.say(trained, asked, named_key(cfg.seed, "dpo/samples"), length=cfg.length))
    plots.curves(
        cfg.out,
        {
            "loss (nats)": ["loss/dpo"],
            "training accuracy (share of pairs)": ["reward/accuracy"],
            "margin of implicit rewards": ["reward/margin"],
        },
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
