import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.devices import preemption
from rlhf_jax.runs import checkpoint
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


class Counter:
    """A stream of numbers."""

    def __init__(self, at=0):
        self.at = at

    def get_state(self):
        return {"next": self.at}

    def set_state(self, state):
        self.at = state["next"]


def damage(path, part="state"):
    """Cuts the files of a checkpoint short."""
    for file in (path / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_restores_every_bit_and_the_positions(tmp_path):
    state = make_state()
    with checkpoint.Writer(tmp_path / "c") as writer:
        writer.save(state, {"data": Counter(12), "text": Counter(3)})
    restored, positions = checkpoint.restore(tmp_path / "c", make_state(step=0, seed=1))
    assert bits(restored) == bits(state)
    assert positions == {"data": {"next": 12}, "text": {"next": 3}}
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
    with checkpoint.Writer(tmp_path, checkpoint.Config(keep=2)) as writer:
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
    with checkpoint.Writer(tmp_path, checkpoint.Config(keep=3)) as writer:
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
    damage(tmp_path / "3", item)
    with pytest.raises(checkpoint.DamagedError, match="3 is damaged") as raised:
        checkpoint.restore(tmp_path, make_state())
    assert "\n" not in str(raised.value)


def test_a_changed_bit_is_noticed(tmp_path):
    state = TrainState(step=jnp.int32(3), params={"w": jnp.arange(2.0**14)}, opt_state=(), rng=jax.random.key(0))
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(state)
    largest = max((tmp_path / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    for place in (len(content) // 3, len(content) // 2):
        content[place] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.DamagedError, match=r"3 is damaged \(params/w is not what was saved\)"):
        checkpoint.restore(tmp_path, state)


def test_goes_on_from_the_newest_that_can_be_read(tmp_path, capsys):
    like, start = make_state(0), Counter(1)
    assert checkpoint.resume(tmp_path, like, {"data": start}) is like and start.at == 1
    with checkpoint.Writer(tmp_path, checkpoint.Config(keep=3)) as writer:
        for step in (2, 4, 6):
            writer.save(make_state(step, seed=step), {"data": Counter(10 * step)})
    data, other = Counter(), Counter(7)
    assert bits(checkpoint.resume(tmp_path, like, {"data": data, "other": other})) == bits(make_state(6, seed=6))
    assert (data.at, other.at) == (60, 7)
    assert checkpoint.resume(tmp_path, like, {"data": start}, checkpoint.Config(resume="never")) is like
    assert capsys.readouterr().err == ""
    damage(tmp_path / "6")
    damage(tmp_path / "4", "about")
    assert bits(checkpoint.resume(tmp_path, like, {"data": data})) == bits(make_state(2, seed=2))
    assert data.at == 20
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in said] == [f"warning: {tmp_path / n} is damaged" for n in ("6", "4")]
    with pytest.raises(InputError, match="does not fit this run"):  # which is no damage
        checkpoint.resume(tmp_path, make_state(0, width=4))
    damage(tmp_path / "2")
    with pytest.raises(InputError, match=r"no checkpoint can be read; --saves.resume never starts over"):
        checkpoint.resume(tmp_path, like)


def test_a_place_that_holds_no_whole_checkpoint_is_free(tmp_path):
    (tmp_path / "3" / "state").mkdir(parents=True)
    with checkpoint.Writer(tmp_path, start=5) as writer:
        writer.save(make_state(3, seed=4))
    assert bits(checkpoint.restore(tmp_path, make_state())[0]) == bits(make_state(3, seed=4))


def test_when_a_save_is_due(tmp_path):
    with checkpoint.Writer(tmp_path, checkpoint.Config(every=3), total=7) as writer:
        assert [step for step in range(1, 8) if writer.due(step)] == [3, 6, 7]


@pytest.mark.parametrize(("best", "kept"), [("min:loss", 4), ("max:loss", 2), (None, None)])
def test_keeps_the_best(tmp_path, best, kept):
    losses = {2: 0.9, 4: 0.1, 6: 0.5, 8: math.nan, 10: 0.6}
    cfg = checkpoint.Config(keep=1, best=best)
    for steps in ((2, 4, 6), (8, 10)):  # of two processes
        with checkpoint.Writer(tmp_path, cfg, start=6) as writer:
            for step in steps:
                writer.save(make_state(step), metrics={"loss": losses[step], "other": 0.0})
    assert checkpoint.steps(tmp_path) == ([kept, 10] if kept else [10])


def test_the_best_of_nothing(tmp_path):
    with pytest.raises(InputError, match=r"saves.best=loss: expected min: or max:, then the name of a metric"):
        checkpoint.Config(best="loss")
    with (
        pytest.raises(InputError, match=r"saves.best: the run has no metric los: expected one of kl, loss"),
        checkpoint.Writer(tmp_path, checkpoint.Config(best="min:los")) as writer,
    ):
        writer.save(make_state(), metrics={"kl": 0.1, "loss": 0.5})


def test_when_asked_to_end_it_saves_and_leaves(tmp_path):
    done = []
    with (
        pytest.raises(preemption.Preempted),
        preemption.handle_sigterm(),
        checkpoint.Writer(tmp_path, checkpoint.Config(every=100), total=100) as writer,
    ):
        for step in range(1, 100):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(step)  # the step is finished
            if writer.due(step):
                writer.save(make_state(step))
    assert done[-1] == 5 and checkpoint.steps(tmp_path) == [5]


def test_no_room_for_a_checkpoint(tmp_path, monkeypatch):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state(2))

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [OS error 28]")

    with pytest.raises(checkpoint.FullDiskError) as raised, checkpoint.Writer(tmp_path, start=2) as writer:
        monkeypatch.setattr(writer._orbax, "save", full)
        writer.save(make_state(4))
    assert raised.value.strerror == (
        f"no space is left to write to {tmp_path}; the last checkpoint is {tmp_path / '2'}"
    )
    assert bits(checkpoint.restore(tmp_path, make_state())[0]) == bits(make_state(2))


class Short(Counter):
    """A stream of so few batches that the place of another one lies beyond its end."""

    def set_state(self, state):
        raise IndexError(f"Checkpoint `next_index` {state['next']} is out of range for dataset of length 5.")


def test_a_run_that_has_done_more_than_there_is_to_do_is_trained(tmp_path):
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(make_state(8), {"data": Counter(8)})
    changed = checkpoint.Config(resume="changed")
    for total in (5, 8):
        data = Short()
        assert int(checkpoint.resume(tmp_path, make_state(0), {"data": data}, changed, total=total).step) == 8
        assert data.at == 0
    for total in (None, 9):
        with pytest.raises(InputError, match=r"after step 8 the stream data cannot go on \(Checkpoint `next_index` 8"):
            checkpoint.resume(tmp_path, make_state(0), {"data": Short()}, changed, total=total)
    data = Counter()
    checkpoint.resume(tmp_path, make_state(0), {"data": data}, changed, total=9)
    assert data.at == 8
