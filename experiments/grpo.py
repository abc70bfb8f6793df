"""GRPO: PPO's goal without a critic, from groups of answers to the same prompt.

As DeepSeekMath (arXiv:2402.03300), with KL and pretraining mix as in `ppo`, so that the two compare at equal episodes.

Run:     python -m experiments.grpo --init runs/sft/model --reward runs/reward/model
Parent:  ppo
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import ppo
from rlhf_jax import models, runs
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import optim, updates
from rlhf_jax.analysis import flops
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.runs import checkpoint, cli
from rlhf_jax.types import InputError, Leaf, Params, Prompts, Rollout, TrainState, check_positive, named_key


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of sampling and of the order of the data
    out: Path = Path("runs/grpo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy, and of the reference that holds it
    reward: tuple[Path, ...] = (Path("runs/reward/model"),)  # reward models to average
    data: str = "world:rows=8000"  # prompts: the world or a .jsonl file
    text: str | None = "world:rows=60000"  # pretraining text to mix in; None for none
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    prompt_length: int = 20  # tokens; longer prompts are refused, or lose their oldest turns
    prompt_widths: int = 1  # of rollouts: prompts of like length share one, which is as wide as they need
    max_new_tokens: int = 16  # tokens of an answer
    text_length: int = 64  # tokens in a row of pretraining text
    batch: int = 64  # episodes a step, over all devices: a multiple of the group
    text_batch: int = 8  # rows of pretraining text an update, over all devices
    steps: int = 70  # rollouts
    lr: float = 3e-4  # at its peak
    schedule: optim.Schedule = "cosine"  # cosine to 10 %, linear to 0, or constant
    warmup: int = 8  # updates of linear warm-up
    adam: optim.Adam = optim.Adam()
    algorithm: grpo_lib.Config = grpo_lib.Config(
        minibatches=4, group=4, kl_coef=0.2, kl_in="reward", ptx_coef=3.0, unfinished_score=-1.0
    )
    compute: models.Compute = models.Compute()
    devices: parallel.Config = parallel.Config()
    samples_every: int = 20  # steps between tables of samples
    samples: int = 8  # episodes in a table
    skip_bad: int = 0  # steps in a row with a gradient that is not finite to skip; one more ends the run
    saves: checkpoint.Config = checkpoint.Config()
    profile: int = 0  # steps to trace after the first three, into the folder profile
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        positive = "prompt_length", "prompt_widths", "max_new_tokens", "text_length", "batch", "text_batch", "steps"
        check_positive(self, *positive, "samples_every", "samples")
        if self.batch % self.algorithm.group:
            raise InputError(f"batch={self.batch}: expected a multiple of the group of {self.algorithm.group} answers")


def build(
    cfg: Config,
    config: models.Config,
    eos_id: int | tuple[int, ...],
    layout: parallel.Layout,
    train_step: Callable,
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, `rollout.collect` and the train step on (state, episodes, text), placed."""
    updates_a_step = cfg.algorithm.epochs * cfg.algorithm.minibatches
    schedule = optim.schedule(cfg.schedule, cfg.lr, cfg.steps * updates_a_step, cfg.warmup)
    tx = optim.adamw(schedule, cfg.adam, skip_bad=cfg.skip_bad > 0)
    settings: dict[str, Any] = {"policy_fn": models.bind(models.Transformer(config)), "tx": tx}
    settings |= {"cfg": cfg.algorithm, "microbatches": cfg.devices.microbatches}
    step_fn = layout.step(functools.partial(train_step, **settings), donate=(0,))
    return tx, ppo.collecting(cfg, cfg.algorithm, config, eos_id, layout), step_fn


def main(
    cfg: Config, train_step: Callable = grpo_lib.train_step, score_text: ppo.ScoreText | None = None
) -> TrainState:
    """Train, and write the run directory. `train_step` is that of `grpo`, or of `rloo` with its settings.

    A `score_text(prompt, response)` takes the place of the reward models.
    """
    runs.claim(cfg.out, cfg)
    ppo.check_scored(cfg.reward, score_text)
    if cfg.reward and score_text:
        raise InputError("reward has no effect on scores that are not reward models': leave it out")
    layout = parallel.layout(cfg.devices)
    given: dict[str, Any] = {"compute": cfg.compute, "place": layout.sharding}
    policy = models.load(cfg.init, **given)
    rewards = [models.load_reward(path, **given) for path in cfg.reward]
    tokenizer = models.tokenizer_of(policy)
    models.check_vocabularies({cfg.init: policy} | dict(zip(cfg.reward, rewards, strict=True)))
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    score = ppo.scorer(rewards, score_text, rows, tokenizer, layout, buckets=cfg.algorithm.buckets)
    wide = {"length": cfg.prompt_length, "widths": cfg.prompt_widths}
    prompts = pipeline.prompts(rows, tokenizer, **wide, batch=cfg.batch // cfg.algorithm.group, seed=cfg.seed)
    print(f"{cfg.data}: {prompts.counts}")

    tx, collect, step_fn = build(cfg, policy.config, tokenizer.eos_token_id, layout, train_step)
    state = updates.init({"policy": policy.params}, tx, cfg.algorithm, named_key(cfg.seed, "grpo/updates"))
    reference = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(policy.params)))
    keys = layout.state(named_key(cfg.seed, "grpo/sampling"))

    judges = [reward.config for reward in rewards]
    policy = dataclasses.replace(policy, params=None)  # as they were loaded, models would fill the memory
    del rewards

    def sample(params: dict[str, Params], batch: Prompts, first: Leaf) -> Rollout:
        return collect(params, reference, layout.rows(batch), keys, first)

    peak = flops.peak(cfg.compute.dtype)
    rates = functools.partial(ppo.speeds, cfg, cfg.algorithm, policy.config, rewards=judges, peak=peak)
    loop = sample, score, step_fn, rates
    return ppo.train(cfg, cfg.algorithm, policy, layout, state, *loop, rows, prompts, cfg.algorithm.group)


if __name__ == "__main__":
    cli.run(main, Config())
