"""Process reward model: it says of each step of a solution whether it is right; learnt from labels of steps.

As "Let's Verify Step by Step" (arXiv:2305.20050), with one output a step, the log-odds that it is right. `ppo` and
`grpo` take the model by `--process.model`: a reward at the end of each step.

Run:     python -m experiments.process_reward --init runs/sft/model --data prm800k:phase2_train.jsonl
Parent:  reward
Result:  on sums of the world (studies/steps.py), seed 0: 86 % of held-out steps; 97 % of right, 19 % of wrong ones
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms import process_reward as process_lib
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Rate
from rlhf_jax.types import named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/process_reward")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory to start from
    data: str = "world:rows=4000"  # solutions to learn from: the world's sums, a file of steps, or prm800k:PATH
    held_out: str | None = None  # solutions to measure accuracy on; None: measure nothing
    length: Count = 64  # most tokens of prompt and solution; longer ones are refused
    batch: Count = 32  # solutions a step, over all devices
    epochs: Count = 1  # passes over the solutions
    lr: Positive = 5e-4  # peak learning rate; cosine decay to 10 % of it
    dropout: Rate = 0.0  # dropout rate of residual branches
    weight_decay: NonNegative = 0.0  # decoupled weight decay of matrices
    algorithm: process_lib.Config = process_lib.Config()
    lora: lora_lib.Config = lora_lib.Config()


def build(
    cfg: Config, config: models.Config, layout: parallel.Layout, steps: int
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser for `steps` steps, and the compiled train step (state, base, batch) and counts (params, batch)."""
    tx = optim.adamw(optim.cosine(cfg.lr, steps), weight_decay=cfg.weight_decay, skip_bad=cfg.skip_bad > 0)
    with_dropout = models.bind(heads.ScalarModel(dataclasses.replace(config, dropout=cfg.dropout)))
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            process_lib.train_step,
            token_fn=on(with_dropout),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    count = functools.partial(process_lib.evaluate, token_fn=models.bind(heads.ScalarModel(config)), cfg=cfg.algorithm)
    return tx, layout.step(step, donate=(0,)), layout.step(count)


def main(cfg: Config) -> dict[str, float]:
    """Train, and write the run directory; returns the accuracy on held-out steps, and on right and wrong ones."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    models.check_length(model.config, cfg.length)
    tokenizer = models.tokenizer_of(model, cfg.control_tokens)
    source = functools.partial(sources.rows, kind="steps", data_dir=cfg.data_dir)
    read = functools.partial(
        pipeline.steps,
        tokenizer=tokenizer,
        length=cfg.length,
        batch=cfg.batch,
        seed=cfg.seed,
    )
    batches = read(source(cfg.data), epochs=cfg.epochs)
    print(f"{cfg.data}: {batches.counts}")
    held_out = read(source(cfg.held_out), epochs=1) if cfg.held_out else None
    if held_out:
        print(f"{cfg.held_out}: {held_out.counts}")

    tx, step_fn, count = build(cfg, model.config, layout, batches.steps)
    params = heads.from_policy(model.params, model.config, named_key(cfg.seed, "process_reward/head"))
    trained, frozen = lora_lib.split(params, cfg.lora, named_key(cfg.seed, "process_reward/lora"))
    base = layout.state(cfg.compute.freeze(frozen))
    state = optim.init(trained, tx, named_key(cfg.seed, "process_reward"))
    model = dataclasses.replace(model, params=None)  # free the memory of the loaded parameters
    del params, trained, frozen
    limits = runs.Limits(show=("loss/step", "step/accuracy"))
    with runs.Run(cfg, layout, state, {"data": batches}, batches.steps, limits) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, base, layout.rows(next(run.streams["data"])))
            run.record(step, state, metrics)
    trained = layout.get(state).params
    models.save(model, lora_lib.merge(layout.get(base), trained, cfg.lora), cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(
        cfg.out,
        {
            "loss (nats)": ["loss/step"],
            "accuracy on right and on wrong steps": ["step/accuracy_right", "step/accuracy_wrong"],
        },
    )
    if held_out is None:
        return {}
    whole = lora_lib.attach(base, layout.state(trained), cfg.lora)
    parts = [jax.device_get(layout.get(count(whole, layout.rows(batch)))) for batch in held_out]
    found = {name: float(x) for name, x in process_lib.shares(jax.tree.map(lambda *x: np.sum(x), *parts)).items()}
    print("held-out steps: " + ", ".join(f"{name.removeprefix('step/')} {x:.3f}" for name, x in found.items()))
    runs.write(cfg.out / "held_out.json", json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    cli.run(main, Config())
