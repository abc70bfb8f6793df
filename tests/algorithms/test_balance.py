"""The load-balancing loss, from the routers of a mixture of experts to the metrics of each train step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import balance, dpo, optim, ppo, reward, sft, updates
from rlhf_jax.devices import parallel, shared
from rlhf_jax.models import experts, heads, layers, lora, rope, transformer
from rlhf_jax.types import Tokens
from tests import tiny
from tests.algorithms import test_dpo, test_ppo, test_reward, test_sft

CONFIG = tiny.CONFIGS["mixtral"]
PARAMS = tiny.policy(CONFIG)
LOGPROBS = models.logprobs_fn(CONFIG)
TX = optax.sgd(1.0)  # whose update is the gradient
WEIGHT = 0.5


def test_the_weight_lies_beside_the_layers_of_each_network():
    policy = {"blocks": {"x": jnp.ones(2)}, "embedding": jnp.ones(3)}
    params = {"policy": policy, "critic": {"trunk": {"blocks": {}}, "kernel": jnp.ones(2)}, "head": {"bias": 0.0}}
    assert balance.attach(params, 0.0, 4, None) is params
    attached = balance.attach(params, 0.5, 4, None)
    np.testing.assert_array_equal(attached["policy"]["balance"], [0.125, 0.0])
    np.testing.assert_array_equal(attached["critic"]["trunk"]["balance"], [0.125, 0.0])
    assert attached["head"] == params["head"]
    attached["policy"]["balance"] = jnp.array([3.0, 2.0])
    attached["critic"]["trunk"]["balance"] = jnp.zeros(2)
    grads, metrics = balance.detach(attached)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert metrics == {"loss/balance/policy": 1.5, "loss/balance/critic": 0.0}
    assert balance.detach(balance.attach(policy, 1.0, 1, None))[1].keys() == {"loss/balance"}


@jax.jit
def by_hand(params, rows):
    """The mean of each router's loss, from what goes into the routers."""
    view = layers.whole_view(CONFIG, rows.segment, rope.rotary_table(rows.tokens.shape[1], CONFIG))
    x, losses = params["embedding"][rows.tokens], []
    for n, layer in enumerate(transformer.layers_of(params, CONFIG)):
        ((x, _), _), seen = transformer.Block(CONFIG).apply(
            {"params": layer},
            (x, None),
            n,
            view,
            capture_intermediates=lambda module, _: module.name == "router",
            mutable=["intermediates"],
        )
        (logits,) = seen["intermediates"]["mlp"]["router"]["__call__"]
        probability = jax.nn.softmax(logits)
        chosen = jax.lax.top_k(probability, CONFIG.experts.active)[1]
        losses.append(experts.balance_loss(probability, chosen, rows.segment > 0))
    return jnp.mean(jnp.array(losses))


def metric(params, rows):
    """The mean over rows that are not all padding."""
    return by_hand(params, rows) / jnp.mean(jnp.any(rows.segment > 0, axis=1))


@functools.partial(jax.jit, static_argnames=("weight", "unroll"))
def tuned(params, rows, weight, unroll=None):
    config = dataclasses.replace(CONFIG, compute=models.Compute(unroll=unroll))
    state = optim.init(params, TX, jax.random.key(0))
    state, metrics = sft.train_step(
        state, rows, logprobs_fn=models.logprobs_fn(config), tx=TX, microbatches=1, balance=weight
    )
    return state.params, metrics


@pytest.mark.slow
def test_a_step_descends_the_sum_of_both_losses():
    """As scanned layers do, so do unrolled ones, whose last one would else compute some columns alone."""
    rows = test_sft.batch(0)

    def whole(params):
        count = jnp.sum(rows.target[:, 1:])
        return sft.loss(params, rows, LOGPROBS, count=count) + WEIGHT * by_hand(params, rows)

    value, grads = jax.jit(jax.value_and_grad(whole))(PARAMS)
    for unroll in (True, False):
        params, metrics = tuned(PARAMS, rows, WEIGHT, unroll)
        tiny.assert_close(jax.tree.map(jnp.subtract, PARAMS, params), grads, atol=2e-5)
        np.testing.assert_allclose(metrics["loss/next_token"] + WEIGHT * metrics["loss/balance"], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)


ONE = parallel.layout(devices=jax.devices()[:1])
OTHERS = [parallel.layout(), parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))]


def placed(layout, step, state, *rows, microbatches=1):
    step = layout.step(functools.partial(step, balance=WEIGHT, microbatches=microbatches))
    state, metrics = step(layout.state(state), *(layout.rows(x) if x is not None else None for x in rows))
    return layout.get(state).params, layout.get(metrics)


@pytest.mark.slow
def test_one_device_and_its_micro_batches_equal_eight_and_experts_that_are_spread(monkeypatch):
    monkeypatch.setattr(experts, "compute_all", experts.compute_sorted)
    step = functools.partial(sft.train_step, logprobs_fn=LOGPROBS, tx=TX)
    state, rows = optim.init(PARAMS, TX, jax.random.key(0)), test_sft.batch(0)
    expected = placed(ONE, step, state, rows, microbatches=4)
    assert 0.9 < expected[1]["loss/balance"] < 4
    for layout in OTHERS:
        tiny.assert_close(placed(layout, step, state, rows), expected, atol=2e-5)


@pytest.mark.slow
def test_a_reward_model_s_micro_batches_equal_the_whole():
    step = functools.partial(reward.train_step, score_fn=heads.score_fn(CONFIG), tx=TX)
    state, rows = optim.init(tiny.scalar(CONFIG), TX, jax.random.key(0)), test_reward.batch(0)
    found = [placed(ONE, step, state, rows, microbatches=parts) for parts in (1, 4)]
    assert found[0][1]["loss/balance"] > 0.9
    tiny.assert_close(*found, atol=2e-5)


@pytest.mark.slow
def test_a_reference_has_no_part_in_it():
    rows, other = test_dpo.batch(0), tiny.policy(CONFIG, seed=3)
    step = functools.partial(dpo.train_step, logprobs_fn=LOGPROBS, tx=TX, cfg=dpo.Config())
    state = optim.init(PARAMS, TX, jax.random.key(0))
    _, metrics = jax.jit(functools.partial(step, balance=WEIGHT))(state, rows, other)
    flat = rows.tokens.reshape(-1, rows.tokens.shape[2]), rows.mask.reshape(-1, rows.mask.shape[2])
    texts = Tokens(tokens=flat[0], segment=flat[1].astype(int), target=flat[1])
    np.testing.assert_allclose(metrics["loss/balance"], metric(PARAMS, texts), rtol=1e-5)


@pytest.mark.slow
def test_answers_that_share_a_prompt_are_balanced_as_rows_of_their_own():
    tokens, mask = tiny.random_tokens(0, 4, 9), np.arange(9)[None] < np.array([[9], [6], [7], [0]])
    tokens[1::2, :3] = tokens[::2, :3]  # the last row is absent
    logits = models.bind(models.Transformer(CONFIG))

    def measured(tokens, segment):
        read = lambda params: jnp.sum(logits(params, tokens, segment))
        return balance.detach(jax.jit(jax.grad(read))(balance.attach(PARAMS, WEIGHT, 1, None)))[1]["loss/balance"]

    alone = measured(jnp.array(tokens), jnp.array(mask))
    np.testing.assert_allclose(measured(*shared.fork(jnp.array(tokens), jnp.array(mask), 3, 2)), alone, rtol=1e-5)


@pytest.mark.slow
def test_adapters_learn_it_through_a_frozen_router():
    cfg = lora.Config(rank=2, kernels=("qkv",))
    trained, base = lora.split(PARAMS, cfg, jax.random.key(1))
    step = lora.on_base(
        cfg, lambda on: functools.partial(sft.train_step, logprobs_fn=on(LOGPROBS), tx=TX, balance=WEIGHT)
    )
    state, metrics = jax.jit(step)(optim.init(trained, TX, jax.random.key(0)), base, test_sft.batch(0))
    assert jax.tree.structure(state.params) == jax.tree.structure(trained) and metrics["loss/balance"] > 0.9


@pytest.mark.slow
def test_ppo_balances_what_the_policy_reads():
    """Which is responses and pretraining text; a critic on its trunk adds nothing."""
    tx = ppo.optimizer(TX, TX)
    cfg = ppo.Config(minibatches=1, epochs=1, ptx_coef=1.0)
    step = functools.partial(
        ppo.train_step,
        policy_fn=models.part("policy", LOGPROBS),
        critic_fn=heads.shared_critic(CONFIG),
        tx=tx,
        cfg=cfg,
        balance=WEIGHT,
    )
    rollout, text = test_ppo.episodes(0), test_ppo.text(0, 1)
    state = ppo.init({"policy": PARAMS, "critic": heads.fresh(CONFIG)}, tx, cfg, jax.random.key(0))
    _, metrics = jax.jit(step)(state, rollout, text)
    responses = Tokens(tokens=rollout.tokens, segment=rollout.mask.astype(int), target=rollout.mask)
    both = [metric(PARAMS, rows) for rows in (responses, jax.tree.map(lambda x: x[0], text))]
    np.testing.assert_allclose(metrics["loss/balance/policy"], np.mean(both), rtol=1e-5)
    assert "loss/balance/critic" not in metrics and metrics.keys() >= {"grad_norm/policy", "grad_norm/critic"}


def test_models_without_experts_have_none():
    assert models.balance_weight(0.5, tiny.GPT, None) == 0.0
    assert models.balance_weight(0.5, tiny.GPT, CONFIG) == 0.5
    assert updates.ratio_limits(models.Compute(), routed=False) == {"ratio/first_error": 1e-4}
    assert updates.ratio_limits(models.Compute(), routed=True) == {}
