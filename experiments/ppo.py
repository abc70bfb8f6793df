"""PPO: the fine-tuned model learns to please the reward model, held near where it started.

As InstructGPT (arXiv:2203.02155): KL penalty to the fine-tuned model in the reward, a critic that starts from the
reward model, one pass of minibatches over each batch of episodes, and the pretraining gradient mixed in (ptx).

Run:     python -m experiments.ppo --init runs/sft/model --reward runs/reward/model
Parent:  none
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import (
    best_of_n,
    checkpoint,
    cli,
    heads,
    log,
    models,
    optim,
    parallel,
    plots,
    rollout,
    scores,
    transformer,
)
from rlhf_jax import lora as lora_lib
from rlhf_jax import ppo as ppo_lib
from rlhf_jax import updates as updates_lib
from rlhf_jax.data import builders, pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.types import (
    InputError,
    Metrics,
    Params,
    Prompts,
    Rollout,
    Tokens,
    TrainState,
    check_positive,
    named_key,
)

ScoreText = Callable[[tokenizer_lib.Prompt, str], float]  # (prompt, response) to a score


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults are for the assistant world on two CPU cores."""

    seed: int = 0  # of sampling and of the order of the data
    out: Path = Path("runs/ppo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy
    reference: Path | None = None  # model directory of the reference that holds it; None is where the policy starts
    reward: tuple[Path, ...] = (Path("runs/reward/model"),)  # reward models to average; the first may start the critic
    critic: Literal["reward", "policy"] = "reward"  # a network that starts as the reward model, or a head on the policy
    pessimism: float = 0.0  # standard deviations of the reward models to take off their mean
    data: str = "world:rows=8000"  # prompts: the world or a .jsonl file
    text: str | None = "world:rows=60000"  # pretraining text to mix in; None for none
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    prompt_length: int = 20  # tokens; longer prompts are refused, or lose their oldest turns
    max_new_tokens: int = 16  # tokens of an answer
    text_length: int = 64  # tokens in a row of pretraining text
    batch: int = 64  # episodes a step, over all devices
    text_batch: int = 8  # rows of pretraining text an update, over all devices
    steps: int = 70  # rollouts
    lr: float = 3e-4  # of the policy, at its peak
    critic_lr: float = 1e-3  # of the critic, at its peak
    schedule: optim.Schedule = "cosine"  # of both learning rates: cosine to 10 %, linear to 0, or constant
    warmup: int = 8  # updates of linear warm-up
    adam: optim.Adam = optim.Adam()
    ppo: ppo_lib.Config = ppo_lib.Config(minibatches=4, kl_coef=0.2, ptx_coef=3.0, unfinished_score=-1.0)
    lora: lora_lib.Config = lora_lib.Config()  # of policy and critic
    compute: transformer.Compute = transformer.Compute()
    samples_every: int = 20  # steps between tables of samples
    samples: int = 8  # episodes in a table
    save_every: int = 50  # steps between checkpoints
    wandb: bool = False  # log to Weights & Biases too

    def __post_init__(self) -> None:
        positive = "prompt_length", "max_new_tokens", "text_length", "batch", "text_batch", "steps", "samples_every"
        check_positive(self, *positive, "samples", "save_every")
        if not self.reward and self.critic == "reward":
            raise InputError("critic=reward starts as a reward model: name one by --reward, or use --critic policy")
        if self.pessimism and len(self.reward) < 2:
            raise InputError("pessimism needs the disagreement of several reward models: name more by --reward")


def train_step(
    state: TrainState,
    base: Params,
    episodes: Rollout,
    text: Tokens | None,
    *,
    policy_fn: Callable,
    critic_fn: Callable,
    lora: lora_lib.Config,
    **settings: Any,
) -> tuple[TrainState, Metrics]:
    """`ppo.train_step` of what is trained, on the frozen base."""
    policy_fn = lora_lib.over(policy_fn, base["policy"], lora)
    critic_fn = lora_lib.over(critic_fn, base, lora)
    return ppo_lib.train_step(state, episodes, text, policy_fn=policy_fn, critic_fn=critic_fn, **settings)


def check_scored(reward: Sequence[Path], score_text: ScoreText | None) -> None:
    """InputError unless there is something to score the answers by."""
    if not reward and score_text is None:
        raise InputError("reward: expected at least one model directory")


def scorer(
    rewards: Sequence[models.Model],
    score_text: ScoreText | None,
    rows: builders.Rows,
    tokenizer: tokenizer_lib.Tokenizer,
    pessimism: float = 0.0,
) -> scores.Source:
    """The function of the text where there is one, else the reward models."""
    if score_text is not None:
        return scores.text_function(score_text, rows, tokenizer)
    return scores.reward_models(rewards, tokenizer.eos_token_id, pessimism)


def main(cfg: Config, score_text: ScoreText | None = None) -> TrainState:
    """Train, and write the run directory. A `score_text(prompt, response)` replaces the reward models' scores."""
    check_scored(cfg.reward, score_text)
    if score_text and cfg.pessimism:
        raise InputError("pessimism has no effect on scores that are not reward models': leave it out")
    policy = models.load(cfg.init, compute=cfg.compute)
    rewards = [models.load_reward(path, compute=cfg.compute) for path in cfg.reward]
    tokenizer = models.tokenizer_of(policy)
    held = policy if cfg.reference is None else models.load(cfg.reference, compute=cfg.compute)
    if held.config != policy.config:
        raise InputError(f"{cfg.reference} is not of the architecture of {cfg.init}: take the model that it came from")
    others = dict(zip(cfg.reward, rewards, strict=True)) | ({cfg.reference: held} if cfg.reference else {})
    models.check_vocabularies({cfg.init: policy} | others)
    rows = builders.source(cfg.data, "prompts", data_dir=cfg.data_dir)
    score = scorer(rewards, score_text, rows, tokenizer, cfg.pessimism)
    prompts = pipeline.prompts(rows, tokenizer, length=cfg.prompt_length, batch=cfg.batch, seed=cfg.seed)
    print(f"{cfg.data}: {prompts.counts}")
    updates = cfg.ppo.epochs * cfg.ppo.minibatches

    def adam(lr: float) -> optax.GradientTransformation:
        return optim.adamw(optim.schedule(cfg.schedule, lr, cfg.steps * updates, cfg.warmup), cfg.adam)

    tx = ppo_lib.optimizer(adam(cfg.lr), adam(cfg.critic_lr))
    sampling_key, training_key = (named_key(cfg.seed, f"ppo/{use}") for use in ("sampling", "updates"))
    if cfg.critic == "reward":
        critic, critic_fn = rewards[0].params, heads.critic(rewards[0].config)
    else:
        critic, critic_fn = heads.fresh(policy.config), heads.shared_critic(policy.config)
    trained, frozen = {}, {}
    for name, params in {"policy": policy.params, "critic": critic}.items():
        trained[name], frozen[name] = lora_lib.split(params, cfg.lora, named_key(cfg.seed, f"ppo/lora/{name}"))
    state, base = parallel.replicate((ppo_lib.init(trained, tx, cfg.ppo, training_key), frozen))
    reference = base["policy"] if cfg.lora.rank and held is policy else parallel.replicate(held.params)
    collect = parallel.pmap(
        functools.partial(
            rollout.collect,
            policy=policy,
            policy_fn=policy.apply,
            critic_fn=critic_fn,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.ppo.temperature,
            eos_id=tokenizer.eos_token_id,
            stop_at_eos=cfg.ppo.stop_at_eos,
        )
    )
    step_fn = parallel.pmap(
        functools.partial(train_step, policy_fn=policy.apply, critic_fn=critic_fn, lora=cfg.lora, tx=tx, cfg=cfg.ppo),
        donate=(0,),
    )
    keys = parallel.replicate(sampling_key)

    def roll(trained: dict[str, Params], batch: Prompts, first: jax.Array) -> Rollout:
        params = lora_lib.attach(base, trained, cfg.lora)
        return score(collect(params, reference, parallel.shard(batch), keys, first))

    def step(state: TrainState, episodes: Rollout, text: Tokens | None) -> tuple[TrainState, Metrics]:
        return step_fn(state, base, episodes, text)

    export = functools.partial(lora_lib.merge, frozen["policy"], cfg=cfg.lora)
    return train(cfg, cfg.ppo, policy, state, roll, step, rows, prompts, export=export)


def train(
    cfg: Any,
    settings: updates_lib.Config,
    policy: models.Model,
    state: TrainState,
    roll: Callable[[dict[str, Params], Prompts, jax.Array], Rollout],
    step_fn: Callable[[TrainState, Rollout, Tokens | None], tuple[TrainState, dict]],
    rows: builders.Rows,
    prompts: pipeline.Batches[Prompts],
    group: int = 1,
    export: Callable[[Params], Params] = lambda policy: policy,
) -> TrainState:
    """The loop of every experiment that learns from rollouts, and its run directory.

    `cfg` is that experiment's configuration, `settings` its algorithm's; `state` is replicated. `roll` returns scored
    episodes, of which `group` answer each prompt; no two of its calls get the same number `first`. `export` makes of
    the trained policy the parameters to save.
    """
    tokenizer, updates = models.tokenizer_of(policy), settings.epochs * settings.minibatches
    streams = {"prompts": iter(prompts)}
    if cfg.text is not None:
        text = builders.source(cfg.text, "text", data_dir=cfg.data_dir)
        sizes = {"length": cfg.text_length, "batch": updates * cfg.text_batch}
        streams["text"] = iter(pipeline.text(text, tokenizer, **sizes, seed=cfg.seed + 1))
    shown = ("reward/score", "kl/reference")
    # What was sampled is what is scored, or the first pass over a rollout finds ratios other than 1.
    bounds = {"ratio/first_error": 1e-4 if cfg.compute.dtype == "float32" else 0.1}
    with (
        log.start(cfg.out, cfg, total=cfg.steps, show=shown, at_most=bounds, wandb=cfg.wandb) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS) as saves,
    ):
        for step in range(1, cfg.steps + 1):
            batch = best_of_n.repeat(next(streams["prompts"]), group)
            episodes = roll(state.params, batch, parallel.replicate(jnp.uint32(step * cfg.batch)))
            mix = None
            if cfg.text is not None:
                split = jax.tree.map(lambda x: x.reshape(updates, -1, *x.shape[1:]), next(streams["text"]))
                mix = parallel.shard(split, rows_axis=1)
            if (step - 1) % cfg.samples_every == 0 or step == cfg.steps:
                run.samples(step, table(rows, tokenizer, parallel.gather(episodes), cfg.samples))
            state, metrics = step_fn(state, episodes, mix)
            run.write(step, parallel.unreplicate(metrics))
            if step % cfg.save_every == 0 or step == cfg.steps:
                run.flush()
                saves.save(parallel.unreplicate(state), {name: s.get_state() for name, s in streams.items()})
    state = parallel.unreplicate(state)
    models.save(policy, export(state.opt_state.get("ema", state.params["policy"])), cfg.out / "model")
    plots.curves(
        cfg.out,
        {
            "score": ["reward/score"],
            "KL to the reference (nats a response)": ["kl/reference"],
            "entropy (nats a token)": ["policy/entropy"],
            "length (tokens)": ["response/tokens"],
            "explained variance of the critic": ["value/explained_variance"],
            "pretraining loss (nats)": ["loss/ptx"],
        },
    )
    return state


def table(rows: builders.Rows, tokenizer: tokenizer_lib.Tokenizer, episodes: Rollout, count: int) -> list[dict]:
    """The first episodes of a rollout, to read."""
    texts = rollout.texts(tokenizer, episodes.tokens[:, -episodes.logp.shape[1] :], episodes.response_mask)
    kl = np.sum(np.where(episodes.response_mask, episodes.logp - episodes.logp_ref, 0.0), axis=1)
    return [
        {
            "prompt": tokenizer_lib.prompt_text(rows[int(episodes.index[b])]["prompt"]),
            "response": texts[b],
            "score": float(episodes.score[b]),
            "kl": float(kl[b]),
        }
        for b in range(min(count, len(texts)))
    ]


if __name__ == "__main__":
    cli.run(main, Config())
