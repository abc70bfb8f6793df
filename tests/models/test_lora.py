import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import sft as sft_experiment
from rlhf_jax import models
from rlhf_jax.algorithms import optim, ppo, reward, sft
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads, layers, lora
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli
from rlhf_jax.types import InputError, Prompts, Rankings, Tokens
from tests import tiny
from tests.algorithms.test_sft import batch

CFG = lora.Config(rank=3, alpha=4.5)
BOTH = pytest.mark.parametrize("config", [tiny.GPT, tiny.LLAMA], ids=["gpt", "llama"])
TOKENS, MASK = tiny.arrays((tiny.random_tokens(0, 3, 6), tiny.ragged(1, 3, 6)))
TX = optim.adamw(1e-3, weight_decay=0.1)


def sft_step(config, cfg=CFG):
    network = models.logprobs_fn(config)
    return lora.on_base(cfg, lambda on: functools.partial(sft.train_step, logprobs_fn=on(network), tx=TX))


SFT = sft_step(dataclasses.replace(tiny.GPT, dropout=0.1))


def parts(params, cfg=CFG):
    """(trained, base), as training may have left them: no adapter is 0."""
    trained, base = lora.split(params, cfg, jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.3, x.shape), x.dtype), trained), base


def sft_state(trained):
    return optim.init(trained, TX, jax.random.key(0))


def names(tree) -> set[str]:
    return {"/".join(path) for path in flatten_dict(tree)}


def copied(tree):
    return jax.tree.map(np.array, tree)


def test_a_linear_map_by_hand():
    base = {"kernel": jnp.array([[0.5, 1.0], [2.0, -1.0]])}
    trained = {"kernel_a": jnp.array([[1.5, 0.0], [0.25, 1.0]]), "kernel_b": jnp.array([[3.0, -2.0], [0.5, 1.0]])}
    cfg = lora.Config(rank=2, alpha=1.0)
    linear = layers.Linear(tiny.LLAMA, (2,), (2,), 0.02, bias=False)
    apply = lambda params: linear.apply({"params": params}, jnp.array([[[1.0, -2.0]]]))
    # x W = (-3.5, 3); x A = (1, -2); x A B = (2, -4), of which half.
    np.testing.assert_allclose(apply(lora.attach(base, trained, cfg)), [[[-2.5, 1.0]]], rtol=1e-6)
    merged = lora.merge(base, trained, cfg)
    np.testing.assert_allclose(merged["kernel"], [[2.75, -0.5], [2.625, -0.75]], rtol=1e-6)
    assert set(merged) == {"kernel"}


@pytest.mark.slow
def test_at_first_adapters_change_nothing():
    params = tiny.scalar()
    trained, base = lora.split(params, CFG, jax.random.key(1))
    apply = jax.jit(models.bind(heads.ScalarModel(tiny.GPT)))
    adapted = apply(lora.attach(base, trained, CFG), TOKENS, MASK)
    np.testing.assert_allclose(adapted, apply(params, TOKENS, MASK), atol=1e-6)
    tiny.assert_close(lora.merge(base, trained, CFG), params, atol=0)


def test_what_is_trained_and_what_is_not():
    trained, base = lora.split(tiny.scalar(), lora.Config(rank=3, kernels=("out", "up")), jax.random.key(1))
    adapted = {f"trunk/blocks/{one}/kernel" for one in ("attention/out", "mlp/up")}
    assert names(trained) == {"kernel", "bias"} | {f"{kernel}_{factor}" for kernel in adapted for factor in "ab"}
    assert names(base) == names(tiny.scalar()) - {"kernel", "bias"}
    assert {name for name in names(lora.split(tiny.policy(), CFG, jax.random.key(1))[0]) if "bias" in name} == set()
    everything, nothing = lora.split(tiny.policy(), lora.Config(), jax.random.key(1))
    assert nothing == {}
    tiny.assert_close(lora.attach(nothing, everything, lora.Config()), tiny.policy(), atol=0)
    tiny.assert_close(lora.merge(nothing, everything, lora.Config()), tiny.policy(), atol=0)
    head = {"kernel": jnp.ones(16), "bias": jnp.zeros(())}  # of a critic on the policy's trunk
    assert lora.split(head, CFG, jax.random.key(1)) == (head, {})


def test_adapters_begin_as_noise_of_the_size_of_their_input():
    config = models.llama(2, 64, 4, 2, 96, vocab_size=31)
    shapes = models.parameter_shapes(config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    trained = flatten_dict(lora.split(params, lora.Config(rank=50), jax.random.key(1))[0])
    inputs = {"qkv": 64, "out": 64, "up": 64, "down": 96}
    noise = {path[-2]: x for path, x in trained.items() if path[-1] == "kernel_a"}
    for name, x in noise.items():
        assert x.shape == (2, inputs[name], 50)
        assert np.std(x) == pytest.approx(inputs[name] ** -0.5, rel=0.1) and abs(np.mean(x)) < 0.01
    assert not np.allclose(noise["qkv"], noise["up"])  # a key of its own each


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("remat", ["none", "full"])
def test_adapted_computes_and_learns_what_merged_does(config, remat):
    trained, base = parts(tiny.policy(config))
    apply_fn = models.bind(models.Transformer(dataclasses.replace(config, compute=models.Compute(remat=remat))))

    def adapted(trained, base):
        logits = lora.with_base(apply_fn, base, CFG)(trained, TOKENS, MASK)
        return jnp.mean(logits**2), logits

    def merged(trained, base):
        logits = apply_fn(lora.merge(base, trained, CFG), TOKENS, MASK)
        return jnp.mean(logits**2), logits

    one, other = (jax.jit(jax.grad(f, has_aux=True))(trained, base) for f in (adapted, merged))
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.max(np.abs(b)))
    plain = jax.jit(apply_fn)(base, TOKENS, MASK)
    assert np.max(np.abs(one[1] - plain)) > 0.1


@pytest.mark.slow
@BOTH
def test_generation_says_what_merged_does(config):
    trained, base = parts(tiny.policy(config))
    model, cfg = models.Transformer(config), sampling.Config(max_new_tokens=8)
    say = lambda params: sampling.generate(model, params, TOKENS, MASK, jax.random.key(0), cfg)
    adapted, merged = say(lora.attach(base, trained, CFG)), say(lora.merge(base, trained, CFG))
    tiny.assert_close(adapted, merged, atol=1e-4)
    assert not np.array_equal(adapted.tokens, say(base).tokens)


@pytest.mark.parametrize(
    ("setting", "value"), [("rank", 2), ("alpha", 9.0), ("kernels", ("qkv", "out")), ("kernels", ("up", "down"))]
)
def test_each_setting_changes_the_model(setting, value):
    merged = lambda cfg: lora.merge(*reversed(parts(tiny.policy(), cfg)), cfg)
    one, other = merged(CFG), merged(dataclasses.replace(CFG, **{setting: value}))
    difference = jax.tree.map(lambda a, b: float(np.max(np.abs(np.subtract(a, b)))), one, other)
    assert max(jax.tree.leaves(difference)) > 0.1


def test_settings_that_cannot_be():
    for settings in ({"alpha": 4.0}, {"kernels": ("qkv",)}):
        with pytest.raises(InputError, match="alpha and kernels have no effect without a rank"):
            lora.Config(**settings)
    with pytest.raises(InputError, match="rank=0: expected more than 0"):
        lora.Config(rank=0)
    with pytest.raises(InputError, match="no kernels: expected some of qkv, out, up, down"):
        lora.Config(rank=2, kernels=())


def test_settings_are_flags():
    flags = ["--lora.rank", "4", "--lora.alpha", "2.5", "--lora.kernels", "qkv", "down", "--seed", "3"]
    assert cli.parse(sft_experiment.Config(), flags).lora == lora.Config(4, 2.5, ("qkv", "down"))
    assert sft_experiment.Config().lora.rank is None


@pytest.mark.slow
def test_one_device_equals_eight_and_the_base_stays():
    trained, base = parts(tiny.policy())
    before = copied(base)
    state = sft_state(trained)
    spread, copies = parallel.replicate((state, base))
    one, eight = jax.jit(SFT), parallel.pmap(SFT, donate=(0,))
    for seed in range(3):
        state, metrics = one(state, base, batch(seed))
        spread, spread_metrics = eight(spread, copies, parallel.shard(batch(seed)))
        tiny.assert_close(metrics, parallel.unreplicate(spread_metrics), atol=1e-5)
    tiny.assert_close(state, parallel.unreplicate(spread), atol=1e-5)
    tiny.assert_close(base, before, atol=0)
    tiny.assert_close(parallel.unreplicate(copies), before, atol=0)
    assert names(state.params) == names(trained)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trained))  # Adam's two, no more


@pytest.mark.slow
def test_weight_decay_falls_on_adapters():
    trained, _ = parts(tiny.policy())
    tx = optim.adamw(0.01, weight_decay=0.5)
    change, _ = tx.update(jax.tree.map(jnp.zeros_like, trained), tx.init(trained), trained)
    tiny.assert_close(change, jax.tree.map(lambda x: -0.01 * 0.5 * x, trained), atol=1e-7)


@pytest.mark.slow
def test_a_reward_model_learns():
    trained, base = lora.split(tiny.scalar(), CFG, jax.random.key(1))
    before, tx = copied(base), optim.adamw(1e-2)
    network = heads.score_fn(tiny.GPT)
    step = jax.jit(lora.on_base(CFG, lambda on: functools.partial(reward.train_step, score_fn=on(network), tx=tx)))
    rng = np.random.default_rng(0)
    rank = jnp.array(np.argsort(rng.random((4, 3)), axis=1), jnp.int32)
    tokens, mask = tiny.random_tokens(0, 4, 3, 8), tiny.ragged(1, 12, 8).reshape(4, 3, 8)
    rankings = Rankings(tokens=jnp.array(tokens), mask=jnp.array(mask), start=jnp.ones(4, jnp.int32), rank=rank)
    state, losses = optim.init(trained, tx, jax.random.key(0)), []
    for _ in range(30):
        state, metrics = step(state, base, rankings)
        losses.append(float(metrics["loss/bradley_terry"]))
    assert losses[-1] < 0.5 * losses[0]
    assert not np.allclose(state.params["kernel"], trained["kernel"])
    tiny.assert_close(base, before, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["critic", "shared critic"])
def test_ppo_holds_the_policy_to_its_own_base(shared):
    model = models.Transformer(tiny.GPT)
    policy_fn = models.part("policy", models.logprobs_fn(tiny.GPT))
    critic_fn = (heads.shared_critic if shared else heads.critic)(tiny.GPT)
    critic = heads.fresh(tiny.GPT) if shared else tiny.scalar()
    halves = {"policy": parts(tiny.policy()), "critic": parts(critic)}
    trained, base = ({name: half[n] for name, half in halves.items()} for n in (0, 1))
    before = copied(base)
    prompts = Prompts(tokens=tiny.random_tokens(0, 16, 4), mask=tiny.ragged(1, 16, 4), index=np.arange(16))
    collect = functools.partial(
        rollout.collect,
        policy=model,
        cfg=sampling.Config(max_new_tokens=5, temperature=0.8, eos_id=2),
        critic_fn=critic_fn,
    )
    params = lora.attach(base, trained, CFG) | {"reference": base["policy"]}
    episodes = jax.jit(collect)(params, tiny.arrays(prompts), jax.random.key(0), jnp.uint32(0))
    episodes = episodes.replace(score=jnp.linspace(-1.0, 1.5, 16))
    cfg = ppo.Config(epochs=2, minibatches=2, temperature=0.8, ema=0.5)
    tx = ppo.optimizer(optim.adamw(1e-3), optim.adamw(1e-3))
    step = lora.on_base(
        CFG,
        lambda on: functools.partial(
            ppo.train_step,
            policy_fn=on(policy_fn),
            critic_fn=on(critic_fn),
            tx=tx,
            cfg=cfg,
        ),
    )
    state, metrics = jax.jit(step)(ppo.init(trained, tx, cfg, jax.random.key(0)), base, episodes, None)
    assert metrics["ratio/first_error"] < 1e-5
    assert abs(metrics["kl/reference"]) > 0.1  # to the base without adapters
    tiny.assert_close(base, before, atol=0)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(np.subtract(a, b)))), state.params, trained)
    assert min(jax.tree.leaves(moved)) > 0
    assert names(state.opt_state["ema"]) == names(trained["policy"])


@pytest.mark.parametrize("scalar", [False, True], ids=["policy", "reward"])
def test_a_merged_export_is_an_ordinary_model(tmp_path, scalar):
    whole = tiny.scalar(tiny.LLAMA) if scalar else tiny.policy(tiny.LLAMA)
    trained, base = parts(whole)
    model = models.Model(tiny.LLAMA, {}, None, lambda: None)
    models.save(model, lora.merge(base, trained, CFG), tmp_path / "model")
    loaded = (models.load_reward if scalar else models.load)(tmp_path / "model")
    assert names(loaded.params) == names(whole)
    said = jax.jit(loaded.apply)
    adapted = lora.attach(base, trained, CFG)
    np.testing.assert_allclose(said(loaded.params, TOKENS, MASK), said(adapted, TOKENS, MASK), atol=1e-4)


@pytest.mark.slow
def test_a_step_needs_less_memory():
    config = models.llama(16, 128, 4, 2, 352, vocab_size=512)
    shapes, weights = models.parameter_shapes(config), 4 * models.parameter_count(config)
    row = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    text = Tokens(tokens=row, segment=row, target=jax.ShapeDtypeStruct((1, 16), bool))

    def needed(cfg, dtype="float32"):
        """Bytes of the arguments, and of what the step needs beside them."""
        step = sft_step(dataclasses.replace(config, compute=models.Compute(dtype)), cfg)
        trained, base = jax.eval_shape(lambda params: lora.split(params, cfg, jax.random.key(0)), shapes)
        memory = (
            jax.jit(step, donate_argnums=0)
            .lower(jax.eval_shape(sft_state, trained), base, text)
            .compile()
            .memory_analysis()
        )
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    arguments, temporaries = needed(lora.Config())
    assert arguments > 3 * weights and temporaries > weights  # Adam's two moments, and a gradient
    for dtype in ("float32", "bfloat16"):
        arguments, temporaries = needed(lora.Config(rank=2), dtype)
        assert arguments < 1.1 * weights
        assert temporaries < 0.4 * weights  # no gradient of the base, and no copy of it


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_frozen_layers_are_not_held_twice(remat):
    config = models.llama(4, 64, 4, 4, 256, vocab_size=31)
    config = dataclasses.replace(config, compute=models.Compute(remat=remat))
    params = models.parameter_shapes(config)
    trained, base = jax.eval_shape(lambda params: lora.split(params, CFG, jax.random.key(0)), params)
    state = jax.eval_shape(sft_state, trained)
    row = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    tokens = Tokens(tokens=row, segment=row, target=jax.ShapeDtypeStruct((1, 4), bool))
    held = jax.jit(sft_step(config)).lower(state, base, tokens).compile().memory_analysis()
    layers = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["blocks"]))
    assert held.temp_size_in_bytes < 0.6 * layers  # of one layer, and of its gradients


@pytest.mark.slow
def test_adapted_layers_in_a_loop_compute_what_unrolled_ones_do():
    trained, base = parts(tiny.policy())
    unrolled = dataclasses.replace(tiny.GPT, compute=models.Compute(unroll=True))
    (state, metrics), (other, same) = (
        jax.jit(sft_step(config))(sft_state(trained), base, batch(0)) for config in (tiny.GPT, unrolled)
    )
    np.testing.assert_allclose(metrics["grad_norm"], same["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/next_token"], same["loss/next_token"], rtol=1e-5)
    tiny.assert_close(state.params, other.params, atol=1e-5)
