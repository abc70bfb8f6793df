"""GRPO: the objective of PPO without a critic, from groups of answers to the same prompt.

As DeepSeekMath (arXiv:2402.03300), with KL penalty and pretraining mix as in `ppo`, so that the two can be compared at
an equal number of episodes. Dr. GRPO, DAPO, GSPO, CISPO and REINFORCE++ are settings of it, see
`rlhf_jax/algorithms/grpo.py`.

Run:     python -m experiments.grpo --init runs/sft/model --reward runs/reward/model
Parent:  ppo
Result:  from a quickstart's models, seed 0: gold 0.465 -> 0.675 at 0.28 nats, loss on held-out text 0.613 -> 0.616
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n, optim, updates
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import rewards as rewards_lib
from rlhf_jax.analysis import flops, rates
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.rollouts import rollout, sampling, scores, tokens
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive, Whole
from rlhf_jax.types import InputError, TrainState, named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/grpo")  # run directory; the model goes to its folder "model"
    init: Path = Path("runs/sft/model")  # model directory of the policy and of the frozen reference model
    reward: tuple[Path, ...] = (Path("runs/reward/model"),)  # reward models, whose scores are averaged or weighted
    judge: judge_lib.Config = judge_lib.Config()  # scores in place of the reward models, by a rubric
    process: scores.Process = scores.Process()  # rewards of steps or tokens in place of the reward models' scores
    cost: Path | None = None  # cost model, whose mean score algorithm.rewards.threshold bounds; None: no constraint
    data: str = "world:rows=8000"  # source of prompts: the world or a .jsonl file
    text: str | None = "world:rows=60000"  # source of pretraining text to mix in; None: no text
    prompt_length: Count = 20  # most tokens of a prompt; longer ones are refused, or lose their oldest turns
    prompt_widths: Count = 1  # group prompts by length into so many widths of rollouts, to save padding
    max_new_tokens: Count = 16  # most tokens of an answer
    slots: Whole = 0  # episodes at a time on each device, the next in the place of one that has ended; 0: all at once
    text_length: Count = 64  # tokens in a row of pretraining text
    batch: Count = 64  # episodes a step, over all devices; a multiple of the group
    text_batch: Count = 8  # rows of pretraining text an update, over all devices
    steps: Count = 70  # number of rollouts, each followed by updates
    lr: Positive = 3e-4  # peak learning rate
    schedule: optim.Schedule = "cosine"  # decay of the learning rate: cosine to 10 %, linear to 0, or none
    warmup: Whole = 8  # updates of linear learning-rate warm-up
    adam: optim.Adam = optim.Adam()
    algorithm: grpo_lib.Config = grpo_lib.Config(
        minibatches=4, group=4, kl_coef=0.2, kl_in="reward", ptx_coef=3.0, unfinished_score=-1.0
    )
    lora: lora_lib.Config = lora_lib.Config()
    # Further rollouts a step, at most, from which groups take the place of those whose scores are all equal (DAPO).
    resample: Whole = 0
    samples_every: Count = 20  # number of steps between tables of samples
    samples: Count = 8  # number of episodes in a table of samples
    token_samples: Whole = 16  # number of episodes to record token by token at those steps, for `report`; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.algorithm.group:
            raise InputError(f"batch={self.batch}: expected a multiple of the group of {self.algorithm.group} answers")
        rewards = self.algorithm.rewards
        rewards.check(len(self.reward), self.cost is not None)
        if self.resample and rewards != rewards_lib.Config():
            raise InputError("resample compares scores before algorithm.rewards changes them: leave out one of them")
        if self.process.model is not None:
            rewards.check_process()


def build(
    cfg: Config,
    config: models.Config,
    eos_id: int | tuple[int, ...],
    layout: parallel.Layout,
    train_step: Callable,
) -> tuple[optax.GradientTransformation, Callable, Callable]:
    """The optimiser, and the compiled `rollout.collect` and train step, which takes (state, base, episodes, text)."""
    algorithm = cfg.algorithm
    schedule = optim.schedule(cfg.schedule, cfg.lr, cfg.steps * algorithm.epochs * algorithm.minibatches, cfg.warmup)
    tx = optim.adamw(schedule, cfg.adam, skip_bad=cfg.skip_bad > 0)
    step = lora_lib.on_base(
        cfg.lora,
        lambda on: functools.partial(
            train_step,
            policy_fn=on(models.part("policy", models.logprobs_fn(config))),
            tx=tx,
            cfg=algorithm,
            microbatches=cfg.devices.microbatches,
            balance=models.balance_weight(cfg.balance, config),
        ),
    )
    sampled = sampling.Config(
        max_new_tokens=cfg.max_new_tokens,
        temperature=algorithm.temperature,
        eos_id=eos_id,
        stop_at_eos=algorithm.stop_at_eos,
        group=algorithm.group,
        slots=cfg.slots,
    )
    return tx, rollout.collector(config, layout, sampled, buckets=algorithm.buckets), layout.step(step, donate=(0,))


def main(
    cfg: Config,
    train_step: Callable = grpo_lib.train_step,
    score_text: scores.ScoreText | None = None,
    assess: Callable = grpo_lib.assess,
) -> TrainState:
    """Train, and write the run directory; returns the final state on the host.

    `train_step` and `assess` are those of `grpo`, or of `rloo` with its settings. `score_text` replaces the reward
    models' scores.
    """
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    algorithm, layout = cfg.algorithm, parallel.layout(cfg.devices)
    other = scores.other(score_text, cfg.judge, cfg.process, layout, cfg.compute, cfg.seed, cfg.reward)
    reward = () if other is not None and score_text is None and cfg.reward == Config.reward else cfg.reward
    if (reward or algorithm.rewards.weights) and other is not None:
        raise InputError("reward and weights have no effect on scores that are not reward models': leave them out")
    policy = models.load(cfg.init, compute=cfg.compute, place=layout.sharding)
    scorers = scores.load(reward, cfg.cost, layout, cfg.compute, algorithm.rewards)
    loaded = {cfg.init: policy} | scores.named(scorers, other)
    models.check_vocabularies(loaded)
    tokenizer = models.tokenizer_of(policy, cfg.control_tokens)

    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    prompts = pipeline.prompts(
        rows,
        tokenizer,
        length=cfg.prompt_length,
        widths=cfg.prompt_widths,
        batch=cfg.batch // algorithm.group,
        seed=cfg.seed,
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

    score = scores.scorer(scorers, other, rows, policy, layout, algorithm.buckets, algorithm.group)
    tx, collect, step_fn = build(cfg, policy.config, models.stop_ids(policy), layout, train_step)
    refill = (
        layout.step(functools.partial(grpo_lib.refill, group=algorithm.group, cfg=algorithm)) if cfg.resample else None
    )
    trained, frozen = lora_lib.split(policy.params, cfg.lora, named_key(cfg.seed, "grpo/lora"))
    state = updates.init({"policy": trained}, tx, algorithm, named_key(cfg.seed, "grpo/updates"))
    base = layout.state(cfg.compute.freeze({"policy": frozen}))
    if cfg.lora.rank:
        reference = base["policy"]
    else:  # a copy, since the train step donates the buffers of the policy
        reference = layout.frozen(jax.tree.map(jnp.copy, cfg.compute.freeze(policy.params)))
    del trained, frozen
    key = layout.state(named_key(cfg.seed, "grpo/sampling"))
    assessed = functools.partial(assess, cfg=algorithm)
    recorder = tokens.Recorder(policy.config, layout, assessed, algorithm.temperature, rows, tokenizer)
    answer = lambda params, *asked: score(collect(params, *asked))
    recorder.watch(
        cfg.token_samples,
        answer,
        best_of_n.repeat(next(iter(prompts)), algorithm.group),
        named_key(cfg.seed, "grpo/watched"),
    )
    limits = runs.Limits(
        show=("reward/score", "kl/reference"),
        at_most=updates.ratio_limits(cfg.compute, routed=policy.config.experts is not None),
        derive=rates.Rates(
            policy=policy.config,
            critic=None,
            rewards=scores.readers(scorers, other),
            batch=cfg.batch,
            epochs=algorithm.epochs,
            text_rows=updates_a_step * cfg.text_batch if cfg.text else 0,
            text_length=cfg.text_length,
            peak=flops.peak(cfg.compute.dtype),
            group=algorithm.group if cfg.compute.shares(cfg.prompt_length, cfg.max_new_tokens, algorithm.group) else 1,
            learnt=algorithm.learnt,
        ),
    )
    policy = dataclasses.replace(policy, params=None)  # free the memory of the loaded parameters
    del scorers, other, loaded

    with runs.Run(cfg, layout, state, streams, cfg.steps, limits, runs.SEED | updates.IN_STATE) as run:
        state = run.state
        for step in run:
            text_rows = None
            if cfg.text is not None:
                text_rows = layout.rows(pipeline.take(run.streams["text"], updates_a_step), rows_axis=1)
            params = lora_lib.attach(base, state.params, cfg.lora) | {"reference": reference}
            for attempt in range(1 + cfg.resample):
                batch = best_of_n.repeat(next(run.streams["prompts"]), algorithm.group)
                first = (step * (1 + cfg.resample) + attempt) * cfg.batch  # so that no two rollouts share noise
                run.clock.start()
                sampled = collect(params, layout.rows(batch), key, layout.state(np.uint32(first)))
                run.clock.done("generate", sampled)
                fresh = score(sampled)
                run.clock.done("score", fresh)
                if refill is None:
                    episodes = fresh
                    break
                episodes, flat = refill(episodes, fresh) if attempt else refill(fresh, None)
                if not layout.get(flat):
                    break
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
    learnt = state.opt_state.get("ema", state.params["policy"])
    models.save(policy, lora_lib.merge(layout.get(base["policy"]), learnt, cfg.lora), cfg.out / "model")
    runs.share(cfg.out / "model")
    plots.curves(cfg.out, plots.ROLLOUTS)
    return state


if __name__ == "__main__":
    cli.run(main, Config())
