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

from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n, optim
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import updates as updates_lib
from rlhf_jax.analysis import flops
from rlhf_jax.data import builders, pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import rollout, scores
from rlhf_jax.runs import checkpoint, cli, log, plots, timing
from rlhf_jax.types import (
    InputError,
    Leaf,
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
    prompt_widths: int = 1  # of rollouts: prompts of like length share one, which is as wide as they need
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
    layout: parallel.Layout,
    pessimism: float = 0.0,
    buckets: int = 1,
) -> scores.Source:
    """The function of the text where there is one, else the reward models."""
    if score_text is not None:
        return scores.text_function(score_text, rows, tokenizer, layout)
    return scores.reward_models(rewards, tokenizer.eos_token_id, pessimism, layout, buckets)


def build(
    cfg: Config,
    config: models.Config,
    judge: models.Config | None,
    eos_id: int | tuple[int, ...],
    layout: parallel.Layout,
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, `rollout.collect` and the train step on (state, base, episodes, text), placed.

    `judge` is the architecture of a critic that starts as a reward model.
    """
    updates = cfg.ppo.epochs * cfg.ppo.minibatches

    def adam(lr: float) -> optax.GradientTransformation:
        schedule = optim.schedule(cfg.schedule, lr, cfg.steps * updates, cfg.warmup)
        return optim.adamw(schedule, cfg.adam, skip_bad=cfg.skip_bad > 0)

    tx = ppo_lib.optimizer(adam(cfg.lr), adam(cfg.critic_lr))
    critic_fn = heads.critic(judge) if judge else heads.shared_critic(config)
    policy_fn = models.bind(models.Transformer(config))
    settings: dict[str, Any] = {"policy_fn": policy_fn, "critic_fn": critic_fn, "lora": cfg.lora, "tx": tx}
    settings |= {"cfg": cfg.ppo, "microbatches": cfg.devices.microbatches}
    step_fn = layout.step(functools.partial(train_step, **settings), donate=(0,))
    return tx, collecting(cfg, cfg.ppo, config, eos_id, layout, critic_fn=critic_fn), step_fn


def collecting(
    cfg: Any,
    settings: updates_lib.Config,
    config: models.Config,
    eos_id: int | tuple[int, ...],
    layout: parallel.Layout,
    **more: Any,
) -> Callable:
    """`rollout.collecting` as an experiment that learns from rollouts asks for it, and its algorithm's settings."""
    same = {name: getattr(settings, name) for name in ("temperature", "stop_at_eos", "buckets")}
    return rollout.collecting(config, layout, max_new_tokens=cfg.max_new_tokens, eos_id=eos_id, **same, **more)


def start(
    cfg: Config, tx: optax.GradientTransformation, policy: Params, critic: Params
) -> tuple[TrainState, dict[str, Params]]:
    """The state before the first rollout, and the frozen base of each network."""
    trained, frozen = {}, {}
    for name, params in {"policy": policy, "critic": critic}.items():
        trained[name], frozen[name] = lora_lib.split(params, cfg.lora, named_key(cfg.seed, f"ppo/lora/{name}"))
    return ppo_lib.init(trained, tx, cfg.ppo, named_key(cfg.seed, "ppo/updates")), cfg.compute.freeze(frozen)


def main(cfg: Config, score_text: ScoreText | None = None) -> TrainState:
    """Train, and write the run directory. A `score_text(prompt, response)` replaces the reward models' scores."""
    runs.claim(cfg.out, cfg)
    check_scored(cfg.reward, score_text)
    if score_text and cfg.pessimism:
        raise InputError("pessimism has no effect on scores that are not reward models': leave it out")
    layout = parallel.layout(cfg.devices)
    given: dict[str, Any] = {"compute": cfg.compute, "place": layout.sharding}
    policy = models.load(cfg.init, **given)
    rewards = [models.load_reward(path, **given) for path in cfg.reward]
    tokenizer = models.tokenizer_of(policy)
    held = policy if cfg.reference is None else models.load(cfg.reference, **given)
    if held.config != policy.config:
        raise InputError(f"{cfg.reference} is not of the architecture of {cfg.init}: take the model that it came from")
    others = dict(zip(cfg.reward, rewards, strict=True)) | ({cfg.reference: held} if cfg.reference else {})
    models.check_vocabularies({cfg.init: policy} | others)
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    score = scorer(rewards, score_text, rows, tokenizer, layout, cfg.pessimism, cfg.ppo.buckets)
    wide = {"length": cfg.prompt_length, "widths": cfg.prompt_widths}
    prompts = pipeline.prompts(rows, tokenizer, **wide, batch=cfg.batch, seed=cfg.seed)
    print(f"{cfg.data}: {prompts.counts}")
    judge = rewards[0] if cfg.critic == "reward" else None
    judged = judge.config if judge else None
    tx, collect, step_fn = build(cfg, policy.config, judged, tokenizer.eos_token_id, layout)
    state, frozen = start(cfg, tx, policy.params, judge.params if judge else heads.fresh(policy.config))
    base = layout.state(frozen)
    if cfg.lora.rank and held is policy:
        reference = base["policy"]
    else:
        reference = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(held.params)))  # steps use up the trained
    keys = layout.state(named_key(cfg.seed, "ppo/sampling"))

    def sample(trained: dict[str, Params], batch: Prompts, first: Leaf) -> Rollout:
        params = lora_lib.attach(base, trained, cfg.lora)
        return collect(params, reference, layout.rows(batch), keys, first)

    def step(state: TrainState, episodes: Rollout, text: Tokens | None) -> tuple[TrainState, Metrics]:
        return step_fn(state, base, episodes, text)

    known: dict = {"critic": judged, "rewards": [one.config for one in rewards], "peak": flops.peak(cfg.compute.dtype)}
    rates = functools.partial(speeds, cfg, cfg.ppo, policy.config, **known)
    policy = dataclasses.replace(policy, params=None)  # as they were loaded, models would fill the memory
    del rewards, judge, held, others
    export = lambda trained: lora_lib.merge(layout.get(base["policy"]), trained, cfg.lora)
    return train(cfg, cfg.ppo, policy, layout, state, sample, score, step, rates, rows, prompts, export=export)


def speeds(
    cfg: Any,
    settings: updates_lib.Config,
    policy: models.Config,
    values: dict[str, Any],
    *,
    critic: models.Config | None = None,
    rewards: Sequence[models.Config] = (),
    peak: float,
) -> dict[str, float]:
    """Tokens a second of each part of a step, and what it computes in tera-operations a second and as a share of the
    devices' `flops.peak`, by `flops.forward`: from the step's metrics, for `log.start`.

    "generate" counts new tokens, and computes what reference and critic say of them too; "score" counts prompts and
    responses, "update" both as often as they are learnt from, and pretraining text.
    """
    new = values["response/tokens"]
    tokens = new + values["prompt/tokens"]
    updates = settings.epochs * settings.minibatches
    scalar = lambda config, read: flops.forward(config, cfg.batch, tokens, read, logits=False) if config else 0.0
    answers = flops.forward(policy, cfg.batch, tokens, new)
    text = (updates * cfg.text_batch, cfg.text_length, cfg.text_length - 1) if cfg.text else (0, 0, 0)
    learnt = settings.epochs * (answers + scalar(critic, new)) + flops.forward(policy, *text)
    parts = {
        "generate": (cfg.batch * new, 2 * answers + scalar(critic, new)),
        "score": (cfg.batch * tokens, sum(scalar(judge, 1) for judge in rewards)),
        "update": (cfg.batch * tokens * settings.epochs + text[0] * text[1], 3 * learnt),
    }
    found: dict[str, float] = {}
    for part, (count, operations) in parts.items():
        seconds = max(values[f"seconds/{part}"], 1e-9)
        rate = operations / seconds
        found |= {f"tokens_per_s/{part}": count / seconds, f"tflops/{part}": rate / 1e12, f"mfu/{part}": rate / peak}
    return found


def train(
    cfg: Any,
    settings: updates_lib.Config,
    policy: models.Model,
    layout: parallel.Layout,
    state: TrainState,
    sample: Callable[[dict[str, Params], Prompts, Leaf], Rollout],
    score: scores.Source,
    step_fn: Callable[[TrainState, Rollout, Tokens | None], tuple[TrainState, dict]],
    rates: Callable[[dict[str, Any]], dict[str, float]],
    rows: builders.Rows,
    prompts: pipeline.Batches[Prompts],
    group: int = 1,
    export: Callable[[Params], Params] = lambda policy: policy,
) -> TrainState:
    """The loop of every experiment that learns from rollouts, and its run directory.

    `cfg` is that experiment's configuration, `settings` its algorithm's; `state` is the first. `sample` returns
    episodes for `score`, of which `group` answer each prompt; no two of its calls get the same number `first`. `rates`
    is `speeds` of that experiment; `export` makes of the trained policy the parameters to save.
    """
    tokenizer, updates = models.tokenizer_of(policy), settings.epochs * settings.minibatches
    streams = {"prompts": iter(prompts)}
    if cfg.text is not None:
        models.check_length(policy.config, text_length=cfg.text_length)
        text = sources.rows(cfg.text, "text", data_dir=cfg.data_dir)
        sizes = {"length": cfg.text_length, "batch": cfg.text_batch}
        streams["text"] = iter(pipeline.text(text, tokenizer, **sizes, seed=cfg.seed + 1))
    shown = ("reward/score", "kl/reference")
    # What was sampled is what is scored, or the first pass over a rollout finds ratios other than 1.
    bounds = {"ratio/first_error": 1e-4 if cfg.compute.dtype == "float32" else 0.1}
    state = checkpoint.resume(cfg.out / log.CHECKPOINTS, state, streams, cfg.saves)
    done, state = int(state.step), layout.state(state)
    records: dict = {"show": shown, "at_most": bounds, "skip_bad": cfg.skip_bad, "profile": cfg.profile}
    records |= {"derive": rates, "wandb": cfg.wandb}
    with (
        timing.Clock() as clock,
        log.start(cfg.out, cfg, total=cfg.steps, step=done, **records) as run,
        checkpoint.Writer(cfg.out / log.CHECKPOINTS, cfg.saves, done, cfg.steps) as saves,
    ):
        for step in range(done + 1, cfg.steps + 1):
            batch = best_of_n.repeat(next(streams["prompts"]), group)
            mix = None
            if cfg.text is not None:
                parts = [next(streams["text"]) for _ in range(updates)]
                mix = layout.rows(jax.tree.map(lambda *xs: np.stack(xs), *parts), rows_axis=1)
            clock.start()
            sampled = sample(state.params, batch, layout.state(np.uint32(step * cfg.batch)))
            clock.done("generate", sampled)
            episodes = score(sampled)
            clock.done("score", episodes)
            state, metrics = step_fn(state, episodes, mix)
            clock.done("update", metrics)
            if (step - 1) % cfg.samples_every == 0 or step == cfg.steps:
                run.samples(step, table(rows, tokenizer, layout.gather(episodes), cfg.samples))
            run.write(step, layout.get(metrics) | clock.seconds())
            if saves.due(step):
                saves.save(layout.get(state), streams, run.flush())
    state = layout.get(state)
    models.save(policy, export(state.opt_state.get("ema", state.params["policy"])), cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(
        cfg.out,
        {
            "score": ["reward/score"],
            "KL to the reference (nats a response)": ["kl/reference"],
            "entropy (nats a token)": ["policy/entropy"],
            "length (tokens)": ["response/tokens"],
            "explained variance of the critic": ["value/explained_variance"],
            "pretraining loss (nats)": ["loss/ptx"],
            "seconds": ["seconds/generate", "seconds/score", "seconds/update", "seconds/host"],
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
