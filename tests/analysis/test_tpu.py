"""Reports of compiled steps: on CPU devices everywhere, and for TPUs where their compiler is installed."""

import dataclasses
import functools
from importlib import util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import models
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.analysis import flops, hlo, tpu
from rlhf_jax.devices import parallel
from rlhf_jax.types import InputError, Tokens
from tests import tiny

needs_libtpu = pytest.mark.skipif(util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for TPUs")
LAYOUTS = {
    "pmap": parallel.Config(),
    "mesh": parallel.Config(data=2, fsdp=2, tensor=2),
    "partly whole": parallel.Config(fsdp=4, tensor=2, whole=("critic",)),
}
REPORT = tpu.Report(
    name="train",
    topology="v5e:2x4",
    chips=8,
    tokens=4000,
    arguments=3.0 * tpu.GIB,
    temporaries=2.5 * tpu.GIB,
    outputs=0.25 * tpu.GIB,
    code=0.5 * tpu.GIB,
    beside=1.0 * tpu.GIB,
    counted=2.0 * tpu.GIB,
    host=0.0,
    flops=flops.Flops(total=1e12, passes=6e12),
    traffic=hlo.Traffic({"all-reduce": 1.5 * tpu.GIB}, {"all-reduce": 3}, waits={}, sent=4e9, memory=81.9e9, host=0.0),
    compile_seconds=12.0,
)


def state_of(config):
    tx = optim.adamw(1e-3)
    params = {"policy": tiny.policy(config), "critic": tiny.scalar(config)}
    return optim.init(params, tx, jax.random.key(0))


@pytest.mark.parametrize("cfg", LAYOUTS.values(), ids=LAYOUTS)
def test_shapes_are_placed_as_arrays_are(cfg):
    layout = parallel.layout(cfg)
    pmapped = isinstance(layout, parallel.Pmap)
    state = state_of(tiny.LLAMA)
    placed, shapes = layout.state(state), tpu.state_shapes(layout, jax.eval_shape(lambda: state_of(tiny.LLAMA)))
    for x, y in zip(jax.tree.leaves(placed), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert pmapped or y.sharding == x.sharding
    batch = {"tokens": np.zeros((3, 16, 5), np.int32), "mask": np.zeros((3, 16), bool)}
    rows, shapes = layout.rows(batch, 1), tpu.row_shapes(layout, batch, 1)
    for name, x in rows.items():
        assert (x.shape, x.dtype) == (shapes[name].shape, shapes[name].dtype)
        assert pmapped or x.sharding == shapes[name].sharding


@pytest.mark.parametrize(("cfg", "parts"), [(parallel.Config(), 8), (parallel.Config(fsdp=2, tensor=2), 4)])
def test_rows_that_do_not_divide_are_refused(cfg, parts):
    with pytest.raises(InputError, match=f"a batch of 14 rows does not divide over {parts}: use a multiple of it"):
        tpu.row_shapes(parallel.layout(cfg), np.zeros(14))


def program(cfg, config=tiny.LLAMA, columns=20, devices=None):
    """`sft`'s step over all devices."""
    layout, tx = parallel.layout(cfg, devices), optim.adamw(1e-3)
    train_step = functools.partial(sft.train_step, logprobs_fn=models.logprobs_fn(config), tx=tx)
    step = layout.step(train_step, donate=(0,))
    state = jax.eval_shape(lambda p: optim.init(p, tx, jax.random.key(0)), models.parameter_shapes(config))
    of = lambda dtype: jax.ShapeDtypeStruct((16, columns), dtype)
    batch = Tokens(tokens=of(jnp.int32), segment=of(jnp.int32), target=of(bool))
    return tpu.Program("train", step, (tpu.state_shapes(layout, state), tpu.row_shapes(layout, batch)), 16 * columns)


@pytest.mark.slow
def test_a_report_of_a_step_over_all_devices():
    weights = 4 * models.parameter_count(tiny.LLAMA)
    report = tpu.compile_report(program(parallel.Config()), "v5e:2x4", 8)
    assert report.arguments == pytest.approx(3 * weights, rel=0.05)  # with Adam's two moments; rows are small
    assert report.outputs < 0.02 * weights  # the state takes the place of the one before
    assert report.traffic is not None and report.temporaries > weights  # gradients
    assert report.traffic.collectives["all-reduce"] == pytest.approx(weights, rel=0.01)
    spread = tpu.compile_report(program(parallel.Config(fsdp=8)), "v5e:2x4", 8)
    assert spread.arguments == pytest.approx(3 * weights / 8, rel=0.25)  # some norms and biases are whole
    assert spread.flops == report.flops
    assert spread.traffic is not None and "all-gather" in spread.traffic.collectives


def test_bounds_are_those_of_the_chip():
    assert REPORT.total == 7.25 * tpu.GIB
    assert REPORT.share == 7.25 / 15.75
    assert REPORT.bounds == {
        "compute": pytest.approx(6 / 197),
        "memory": pytest.approx(0.1),
        "links": pytest.approx(0.02),
    }
    assert REPORT.seconds == pytest.approx(0.1)
    assert REPORT.mfu == pytest.approx(1 / 19.7)
    assert REPORT.record()["bounds"] == REPORT.bounds
    held = "3.00 | 2.50 | 2.00 | 1.00 | 7.25 | 46 %"
    assert f"| train | {held} | all-reduce 1.5 | 1 | 0.1 | memory | 5 % | 40,000 | 12 s |" in tpu.table([REPORT])


def test_a_train_step_counted_on_paper():
    """Llama 3 8B over 16 chips, a row of 4096 tokens on each, logits of 512 columns at a time."""
    compute = models.Compute("bfloat16", remat="full", chunk=512)
    config = dataclasses.replace(models.preset("llama3-8b"), compute=compute)
    mesh = {"data": 1, "fsdp": 16, "tensor": 1}
    gradient, inputs = 4 * 8_030_261_248 / 16, 32 * 4096 * 4096 * 2
    layer = 4096 * (6144 + 4096 + 3 * 14336) * 2
    computed = 4096 * (5 * 4096 + 6144 + 4096 + 3 * 14336) * 2
    table, logits = 128256 * 4096 * (2 + 4), 512 * 128256 * 4  # the table's gradient is float32
    once = gradient + inputs + table + 2 * (layer + computed + logits)
    assert tpu.train_bytes(config, mesh, 16, 4096) == pytest.approx(once, rel=1e-6)
    twice = tpu.train_bytes(config, mesh, 32, 4096, microbatches=2)  # as many rows at a time
    assert twice - once == pytest.approx(gradient, rel=1e-6)
    narrow = {"data": 1, "fsdp": 4, "tensor": 4}  # four rows on a chip, of which it keeps a quarter
    computed += 3 * 4096 * 5 * 4096 * 2  # what has the width of the model is whole
    spread = gradient + inputs + table / 4 + 2 * (layer / 4 + computed + logits)
    assert tpu.train_bytes(config, narrow, 16, 4096) == pytest.approx(spread, rel=1e-6)
    odd = dataclasses.replace(config, vocab_size=128257)  # words that do not divide, and so are whole
    whole = spread + 3 / 4 * table + 2 * 3 * logits
    assert tpu.train_bytes(odd, narrow, 16, 4096) == pytest.approx(whole, rel=1e-4)


def test_what_does_not_fit_says_so():
    large = dataclasses.replace(REPORT, temporaries=20.0 * tpu.GIB, traffic=None)
    assert large.share > 1
    assert "157 %: does not fit | none | 1 |  |  |  |  | 12 s |" in tpu.table([large])


def test_a_machine_without_the_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rlhf_jax\[tpu\]'"):
        tpu.devices("v5e:2x4")


@pytest.mark.parametrize("topology", ["v5e", "v9:2x4", "v5e:", "v5e:8", "v5litepod-8"])
def test_a_strange_topology_is_refused(topology, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="expected one of v4, v5e, v5p, v6e, tpu7x"):
        tpu.devices(topology)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x2", 8), ("v5e:1x1", 1), ("v5p:2x2x4", 16), ("v6e:2x4", 8), ("tpu7x:2x2x1", 8), ("tpu7x:1x1x1", 2)],
)
def test_slices_have_a_device_a_chip_or_two_of_the_newest(topology, count):
    found = tpu.devices(topology)
    assert len(found) == count and found[0].device_kind in flops.PEAKS
    assert flops.PEAKS[found[0].device_kind] == tpu.CHIPS[topology.partition(":")[0]].flops


@needs_libtpu
def test_a_slice_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="v5e:3x5"):
        tpu.devices("v5e:3x5")


@needs_libtpu
@pytest.mark.parametrize("cfg", [parallel.Config(), parallel.Config(fsdp=4, tensor=2)], ids=["pmap", "mesh"])
def test_a_step_for_a_tpu_has_its_attention(cfg):
    config = dataclasses.replace(tiny.LLAMA, max_length=256)
    lowered = lambda columns: program(cfg, config, columns, devices=tpu.devices("v5e:2x4"))
    texts = [(p := lowered(columns)).step.lower(*p.args).as_text() for columns in (256, 20)]
    assert ["tpu_custom_call" in text for text in texts] == [True, False]


@needs_libtpu
def test_a_report_of_a_step_for_a_tpu():
    report = tpu.compile_report(program(parallel.Config(), devices=tpu.devices("v5e:2x4")), "v5e:2x4", 8)
    weights = 4 * models.parameter_count(tiny.LLAMA)
    assert report.traffic is not None and report.share < 0.01
    assert report.arguments > 3 * weights
    assert report.traffic.collectives["all-reduce"] == pytest.approx(weights, rel=0.01)


@pytest.fixture
def cached(tmp_path):
    """The files of one program in JAX's persistent cache, which is empty at first; that of the tests comes back."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [jax.config.values[name] for name in names]

    def use(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(str(tmp_path), 0.0)
    yield lambda: list(tmp_path.glob("jit_add_one-*-cache"))
    use(*before)


@pytest.mark.parametrize(
    "find",
    [jax.devices, pytest.param(lambda: tpu.devices("v5e:2x2"), marks=needs_libtpu)],
    ids=["cpu", "tpu"],
)
def test_a_report_leaves_the_cache_alone(find, cached):
    """It compiles anew, for devices that may not be there; what runs before and afterwards is in the cache."""
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(find()[0]))

    def add_one(x):
        return x + 1

    for n in (1, 2):
        tpu.compile_report(tpu.Program("x", jax.jit(add_one), (x,), 1), "v5e:2x2", 1)
        assert len(cached()) == n - 1
        jax.jit(add_one)(np.zeros(n))
        assert len(cached()) == n


@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_a_step_that_does_not_fit_is_reported(topology):
    place, memory = (
        jax.sharding.SingleDeviceSharding(tpu.devices(topology)[0]),
        tpu.CHIPS[topology.partition(":")[0]].memory,
    )
    x = jax.ShapeDtypeStruct((int(0.6 * memory) // 4096, 1024), jnp.float32, sharding=place)
    step = jax.jit(lambda x: x + 1)
    report = tpu.compile_report(tpu.Program("x", step, (x,), 1), topology, 1)
    assert (report.share, report.arguments / memory) == (pytest.approx(1.2, rel=0.01), pytest.approx(0.6, rel=0.01))
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"available HBM \({memory / tpu.GIB:.2f}G\)"):
        step.lower(x).compile()
