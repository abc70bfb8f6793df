"""Reward model: a scalar that orders answers as people ranked them.

As InstructGPT (arXiv:2203.02155): Bradley-Terry over all pairs of K = 4..9 ranked answers, a prompt's pairs in one
batch element, one epoch, cosine decay to 10 %. It starts from the fine-tuned model with a fresh head. Afterwards a gain
and bias give the scores of the training answers mean 0 and standard deviation 1.

Run:     python -m experiments.reward --init runs/sft/model --data runs/rank/train.jsonl
Parent:  sft
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import checkpoint, cli, heads, log, models, optim, parallel, plots, reward, transformer
from rlhf_jax.data import builders, pipeline


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of the head and of the order of the data
    out: Path = Path("runs/reward")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory to start from
    data: str = "runs/rank/train.jsonl"  # rankings to learn from
    held_out: str | None = "runs/rank/held_out.jsonl"  # rankings to measure accuracy on; none is fine
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    length: int = 36  # tokens of prompt and answer; prompts with a longer answer are refused
    batch: int = 16  # prompts a step, over all devices
    epochs: int = 1  # passes over the rankings
    lr: float = 5e-4  # peak learning rate, cosine to 10 % of it
    dropout: float = 0.0  # residual dropout
    weight_decay: float = 0.0  # of matrices
    save_every: int = 50  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too


def accuracy(params, apply_fn, batches: pipeline.Batches) -> float:
    """Share of the pairs that the scores order as their labeler did."""
    evaluate = parallel.pmap(functools.partial(reward.evaluate, apply_fn=apply_fn))
    spread = parallel.replicate(params)
    totals = [parallel.unreplicate(evaluate(spread, parallel.shard(batch))) for batch in batches]
    correct, pairs = np.sum(jax.device_get(totals), axis=0)
    return float(correct / pairs)


def main(cfg: Config) -> dict[str, float]:
    """Train, and write the run directory; returns the accuracies."""
    model = models.load(cfg.init)
    tokenizer = models.tokenizer_of(model)
    source = functools.partial(builders.source, kind="rankings", data_dir=cfg.data_dir)
    read = functools.partial(pipeline.rankings, tokenizer=tokenizer, length=cfg.length, batch=cfg.batch, seed=cfg.seed)
    batches = read(source(cfg.data), epochs=cfg.epochs)
    print(f"{cfg.data}: {batches.counts}")
    steps = batches.steps

    key, head_key = jax.random.split(jax.random.key(cfg.seed))
    params = heads.from_policy(model.params, model.config, head_key)
    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay)
    state = parallel.replicate(optim.init(params, tx, key))
    noisy = transformer.bind(heads.ScalarModel(dataclasses.replace(model.config, dropout=cfg.dropout)))
    apply_fn = transformer.bind(heads.ScalarModel(model.config))
    step_fn = parallel.pmap(functools.partial(reward.train_step, apply_fn=noisy, tx=tx), donate=(0,))
    stream = iter(batches)
    with (
        log.start(cfg.out, cfg, total=steps, show=("loss/bradley_terry", "reward/accuracy"), wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, steps + 1):
            state, metrics = step_fn(state, parallel.shard(next(stream)))
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {"data": stream.get_state()})
    state = parallel.unreplicate(state)

    scores = jax.jit(functools.partial(reward.scores, apply_fn=apply_fn))
    sample = [(scores(state.params, batch), batch.rank >= 0) for batch in read(source(cfg.data), epochs=1)]
    score = np.concatenate([np.asarray(s)[present] for s, present in sample])
    params = reward.normalize(state.params, float(score.mean()), float(score.std()))
    models.save(model, params, cfg.out / "model")
    plots.curves(
        cfg.out,
        {
            "Bradley-Terry loss (nats)": ["loss/bradley_terry"],
            "training accuracy (share of pairs)": ["reward/accuracy"],
        },
    )
    result = {"accuracy": accuracy(params, apply_fn, read(source(cfg.held_out), epochs=1))} if cfg.held_out else {}
    for name, value in result.items():
        print(f"{name} on held-out comparisons: {100 * value:.1f} %")
    return result


if __name__ == "__main__":
    cli.run(main, Config())
