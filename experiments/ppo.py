"""PPO: the fine-tuned model learns to get high scores from the reward model, with a KL penalty to where it started.

As InstructGPT (arXiv:2203.02155): the reward has a KL penalty to the fine-tuned model, the critic starts from the
reward model, each batch of episodes is used for one pass of minibatches, and pretraining gradients are mixed in (ptx).

Run:     python -m experiments.ppo --init runs/sft/model --reward runs/reward/model
Parent:  none
Result:  in the quickstart, seed 0: gold 0.465 -> 0.742 at 0.37 nats, loss on held-out text 0.613 -> 0.622
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim, updates
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.analysis import flops, rates
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout, sampling, scores, tokens
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, NonNegative, Positive, Whole
from rlhf_jax.types import InputError, Params, TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/ppo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy
    reference: Path | None = None  # model directory of the frozen reference model; None: `init`
    reward: tuple[Path, ...] = (Path("runs/reward/model"),)  # reward models, whose scores are averaged or weighted
    judge: judge_lib.Config = judge_lib.Config()  # scores in place of the reward models, by a rubric
    process: scores.Process = scores.Process()  # rewards of steps or tokens in place of the reward models' scores
    cost: Path | None = None  # cost model, whose mean score algorithm.rewards.threshold bounds; None: no constraint
    critic: Literal["reward", "policy"] = "reward"  # separate network (from the first reward model), or policy head
    pessimism: NonNegative = 0.0  # number of the reward models' standard deviations to subtract from their mean
    data: str = "world:rows=8000"  # source of prompts: the world or a .jsonl file
    text: str | None = "world:rows=60000"  # source of pretraining text to mix in; None: no text
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    prompt_widths: Count = 1  # group prompts by length into so many widths of rollouts, to save padding
    max_new_tokens: Count = 16  # most tokens of an answer
    slots: Whole = 0  # episodes at a time on each device, the next in the place of one that has ended; 0: all at once
    text_length: Count = 64  # tokens in a row of pretraining text
    batch: Count = 64  # episodes a step, over all devices
    text_batch: Count = 8  # rows of pretraining text an update, over all devices
    steps: Count = 70  # number of rollouts, each followed by updates
    lr: Positive = 3e-4  # peak learning rate of the policy
    critic_lr: Positive = 1e-3  # peak learning rate of the critic
    schedule: optim.Schedule = "cosine"  # decay of both learning rates: cosine to 10 %, linear to 0, or none
    warmup: Whole = 8  # updates of linear learning-rate warm-up
    adam: optim.Adam = optim.Adam()
    algorithm: ppo_lib.Config = ppo_lib.Config(minibatches=4, kl_coef=0.2, ptx_coef=3.0, unfinished_score=-1.0)
    lora: lora_lib.Config = lora_lib.Config()  # low-rank adapters of policy and critic
    samples_every: Count = 20  # number of steps between tables of samples
    samples: Count = 8  # number of episodes in a table of samples
    token_samples: Whole = 16  # number of episodes to record token by token at those steps, for `report`; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward and self.critic == "reward":
            raise InputError("critic=reward starts from a reward model: name one by --reward, or use --critic policy")
        if self.pessimism and len(self.reward) < 2:
            raise InputError("pessimism needs the disagreement of several reward models: name more by --reward")
        if (first := self.algorithm.critic_first) >= self.steps:
            raise InputError(f"algorithm.critic_first={first}: expected less than steps={self.steps}")
        self.algorithm.rewards.check(len(self.reward), self.cost is not None, self.pessimism)
        if self.process.model is not None:
            self.algorithm.rewards.check_process()


def build(
    cfg: Config,
    config: models.Config,
    critic: models.Config | None,
    eos_id: int | tuple[int, ...],
    layout: parallel.Layout,
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, and the compiled `rollout.collect` and train step, which takes (state, base, episodes, text).

    `critic` is the architecture of a critic that starts from a reward model; None is a head on the policy.
    """
    algorithm = cfg.algorithm
    updates_a_step = algorithm.epochs * algorithm.minibatches
    wait = algorithm.critic_first * updates_a_step

    def adam(lr: float, total: int) -> optax.GradientTransformation:
        return optim.adamw(optim.schedule(cfg.schedule, lr, total, cfg.warmup), cfg.adam, skip_bad=cfg.skip_bad > 0)

    total = cfg.steps * updates_a_step
    tx = ppo_lib.optimizer(adam(cfg.lr, total - wait), adam(cfg.critic_lr, total), wait)
    policy_fn = models.part("policy", models.logprobs_fn(config))
    critic_fn = heads.critic(critic) if critic else heads.shared_critic(config)
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            ppo_lib.train_step,
            policy_fn=on(policy_fn),
            critic_fn=on(critic_fn),
            tx=tx,
            cfg=algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config, critic),
        ),
    )
    new, stop, slots = cfg.max_new_tokens, algorithm.stop_at_eos, cfg.slots
    sampled = sampling.Config(new, algorithm.temperature, eos_id=eos_id, stop_at_eos=stop, slots=slots)
    collect = rollout.collector(config, layout, sampled, critic_fn, algorithm.buckets)
    return tx, collect, layout.step(step, donate=(0,))


def start(
    cfg: Config, tx: optax.GradientTransformation, policy: Params, critic: Params
) -> tuple[TrainState, dict[str, Params]]:
    """The state before the first rollout, and the frozen base weights of each network (empty without LoRA)."""
    trained, frozen = {}, {}
    for name, params in {"policy": policy, "critic": critic}.items():
        trained[name], frozen[name] = lora_lib.split(params, cfg.lora, named_key(cfg.seed, f"ppo/lora/{name}"))
    return ppo_lib.init(trained, tx, cfg.algorithm, named_key(cfg.seed, "ppo/updates")), cfg.compute.freeze(frozen)


def main(cfg: Config, score_text: scores.ScoreText | None = None) -> TrainState:
    """Train, and write the run directory; returns the final state. `score_text` replaces the reward models' scores."""
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    algorithm, layout = cfg.algorithm, parallel.layout(cfg.devices)
    other = scores.other(score_text, cfg.judge, cfg.process, layout, cfg.compute, cfg.seed, cfg.reward)
    if other is not None and (cfg.pessimism or algorithm.rewards.weights):
        raise InputError("pessimism and weights have no effect on scores that are not reward models': leave them out")
    load = functools.partial(models.load, compute=cfg.compute, place=layout.sharding)
    policy, reference = load(cfg.init), load(cfg.reference) if cfg.reference else None
    scorers = scores.load(cfg.reward, cfg.cost, layout, cfg.compute, algorithm.rewards, cfg.pessimism)
    if reference and reference.config != policy.config:
        raise InputError(f"{cfg.reference} is not of the architecture of {cfg.init}: take the model that it came from")
    loaded = {cfg.init: policy} | scores.named(scorers, other)
    loaded |= {cfg.reference: reference} if cfg.reference and reference else {}
    models.check_vocabularies(loaded)
    tokenizer = models.tokenizer_of(policy, cfg.control_tokens)

    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    prompts = pipeline.prompts(
        rows, tokenizer, length=cfg.prompt_length, widths=cfg.prompt_widths, batch=cfg.batch, seed=cfg.seed
    )
    print(f"{cfg.data}: {prompts.counts}")
    streams: dict[str, pipeline.Batches] = {"prompts": prompts}
    updates_a_step = algorithm.epochs * algorithm.minibatches
    if cfg.text is not None:
        models.check_length(policy.config, cfg.text_length, "text_length")
        text = sources.rows(cfg.text, "text", data_dir=cfg.data_dir)
        streams["text"] = pipeline.text(
            text, tokenizer, length=cfg.text_length, batch=cfg.text_batch, seed=cfg.seed + 1
        )

    critic = scorers.rewards[0] if cfg.critic == "reward" else None
    score = scores.scorer(scorers, other, rows, policy, layout, algorithm.buckets)
    critic_config, eos_id = critic.config if critic else None, models.stop_ids(policy)
    tx, collect, step_fn = build(cfg, policy.config, critic_config, eos_id, layout)
    state, frozen = start(cfg, tx, policy.params, critic.params if critic else heads.fresh(policy.config))
    base = layout.state(frozen)
    if cfg.lora.rank and not reference:
        reference_params = base["policy"]
    else:  # a copy, since the train step donates the buffers of the policy
        reference_params = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze((reference or policy).params)))
    key = layout.state(named_key(cfg.seed, "ppo/sampling"))
    assessed = functools.partial(ppo_lib.assess, cfg=algorithm)
    recorder = tokens.Recorder(policy.config, layout, assessed, algorithm.temperature, rows, tokenizer)
    answer = lambda params, *asked: score(collect(params, *asked))
    recorder.watch(cfg.token_samples, answer, next(iter(prompts)), named_key(cfg.seed, "ppo/watched"))
    limits = runs.Limits(
        show=("reward/score", "kl/reference"),
        at_most=updates.ratio_limits(cfg.compute, routed=policy.config.experts is not None),
        derive=rates.Rates(
            policy=policy.config,
            critic=critic_config,
            rewards=scores.readers(scorers, other),
            batch=cfg.batch,
            epochs=algorithm.epochs,
            text_rows=updates_a_step * cfg.text_batch if cfg.text else 0,
            text_length=cfg.text_length,
            peak=flops.peak(cfg.compute.dtype),
        ),
    )
    policy = dataclasses.replace(policy, params=None)  # free the memory of the loaded parameters
    del scorers, other, critic, reference, loaded, frozen

    in_state = runs.SEED | updates.IN_STATE | {"algorithm.kl_coef": "opt_state/kl_coef"}  # it adapts
    with runs.Run(cfg, layout, state, streams, cfg.steps, limits, in_state) as run:
        state = run.state
        for step in run:
            batch = next(run.streams["prompts"])
            text_rows = None
            if cfg.text is not None:
                text_rows = layout.rows(pipeline.take(run.streams["text"], updates_a_step), rows_axis=1)
            run.clock.start()
            params = lora_lib.attach(base, state.params, cfg.lora) | {"reference": reference_params}
            sampled = collect(params, layout.rows(batch), key, layout.state(np.uint32(step * cfg.batch)))
            run.clock.done("generate", sampled)
            episodes = score(sampled)
            run.clock.done("score", episodes)
            if due := (step - 1) % cfg.samples_every == 0 or step == cfg.steps:
                seen = recorder.before(state, params, episodes)
                run.clock.done("record", [part.reference for part in seen])
            state, metrics = step_fn(state, base, episodes, text_rows)
            run.clock.done("update", metrics)
            if due:
                run.samples(step, rollout.table(rows, tokenizer, layout.gather(episodes), cfg.samples))
                run.tokens(step, recorder.after(seen, lora_lib.attach(base, state.params, cfg.lora)["policy"]))
            run.record(step, state, metrics)
    state = layout.get(state)
    trained = state.opt_state.get("ema", state.params["policy"])
    models.save(policy, lora_lib.merge(layout.get(base["policy"]), trained, cfg.lora), cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(cfg.out, plots.ROLLOUTS | {"explained variance of the critic": ["value/explained_variance"]})
    return state


if __name__ == "__main__":
    cli.run(main, Config())
