import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import parallel
from rlhf_jax.types import InputError, named_key


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
    own = parallel.pmap(lambda rows, axis: parallel.own_rows(rows, axis))(order)
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
