import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import dpo, optim, reward
from rlhf_jax.devices import parallel
from rlhf_jax.types import InputError, TrainState, named_key
from tests import tiny
from tests.algorithms import test_dpo, test_grpo, test_ppo, test_reward, test_sft


def test_shard_and_gather_are_inverse():
    batch = {"a": np.arange(48).reshape(16, 3), "b": np.arange(16)}
    spread = parallel.shard(batch)
    assert spread["a"].shape == (8, 2, 3)
    assert len(spread["a"].sharding.device_set) == 8
    for name, x in parallel.gather(spread).items():
        np.testing.assert_array_equal(x, batch[name])


def test_shard_along_a_later_axis():
    x = np.arange(3 * 16).reshape(3, 16)
    spread = parallel.shard(x, rows_axis=1)
    assert spread.shape == (8, 3, 2)
    np.testing.assert_array_equal(np.concatenate(list(spread), axis=1), x)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="a batch of 12 rows does not divide over 8 devices: use a multiple of 8"):
        parallel.shard(np.zeros((12, 2)))


def test_replicate_keeps_keys_and_values():
    tree = {"key": jax.random.key(3), "x": jnp.arange(3)}
    spread = parallel.replicate(tree)
    assert spread["x"].shape == (8, 3)
    back = parallel.unreplicate(spread)
    np.testing.assert_array_equal(back["x"], tree["x"])
    assert jax.random.key_data(back["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_rows_are_numbered_over_all_devices():
    x = parallel.shard(np.zeros(16))
    index = parallel.pmap(lambda x, axis: parallel.row_index(x.shape[0], axis))(x)
    np.testing.assert_array_equal(index.reshape(-1), np.arange(16))
    order = parallel.replicate(np.arange(16)[::-1].copy())
    own = parallel.pmap(lambda rows, axis: parallel.local_rows(rows, axis))(order)
    np.testing.assert_array_equal(own.reshape(-1), np.arange(16)[::-1])


def test_keys_depend_on_the_row_not_on_the_device():
    key = jax.random.key(0)
    keys = parallel.row_keys(key, 16, None, 5)
    spread = parallel.pmap(lambda k, axis: jax.random.key_data(parallel.row_keys(k, 2, axis, 5)))(
        parallel.replicate(key)
    )
    np.testing.assert_array_equal(spread.reshape(16, -1), jax.random.key_data(keys))
    np.testing.assert_array_equal(jax.random.key_data(keys[3]), jax.random.key_data(jax.random.fold_in(key, 8)))


def test_sums_and_gathers_cross_devices():
    x = parallel.shard(np.arange(8.0))
    total = parallel.pmap(lambda x, axis: parallel.psum(jnp.sum(x), axis))(x)
    np.testing.assert_array_equal(total, np.full(8, 28.0))
    rows = parallel.pmap(lambda x, axis: parallel.all_gather(x, axis))(x)
    np.testing.assert_array_equal(rows[3], np.arange(8.0))
    top = parallel.pmap(lambda x, axis: parallel.pmax(jnp.max(x), axis))(x)
    np.testing.assert_array_equal(top, np.full(8, 7.0))
    assert parallel.psum(3, None) == parallel.pmax(3, None) == parallel.all_gather(3, None) == 3


def test_each_use_of_a_seed_has_a_key_of_its_own():
    keys = [named_key(seed, use) for seed in (0, 1) for use in ("ppo/sampling", "ppo/updates", "rank/train/0")]
    # Nor is one the key that steps or rows fold out of another.
    keys += [jax.random.fold_in(keys[0], n) for n in range(100)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    np.testing.assert_array_equal(*(jax.random.key_data(named_key(3, "x")) for _ in range(2)))


# One step, placed in several ways -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    step: Callable
    state: Callable[[], TrainState]
    rows: Callable[[int], tuple]  # batches by seed,
    rows_axis: tuple[int, ...] = (0,)  # where each has its rows,
    others: tuple = ()  # and what follows them


def learner(name: str, episodes: int = 16) -> Stage:
    step, cfg = test_grpo.step(name)
    updates = cfg.epochs * cfg.minibatches
    rows = lambda seed: (test_ppo.episodes(seed, episodes), test_ppo.text(seed, updates))
    return Stage(step, lambda: test_grpo.init(cfg), rows, (0, 1))


KEY = jax.random.key(0)
# The gradient of a key's bias is 0 but for rounding, and with a smaller eps Adam would make that an update.
TX = optim.adamw(1e-3, optim.Adam(eps=1e-5), weight_decay=0.1)
STAGES = {
    "sft": Stage(
        functools.partial(test_sft.STEP, tx=TX),
        lambda: optim.init(tiny.policy(), TX, KEY),
        lambda seed: (test_sft.batch(seed),),
    ),
    "reward": Stage(
        functools.partial(test_reward.STEP, cfg=reward.Config(margin=0.5, label_smoothing=0.1, centring=0.1)),
        lambda: optim.init(tiny.scalar(), test_reward.TX, KEY),
        lambda seed: (test_reward.batch(seed),),
    ),
    "dpo": Stage(
        functools.partial(test_dpo.STEP, cfg=dpo.Config()),
        lambda: optim.init(tiny.policy(), test_dpo.TX, KEY),
        lambda seed: (test_dpo.batch(seed),),
        others=(tiny.policy(seed=3),),
    ),
    "ppo": Stage(
        test_ppo.step(), test_ppo.state, lambda seed: (test_ppo.episodes(seed), test_ppo.text(seed, 4)), (0, 1)
    ),
    "grpo": learner("grpo"),
    "rloo": learner("rloo"),
    "online_dpo": learner("online_dpo", 64),  # whole groups to each device
}
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: COMPILED.append(name) if "backend_compile" in name else None
)


def five_steps(stage: Stage, place: parallel.Layout, microbatches: int = 1) -> tuple[TrainState, list]:
    """The state after five steps and each step's metrics, none but the first of which compiles or waits for copies."""
    step = place.step(functools.partial(stage.step, microbatches=microbatches), donate=(0,))
    state, others, history = place.state(stage.state()), place.state(stage.others), []
    for seed in range(5):
        batch = [place.rows(rows, axis) for rows, axis in zip(stage.rows(seed), stage.rows_axis, strict=True)]
        before = len(COMPILED)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, *batch, *others)
        assert seed == 0 or len(COMPILED) == before
        history.append(jax.tree.map(np.asarray, place.get(metrics)))
    return place.get(state), history


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=(pytest.mark.slow, *([pytest.mark.full] if name in ("rloo", "online_dpo") else ())))
        if name not in ("ppo", "reward")
        else name
        for name in STAGES
    ],
)
def test_one_device_and_its_micro_batches_equal_eight_and_a_mesh(name):
    one = parallel.layout(devices=jax.devices()[:1])
    state, history = five_steps(STAGES[name], one, microbatches=4)
    others = [parallel.layout(), parallel.layout(parallel.Config(fsdp=4, tensor=2))]
    for place in [*others, *([one] if name == "sft" else [])]:
        other, found = five_steps(STAGES[name], place)
        tiny.assert_close(history, found, atol=1e-5)
        tiny.assert_close(state, other, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_take_less_memory():
    batch = test_sft.batch(0, rows=64)
    state = optim.init(tiny.policy(), test_sft.TX, KEY)
    whole, quarter = (
        jax.jit(functools.partial(test_sft.STEP, microbatches=parts)).lower(state, batch).compile().memory_analysis()
        for parts in (1, 4)
    )
    assert quarter.temp_size_in_bytes < 0.5 * whole.temp_size_in_bytes


def test_micro_batches_must_divide():
    state, batch = optim.init(tiny.policy(), test_sft.TX, KEY), test_sft.batch(0)
    said = r"8 rows a device do not divide into 3 parts \(microbatches, buckets\): use fewer, or a larger batch"
    with pytest.raises(InputError, match=said):
        jax.eval_shape(functools.partial(test_sft.STEP, microbatches=3), state, batch)
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2))
    with pytest.raises(InputError, match="2 rows a device do not divide into 4 parts"):
        place.step(functools.partial(test_sft.STEP, microbatches=4))(place.state(state), place.rows(batch))


ODD = dataclasses.replace(tiny.LLAMA, d_model=18, n_heads=6, n_kv_heads=3, head_dim=3, d_ff=25, position="learned")
FAMILIES = {name: tiny.CONFIGS[name] for name in ("gpt", "qwen2", "gemma2")}
FAMILIES |= {"even": dataclasses.replace(tiny.LLAMA, vocab_size=32), "odd": ODD}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_the_same_on_a_mesh(name):
    config = FAMILIES[name]
    tokens, mask = tiny.random_tokens(0, 8, 9), tiny.ragged(0, 8, 9)
    logprobs_fn = models.logprobs_fn(config)
    place = parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))
    read = lambda params, rows, axis=None: logprobs_fn(params, *rows)[0]
    spread = place.step(read)(place.state(tiny.policy(config)), place.rows((tokens, mask)))
    np.testing.assert_allclose(spread, jax.jit(read)(tiny.policy(config), (tokens, mask)), atol=1e-5)
    assert len(spread.sharding.device_set) == 8 and spread.addressable_data(0).shape == (2, 8)


# Where parameters lie -------------------------------------------------------------------------------------------------


def specs(tree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.sharding.spec) for path, x in leaves}


def test_parameters_and_their_moments_are_spread_by_rules():
    config = FAMILIES["even"]
    params = {"policy": tiny.policy(config), "critic": tiny.scalar(config)}
    state = optim.init(params, optim.adamw(1e-3), KEY)
    placed = parallel.layout(parallel.Config(fsdp=4, tensor=2)).state(state)
    tiny.assert_close(placed, state, atol=0)
    found = specs(placed)
    for model in ("params/policy", "opt_state/1/mu/critic/trunk"):
        assert found[f"{model}/embedding"] == ("tensor", "fsdp")
        assert found[f"{model}/blocks/attention/qkv/kernel"] == (None, "fsdp", "tensor")
        assert found[f"{model}/blocks/attention/out/kernel"] == (None, "tensor", None, None, "fsdp")
        assert found[f"{model}/blocks/mlp/up/kernel"] == (None, "fsdp", None, "tensor")
        assert found[f"{model}/blocks/mlp/down/kernel"] == (None, "tensor", "fsdp")
        assert found[f"{model}/blocks/norm_1/scale"] == ()
    assert found["params/critic/kernel"] == found["step"] == found["rng"] == ()
    held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(placed.params))
    assert held < 1.5 * sum(x.nbytes for x in jax.tree.leaves(placed.params)) / 8


def test_what_does_not_divide_is_whole_and_layers_always_are():
    place = parallel.layout(parallel.Config(fsdp=2, tensor=4))
    found = specs(place.state(tiny.policy(ODD)))
    assert found["embedding"] == (None, "fsdp")  # 31 words over 4, 18 features over 2
    assert found["positions"] == (None, "fsdp")
    assert found["blocks/attention/qkv/kernel"] == (None, "fsdp")  # 3 groups
    assert found["blocks/mlp/down/kernel"] == (None, None, "fsdp")  # 25 wide
    gpt = specs(place.state(tiny.policy(dataclasses.replace(tiny.GPT, n_layers=8))))
    assert gpt["blocks/mlp/up/kernel"] == (None, "fsdp", "tensor") and gpt["blocks/mlp/up/bias"] == (None, "tensor")
    # A model of an ensemble, stacked on an axis before that of layers.
    assert parallel.parameter_axes("trunk/blocks/mlp/up/kernel", (3, 2, 16, 2, 24))[1:] == (
        None,
        "fsdp",
        None,
        "tensor",
    )
    assert parallel.parameter_axes("blocks/mlp/up/kernel_b", (2, 8, 48)) == (None, None, "fsdp")
    for name, shape in {"v_row": (3, 16), "v_col": (3, 48), "v": (1,)}.items():
        assert parallel.parameter_axes(f"opt_state/0/{name}/blocks/mlp/up/kernel", shape) == (None,) * len(shape)


def test_a_model_can_be_whole_on_every_device():
    place = parallel.layout(parallel.Config(fsdp=8, whole=("critic",)))
    found = specs(place.state({"policy": tiny.policy(), "critic": tiny.scalar()}))
    assert found["policy/embedding"] == (None, "fsdp")
    assert {spec for path, spec in found.items() if path.startswith("critic/")} == {()}


def test_models_are_read_to_where_they_shall_lie(tmp_path):
    config = dataclasses.replace(tiny.LLAMA, vocab_size=32)
    model = models.Model(config, tiny.policy(config), None, models.bind(models.Transformer(config)))
    models.save(model, model.params, tmp_path / "model")
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2))
    read = models.load(tmp_path / "model", place=place.sharding).params
    assert specs(read) == specs(place.state(model.params))
    assert specs(place.state(read)) == specs(read)
    replicas = parallel.layout()
    read = models.load(tmp_path / "model", place=replicas.sharding).params
    assert {x.sharding for x in jax.tree.leaves(read)} == {replicas.sharding("embedding", (32, 16))}


@pytest.mark.parametrize("cfg", [parallel.Config(), parallel.Config(fsdp=4, tensor=2)], ids=["pmap", "mesh"])
def test_what_lies_elsewhere_outlives_the_donation_of_its_copy(cfg):
    place, state = parallel.layout(cfg), optim.init(tiny.policy(), optim.adamw(1e-3), KEY)
    add = place.step(lambda x, axis: x.replace(params=jax.tree.map(lambda x: x + 1, x.params)), donate=(0,))
    placed = place.state(state)
    add(placed)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert all(x.is_deleted() for x in jax.tree.leaves(placed.params))


def test_what_lies_on_the_mesh_already_is_not_copied():
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2))
    state = place.state(optim.init(tiny.policy(), optim.adamw(1e-3), KEY))
    again = place.state(optim.init(state.params, optim.adamw(1e-3), KEY))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (state.params, again.params)), strict=True))
    moments = jax.tree.leaves(again.opt_state[1].mu)
    assert [x.sharding for x in moments] == [x.sharding for x in jax.tree.leaves(state.params)]


def test_frozen_models_wait_on_the_host():
    config = tiny.CONFIGS["qwen2"]
    tokens, mask = tiny.random_tokens(0, 8, 9), tiny.ragged(0, 8, 9)
    logprobs_fn = models.logprobs_fn(config)
    read = lambda params, rows, axis=None: logprobs_fn(params, *rows)[0]
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2, offload=True))
    here, there = place.state(tiny.policy(config)), place.frozen(tiny.policy(config))
    where = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
    assert where(here) == {"device"} and where(there) == {"pinned_host"}
    assert jax.tree.map(lambda x: x.sharding.spec, here) == jax.tree.map(lambda x: x.sharding.spec, there)
    assert where(parallel.layout(parallel.Config(fsdp=8)).frozen(tiny.policy(config))) == {"device"}
    step = place.step(read)
    found = [step(params, place.rows((tokens, mask))) for params in (here, there)]
    assert where(found) == {"device"}
    np.testing.assert_array_equal(*found)


def test_meshes_that_cannot_be():
    with pytest.raises(InputError, match="a mesh of data=2 x fsdp=3 x tensor=1 devices, but there are 8: use sizes"):
        parallel.layout(parallel.Config(data=2, fsdp=3))
    with pytest.raises(InputError, match="fsdp=0: expected more than 0"):
        parallel.Config(fsdp=0)
    with pytest.raises(InputError, match="whole has no effect without a mesh"):
        parallel.Config(whole=("critic",))
    with pytest.raises(InputError, match="offload needs a mesh"):
        parallel.Config(offload=True)
    place = parallel.layout(parallel.Config(fsdp=4, tensor=2))
    with pytest.raises(InputError, match="a batch of 6 rows does not divide over 4 parts of the mesh: use a multiple"):
        place.rows(np.zeros((6, 2)))
    with pytest.raises(InputError, match="a minibatch of 6 rows does not divide over 4 devices"):
        place.step(lambda x, axis: parallel.local_rows(x, axis))(place.state(np.arange(6)))
