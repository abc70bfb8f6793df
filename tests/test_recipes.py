"""The published recipes at their full sizes: each train step is traced and lowered on shapes alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import instructgpt, ppo, reward, sft, tldr_stiennon2020
from rlhf_jax import heads, models, optim, rollout, transformer
from rlhf_jax import ppo as ppo_lib
from rlhf_jax import reward as reward_lib
from rlhf_jax import sft as sft_lib
from rlhf_jax.types import Prompts, Rankings, Tokens

KEY = jax.eval_shape(lambda: jax.random.key(0))
RECIPES = {"instructgpt": instructgpt, "tldr": tldr_stiennon2020}
CASES = [  # of each kind, the largest among them
    *(("instructgpt", stage) for stage in ("sft-175b", "init-6b", "reward", "ppo-1.3b", "ppo-175b")),
    *(("tldr", stage) for stage in ("sft-1.3b", "reward-6.7b", "ppo-6.7b")),
]


def of(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def tokens(*shape):
    return Tokens(tokens=of(shape), segment=of(shape), target=of(shape, bool))


def scalar_shapes(config):
    make = lambda policy, key: heads.from_policy(policy, config, key)
    return jax.eval_shape(make, transformer.parameter_shapes(config), KEY)


def tuning(cfg, config):
    """The state, batch and step of `sft`."""
    tx = optim.adamw(optim.cosine(cfg.lr, 100), weight_decay=cfg.weight_decay)
    apply_fn = transformer.bind(transformer.Transformer(dataclasses.replace(config, dropout=cfg.dropout)))
    state = jax.eval_shape(lambda params, key: optim.init(params, tx, key), transformer.parameter_shapes(config), KEY)
    rows = cfg.batch + (cfg.text_batch if cfg.text else 0)
    return functools.partial(sft_lib.train_step, apply_fn=apply_fn, tx=tx), state, (tokens(rows, cfg.length),)


def judging(cfg, config, responses):
    """The same of `reward`."""
    tx = optim.adamw(optim.cosine(cfg.lr, 100), weight_decay=cfg.weight_decay)
    apply_fn = transformer.bind(heads.ScalarModel(config))
    state = jax.eval_shape(lambda params, key: optim.init(params, tx, key), scalar_shapes(config), KEY)
    shape = (cfg.batch, responses, cfg.length)
    batch = Rankings(tokens=of(shape), mask=of(shape, bool), start=of(shape[:1]), rank=of(shape[:2]))
    return functools.partial(reward_lib.train_step, apply_fn=apply_fn, tx=tx, cfg=cfg.reward), state, (batch,)


def improving(cfg, config, judge):
    """The same of `ppo`, on what `rollout.collect` yields."""
    adam = [optim.adamw(optim.schedule(cfg.schedule, lr, 100, cfg.warmup), cfg.adam) for lr in (cfg.lr, cfg.critic_lr)]
    tx = ppo_lib.optimizer(*adam)
    policy_fn, critic_fn = transformer.bind(transformer.Transformer(config)), heads.critic(judge)
    params = {"policy": transformer.parameter_shapes(config), "critic": scalar_shapes(judge)}
    state = jax.eval_shape(lambda params, key: ppo_lib.init(params, tx, cfg.ppo, key), params, KEY)
    shape = (cfg.batch, cfg.prompt_length)
    collect = functools.partial(
        rollout.collect,
        policy=models.Model(config, None, None, policy_fn),
        policy_fn=policy_fn,
        critic_fn=critic_fn,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.ppo.temperature,
        eos_id=0,
        stop_at_eos=cfg.ppo.stop_at_eos,
    )
    prompts = Prompts(tokens=of(shape), mask=of(shape, bool), index=of(shape[:1]))
    episodes = jax.eval_shape(collect, params, params["policy"], prompts, KEY, of((), jnp.uint32))
    assert episodes.logp.shape == (cfg.batch, cfg.max_new_tokens)
    updates = cfg.ppo.epochs * cfg.ppo.minibatches
    text = tokens(updates, cfg.text_batch, cfg.text_length) if cfg.text else None
    step = functools.partial(ppo_lib.train_step, policy_fn=policy_fn, critic_fn=critic_fn, tx=tx, cfg=cfg.ppo)
    return step, state, (episodes.replace(score=of(shape[:1], jnp.float32)), text)


def prepared(recipe, stage, **shape):
    """Step, state and batch of a stage; `shape` replaces settings of its models."""
    module = RECIPES[recipe]
    main, cfg = module.STAGES[stage]
    size = stage.partition("-")[2] or "6b"
    model = lambda size: dataclasses.replace(transformer.preset(module.MODELS[size]), compute=cfg.compute, **shape)
    if main is sft.main:
        return tuning(cfg, model(size))
    if main is reward.main:
        return judging(cfg, model(size), responses=9 if recipe == "instructgpt" else 2)
    assert main is ppo.main
    return improving(cfg, model(size), model("6b" if recipe == "instructgpt" else size))


@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_a_step_of_full_size_is_lowered(recipe, stage):
    step, state, batch = prepared(recipe, stage)
    lowered = jax.jit(step, donate_argnums=0).lower(state, *batch)
    after, metrics = lowered.out_info
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(after) == shapes(state)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())


def test_sizes_are_those_of_the_papers():
    for module in RECIPES.values():
        for size, name in module.MODELS.items():
            billions = {"1.3b": 1.32, "6b": 6.7, "6.7b": 6.7, "175b": 174.6}[size]
            assert transformer.parameter_count(transformer.preset(name)) / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_largest_compiles():
    step, state, batch = prepared("instructgpt", "sft-175b")
    memory = jax.jit(step, donate_argnums=0).lower(state, *batch).compile().memory_analysis()
    weights = sum(x.size for x in jax.tree.leaves(state.params))
    assert memory.argument_size_in_bytes == pytest.approx(12 * weights, rel=0.01)  # and Adam's two moments, in float32
