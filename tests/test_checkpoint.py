import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import checkpoint
from rlhf_jax.types import InputError, TrainState

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step=7, seed=0, width=3):
    """A state with a value in every leaf that a lossy format would change: odd floats, bf16, a NaN, a typed key."""
    key = jax.random.key(seed)
    params = {
        "block": {"kernel": jax.random.normal(key, (2, width)), "bias": jnp.array([1 / 3, -0.0, np.nan])},
        "head": jnp.array([1.1, -2.3], jnp.bfloat16),
    }
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(0.7).astype(x.dtype), TX.init(params))
    return TrainState(step=jnp.int32(step), params=params, opt_state=opt_state, rng=jax.random.fold_in(key, 5))


def bits(state):
    def data(x):
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return [(str(x.dtype), x.shape, data(x).tobytes()) for x in jax.tree.leaves(state)]


def test_restores_every_bit_and_the_extra(tmp_path):
    state = make_state()
    extra = {"data": {"position": 12, "epoch": [0, 1]}, "kl_coef": 0.1}
    with checkpoint.Writer(tmp_path / "c") as writer:
        writer.save(state, extra)
    restored, restored_extra = checkpoint.restore(tmp_path / "c", make_state(step=0, seed=1))
    assert bits(restored) == bits(state)
    assert restored_extra == extra
    assert jax.tree.structure(restored) == jax.tree.structure(state)  # optax's named tuples and the key survive
    assert jax.random.key_impl(restored.rng) == jax.random.key_impl(state.rng)
    assert jax.random.uniform(restored.rng) == jax.random.uniform(state.rng)


def test_placement_follows_like(tmp_path):
    state = make_state()
    state.params["noise"] = jax.random.key(9)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(state)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    like = make_state(seed=1)
    like.params["block"]["kernel"] = jax.device_put(like.params["block"]["kernel"], sharded)
    like.params["head"] = np.zeros_like(like.params["head"])
    like.params["noise"] = jax.eval_shape(lambda: jax.random.key(0))
    restored, _ = checkpoint.restore(tmp_path, like)
    assert restored.params["block"]["kernel"].sharding == sharded
    assert type(restored.params["head"]) is np.ndarray
    assert bits(restored) == bits(state)


def test_state_may_be_donated_while_it_is_written(tmp_path):
    big = {"w": jnp.arange(2.0**20)}
    state = TrainState(step=jnp.int32(1), params=big, opt_state=(), rng=jax.random.key(0))
    expected = np.array(big["w"])
    spoil = jax.jit(lambda params: jax.tree.map(lambda x: x * 0 - 1, params), donate_argnums=0)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(state)
        jax.block_until_ready(spoil(state.params))
    like = state.replace(params={"w": jnp.zeros(2**20)})
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, like)[0].params["w"], expected)


def test_keeps_the_newest_and_restores_any_of_them(tmp_path):
    with checkpoint.Writer(tmp_path, keep=2) as writer:
        for step in (2, 4, 9, 10):
            writer.save(make_state(step, seed=step))
        writer.wait()
        assert checkpoint.steps(tmp_path) == [9, 10]
    assert checkpoint.latest(tmp_path) == tmp_path / "10"
    assert checkpoint.latest(tmp_path, before=10) == tmp_path / "9"
    assert checkpoint.latest(tmp_path, before=9) is None
    assert bits(checkpoint.restore(tmp_path, make_state(), step=9)[0]) == bits(make_state(9, seed=9))
    with pytest.raises(InputError, match=r"no checkpoint of step 4; there are steps \[9, 10\]"):
        checkpoint.restore(tmp_path, make_state(), step=4)


def test_a_step_is_saved_once(tmp_path):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state(3, seed=0))
        writer.save(make_state(3, seed=1))
    assert bits(checkpoint.restore(tmp_path, make_state())[0]) == bits(make_state(3, seed=0))


def test_a_run_that_starts_earlier_replaces_what_came_after(tmp_path):
    with checkpoint.Writer(tmp_path, keep=3) as writer:
        for step in (5, 10, 15):
            writer.save(make_state(step))
    with checkpoint.Writer(tmp_path, start=10) as writer:
        assert checkpoint.steps(tmp_path) == [5, 10]
        writer.save(make_state(15, seed=4))
    assert bits(checkpoint.restore(tmp_path, make_state())[0]) == bits(make_state(15, seed=4))
    with checkpoint.Writer(tmp_path):
        assert checkpoint.latest(tmp_path) is None


def test_what_a_kill_leaves_is_not_a_checkpoint(tmp_path):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state(3))
    half = tmp_path / "6.orbax-checkpoint-tmp"
    (tmp_path / "3").rename(tmp_path / "whole")
    half.mkdir()
    (half / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "9").mkdir()  # a copy that had only begun
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(InputError, match="no checkpoint; there is none"):
        checkpoint.restore(tmp_path, make_state())
    (tmp_path / "9").rmdir()
    (tmp_path / "whole").rename(tmp_path / "3")
    with checkpoint.Writer(tmp_path, start=3) as writer:
        writer.save(make_state(6, seed=2))
    assert not half.exists()
    assert checkpoint.steps(tmp_path) == [3, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["block"].update(kernel=jnp.zeros((2, 4))),
            r"params/block/kernel is float32\[2, 3\] there and float",
        ),
        (lambda p: p.update(head=jnp.zeros(2)), r"params/head is bfloat16\[2\] there and float32\[2\] here"),
        (lambda p: p.pop("head"), r"params/head is bfloat16\[2\] there and absent here"),
        (lambda p: p.update(extra=jnp.zeros(1)), r"params/extra is absent there and float32\[1\] here"),
    ],
)
def test_names_the_leaf_that_does_not_fit(tmp_path, change, message):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state())
    like = make_state()
    change(like.params)
    with pytest.raises(InputError, match=message) as raised:
        checkpoint.restore(tmp_path, like)
    assert "\n" not in str(raised.value)


def test_another_kind_of_key_does_not_fit(tmp_path):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state())
    with pytest.raises(InputError, match="rng is key<fry>"):
        checkpoint.restore(tmp_path, make_state().replace(rng=jax.random.key(0, impl="rbg")))


def test_missing_and_unwritable_directories(tmp_path):
    with pytest.raises(InputError, match="nowhere: no checkpoint; there is none"):
        checkpoint.restore(tmp_path / "nowhere", make_state())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*file: "):
        checkpoint.Writer(tmp_path / "file")


@pytest.mark.parametrize("item", ["state", "about"])
def test_damage_is_named(tmp_path, item):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state(3))
    for path in (tmp_path / "3" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="3 is damaged; delete it") as raised:
        checkpoint.restore(tmp_path, make_state())
    assert "\n" not in str(raised.value)
