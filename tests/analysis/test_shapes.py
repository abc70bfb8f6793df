"""A layout of shapes against the layout that it stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.analysis import shapes
from rlhf_jax.devices import parallel
from rlhf_jax.types import Tokens
from tests import tiny

LAYOUTS = {"pmap": parallel.Config(), "mesh": parallel.Config(data=2, fsdp=2, tensor=2)}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return parallel.layout(request.param)


def array(size):
    return np.zeros(size, np.float32)


def alike(placed, real):
    for x, y in zip(jax.tree.leaves(placed), jax.tree.leaves(real), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.struct.sharding is not None:
            assert x.struct.sharding.is_equivalent_to(y.sharding, y.ndim)


def train(layout):
    """A train step as an experiment has it, the state before, after, and the metrics."""
    tx = optim.adamw(1e-3)
    step = functools.partial(sft.train_step, logprobs_fn=models.logprobs_fn(tiny.LLAMA), tx=tx)
    tokens = np.ones((8, 6), np.int32)
    batch = Tokens(tokens=tokens, segment=tokens, target=np.ones((8, 6), bool))
    before = layout.state(optim.init(tiny.policy(tiny.LLAMA), tx, jax.random.key(0)))
    after, metrics = layout.step(step, donate=(0,))(before, layout.rows(batch))
    return before, after, metrics


@pytest.mark.slow
def test_states_rows_and_results_lie_as_the_layout_lays_them(layout):
    ours = shapes.Shapes(layout)
    _, real, metrics = train(layout)
    _, placed, numbers = train(ours)
    alike(placed, real)
    alike(numbers, metrics)
    (call,) = ours.calls
    assert call.function == "train_step" and not call.beside
    assert jax.tree.structure(call.args[0]) == jax.tree.structure(real)
    rows = {"a": np.zeros((3, 16, 5), np.int32)}
    alike(ours.rows(rows, 1), layout.rows(rows, 1))


def test_what_lies_beside_a_step_is_what_somebody_still_has(layout):
    ours = shapes.Shapes(layout)
    step = ours.step(lambda x, axis: jnp.sum(x))
    kept, _ = ours.state(array(7)), ours.state(array(5))
    del _
    other = ours.frozen(array(3))
    step(ours.state(array(2)))
    assert sorted(x.shape[-1] for x in ours.calls[0].beside) == [3, 7]
    del kept, other
    step(ours.state(array(4)))
    assert not ours.calls[1].beside
    step(ours.state(array(4)))
    assert len(ours.calls) == 2  # a step is noted once for the same shapes


def test_what_a_step_takes_over_lies_beside_none(layout):
    ours = shapes.Shapes(layout)
    before, after, _ = train(ours)
    ours.step(lambda x, axis: jnp.sum(x))(ours.state(array(2)))
    held = {id(x) for x in ours.calls[1].beside}
    assert held == {id(x.struct) for x in jax.tree.leaves(after)}
    assert not held & {id(x.struct) for x in jax.tree.leaves(before)}


def test_a_mesh_keeps_one_copy_where_pmap_makes_another(layout):
    ours = shapes.Shapes(layout)
    first = ours.state({"w": array(8)})
    assert (ours.state(first)["w"] is first["w"]) == isinstance(layout, parallel.Mesh)
    alike(ours.state(ours.get(first)), layout.state({"w": array(8)}))


def test_the_host_computes_with_what_is_placed(layout):
    ours = shapes.Shapes(layout)

    def compute():
        x = ours.state({"w": np.zeros((8, 4), np.float32)})["w"]
        for result in (2 * x, x - 1.0, x / 3.0, jnp.copy(x), x.astype("float32")):
            assert result.shape == x.shape and result.dtype == jnp.float32
        assert x == x and x in {x}
        return ours.get({"n": ours.state(np.float32(3)), "w": x})

    numbers = jax.eval_shape(lambda: [compute()["n"]])
    assert numbers[0].shape == ()
    assert ours.gather(ours.rows(np.zeros((8, 3), np.float32))).tolist()[:2] == [[0, 1, 0], [1, 0, 1]]
