"""On-policy distillation: a student answers, and learns how a teacher would have gone on at every token (GKD).

Any model directory with the same tokenizer is a teacher, of whichever size and family (arXiv:2306.13649). Unlike
fine-tuning on the teacher's answers, the student learns on its own ones, mistakes included.

Run:     python -m experiments.distill --init runs/sft/model --teacher runs/ppo/model
Parent:  grpo
Result:  from a quickstart's models, seed 0, with its PPO policy (gold 0.742) as the teacher: gold 0.465 -> 0.753 at
         0.41 nats, loss on held-out text 0.613 -> 0.628
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import distillation, optim
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive, Whole
from rlhf_jax.types import TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/distill")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the student
    teacher: Path = Path("runs/ppo/model")  # model directory of the teacher, which has the same tokenizer
    data: str = "world:rows=8000"  # source of prompts: the world or a .jsonl file
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    max_new_tokens: Count = 16  # most tokens of an answer
    batch: Count = 64  # answers a step, over all devices
    steps: Count = 100  # number of rollouts, each followed by one update
    lr: Positive = 3e-4  # peak learning rate; cosine decay to 10 % of it
    warmup: Whole = 8  # steps of linear learning-rate warm-up
    algorithm: distillation.Config = distillation.Config()
    lora: lora_lib.Config = lora_lib.Config()
    samples_every: Count = 20  # number of steps between tables of samples
    samples: Count = 8  # number of episodes in a table of samples


def build(
    cfg: Config, student: models.Model, teacher: models.Config, layout: parallel.Layout
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, and the compiled `rollout.collect` and train step, which takes (state, base, rollout, teacher)."""
    tx = optim.adamw(optim.cosine(cfg.lr, cfg.steps, cfg.warmup), skip_bad=cfg.skip_bad > 0)
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            distillation.train_step,
            student_fn=on(models.logits_fn(student.config)),
            teacher_fn=models.logits_fn(teacher),
            tx=tx,
            cfg=cfg.algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, student.config),
        ),
    )
    sampled = sampling.Config(
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.algorithm.temperature,
        eos_id=models.stop_ids(student),
    )
    return tx, rollout.collector(student.config, layout, sampled), layout.step(step, donate=(0,))


def main(cfg: Config) -> TrainState:
    """Train, and write the run directory; returns the final state on the host."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    student = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    teacher = models.load(cfg.teacher, compute=cfg.compute, place=layout.sharding)
    models.check_vocabularies({cfg.init: student, cfg.teacher: teacher})
    tokenizer = models.tokenizer_of(student, cfg.control_tokens)
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    prompts = pipeline.prompts(rows, tokenizer, length=cfg.prompt_length, batch=cfg.batch, seed=cfg.seed)
    print(f"{cfg.data}: {prompts.counts}")

    tx, collect, step_fn = build(cfg, student, teacher.config, layout)
    trained, frozen = lora_lib.split(student.params, cfg.lora, named_key(cfg.seed, "distill/lora"))
    state = optim.init(trained, tx, named_key(cfg.seed, "distill"))
    base, told = layout.state(cfg.compute.freeze(frozen)), layout.frozen(cfg.compute.freeze(teacher.params))
    key = layout.state(named_key(cfg.seed, "distill/sampling"))
    del trained, frozen, teacher
    student = dataclasses.replace(student, params=None)  # free the memory of the loaded parameters
    limits = runs.Limits(show=("loss/distillation", "response/tokens"))
    with runs.Run(cfg, layout, state, {"prompts": prompts}, cfg.steps, limits) as run:
        state = run.state
        for step in run:
            run.clock.start()
            params = {"policy": lora_lib.attach(base, state.params, cfg.lora)}
            batch = layout.rows(next(run.streams["prompts"]))
            episodes = collect(params, batch, key, layout.state(np.uint32(step * cfg.batch)))
            run.clock.done("generate", episodes)
            state, metrics = step_fn(state, base, episodes, told)
            run.clock.done("update", metrics)
            if (step - 1) % cfg.samples_every == 0 or step == cfg.steps:
                run.samples(step, rollout.table(rows, tokenizer, layout.gather(episodes), cfg.samples))
            run.record(step, state, metrics)
    state = layout.get(state)
    models.save(student, lora_lib.merge(layout.get(base), state.params, cfg.lora), cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(
        cfg.out,
        {
            "divergence from the teacher (nats a token)": ["loss/distillation"],
            "entropy (nats a token)": ["policy/entropy"],
            "length (tokens)": ["response/tokens"],
        },
    )
    return state


if __name__ == "__main__":
    cli.run(main, Config())
