"""DPO: the policy learns from the rankings themselves, without a reward model and without sampling.

All pairs of each prompt's ranked answers (arXiv:2305.18290; `--dpo.loss ipo` for arXiv:2310.12036), from the labels
that `reward` learns from.

Run:     python -m experiments.dpo --init runs/sft/model --data runs/rank/train.jsonl
Parent:  reward
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
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import checkpoint, cli, log, plots
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
    compute: models.Compute = models.Compute()
    devices: parallel.Config = parallel.Config()
    skip_bad: int = 0  # steps in a row with a gradient that is not finite to skip; one more ends the run
    saves: checkpoint.Config = checkpoint.Config()
    profile: int = 0  # steps to trace after the first three, into the folder profile
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        check_positive(self, "length", "batch", "epochs")


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser of so many steps, and the train step, placed: it takes (state, batch, reference)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps, cfg.warmup), skip_bad=cfg.skip_bad > 0)
    apply_fn = models.bind(models.Transformer(dataclasses.replace(config, dropout=cfg.dropout)))
    settings: dict = {"apply_fn": apply_fn, "tx": tx, "cfg": cfg.dpo, "microbatches": cfg.devices.microbatches}
    return tx, layout.step(functools.partial(dpo_lib.train_step, **settings), donate=(0,))


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory."""
    runs.claim(cfg.out, cfg)
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, length=cfg.length)
    rows = sources.rows(cfg.data, "rankings", data_dir=cfg.data_dir)
    sizes = {"length": cfg.length, "batch": cfg.batch, "epochs": cfg.epochs}
    batches = pipeline.rankings(rows, models.tokenizer_of(model), **sizes, seed=cfg.seed)
    print(f"{cfg.data}: {batches.counts}")
    steps, streams = batches.steps, {"data": iter(batches)}

    tx, step_fn = build(cfg, model.config, layout, steps)
    reference = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(model.params)))
    state = optim.init(model.params, tx, named_key(cfg.seed, "dpo"))
    state = checkpoint.resume(cfg.out / log.CHECKPOINTS, state, streams, cfg.saves)
    start, state = int(state.step), layout.state(state)
    records: dict = {
        "show": ("loss/dpo", "reward/accuracy"),
        "skip_bad": cfg.skip_bad,
        "profile": cfg.profile,
        "wandb": cfg.wandb,
    }
    with log.start(cfg.out, cfg, total=steps, step=start, **records) as run:
        with checkpoint.Writer(cfg.out / log.CHECKPOINTS, cfg.saves, start, steps) as saves:
            for step in range(start + 1, steps + 1):
                state, metrics = step_fn(state, layout.rows(next(streams["data"])), reference)
                run.write(step, layout.get(metrics))
                if saves.due(step):
                    saves.save(layout.get(state), streams, run.flush())
        state = layout.get(state)
        models.save(model, state.params, cfg.out / "model")
        runs.share(cfg.out / "model")
        trained = dataclasses.replace(model, params=state.params)
        asked = [row["prompt"] for row in itertools.islice(rows, 8)]
        key = named_key(cfg.seed, "dpo/samples")
        run.samples(steps, rollout.say(trained, asked, key, length=cfg.length, layout=layout))
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
