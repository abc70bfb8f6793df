"""Compile a step for a Cloud TPU on a machine without one: its memory, its traffic, and a lower bound on its time.

The compiler for TPUs (`libtpu`) runs on any machine. `compile_report` hands it a step and the shapes of its arguments.
The `Report` holds what the compiler says, what `hlo` reads in the compiled program, and what `flops` counts in the
traced one. The bound takes matrix units, memory and links to be busy at their peak, and waits for the slowest.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import util
from typing import Any, TypeVar

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import models
from rlhf_jax.analysis import flops, hlo
from rlhf_jax.devices import parallel
from rlhf_jax.types import InputError

GIB = 2**30
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: a chip, or half of a tpu7x. Seconds and bytes, by the tables of cloud.google.com/tpu/docs."""

    memory: float  # for a program, as the compiler tells when one uses more: a little less than in the tables
    flops: float  # bfloat16 products a second
    bandwidth: float  # of the memory
    links: float  # to its neighbours, all together and one way: half of the tables' both ways
    megacore: bool = False  # whether its two cores are one device


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 300e9, megacore=True),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 400e9),
    "tpu7x": Chip(94.74 * GIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2),
}


def devices(topology: str) -> list[Any]:
    """The devices of a slice such as "v5e:2x4", to compile for: one for each chip, or two of a tpu7x.

    Raises InputError where there is no compiler for TPUs, or no such slice.
    """
    if util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs libtpu: pip install 'rlhf_jax[tpu]'")
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise InputError(f"topology {topology!r}: expected one of {', '.join(CHIPS)}, a colon and a shape, as v5e:2x4")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU that only one process may have
    describe = functools.partial(topologies.get_topology_desc, topology, "tpu")
    if CHIPS[kind].megacore:
        describe = functools.partial(describe, chip_config_name="megacore")
    if math.prod(map(int, shape.split("x"))) == 1:  # by default a host has four
        describe = functools.partial(describe, chips_per_host_bounds=(1, 1, 1))
    try:
        return list(describe().devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {topology!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Program:
    """A step as an experiment runs it, with the shapes of its arguments."""

    name: str
    step: Any  # as a layout's `step` returns it
    args: tuple  # trees of jax.ShapeDtypeStruct, placed by `state_shapes` and `row_shapes`
    tokens: int  # tokens that a call learns from, samples or scores, over all devices
    beside: Any = ()  # shapes of the other arrays that lie on the devices during the call
    counted: float | None = None  # `train_bytes` of a train step, to compare its temporaries with


def state_shapes(layout: parallel.Layout, tree: T, frozen: bool = False) -> T:
    """The shapes that `layout.state`, or else `layout.frozen`, gives arrays of these shapes."""
    if not isinstance(layout, parallel.Mesh):
        count = _device_count(layout)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)
    shardings = layout.shardings(tree, parallel.HOST if frozen and layout.offload else None)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, shardings)


def _device_count(layout: Any) -> int:
    return len(layout.devices or jax.devices())


def row_shapes(layout: parallel.Layout, tree: T, rows_axis: int = 0) -> T:
    """The shapes that `layout.rows` gives a batch of these shapes; raises InputError where the rows do not divide."""
    mesh = layout.mesh if isinstance(layout, parallel.Mesh) else None
    count = math.prod(mesh.shape[name] for name in parallel.ROWS) if mesh else _device_count(layout)

    def split(x: Any) -> jax.ShapeDtypeStruct:
        rows, rest = divmod(x.shape[rows_axis], count)
        if rest:
            raise InputError(f"a batch of {x.shape[rows_axis]} rows does not divide over {count}: use a multiple of it")
        if mesh:
            sharding = NamedSharding(mesh, PartitionSpec(*(None,) * rows_axis, parallel.ROWS))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct((count, *x.shape[:rows_axis], rows, *x.shape[rows_axis + 1 :]), x.dtype)

    return jax.tree.map(split, tree)


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory and the work of one chip in a call of a program; bytes."""

    name: str
    topology: str
    chips: int
    tokens: int  # of all chips
    arguments: float
    temporaries: float
    outputs: float  # without those that take the place of arguments
    code: float
    beside: float  # other arrays that lie on the chip during the call
    counted: float | None  # temporaries by a count on paper
    host: float  # in the memory of the chip's host
    flops: flops.Flops
    traffic: hlo.Traffic | None  # None for a program that the compiler refuses because it does not fit
    compile_seconds: float

    @property
    def chip(self) -> Chip:
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def total(self) -> float:
        """All bytes in the chip's memory."""
        return self.arguments + self.temporaries + self.outputs + self.code + self.beside

    @property
    def share(self) -> float:
        """The part that this takes of the memory for a program; more than 1 does not fit."""
        return self.total / self.chip.memory

    @property
    def bounds(self) -> dict[str, float]:
        """The least seconds of a call, by the resource that it waits for."""
        moved = {"memory": self.traffic.memory, "links": self.traffic.sent} if self.traffic else {}
        speeds = {"memory": self.chip.bandwidth, "links": self.chip.links}
        return {"compute": self.flops.passes / self.chip.flops} | {name: x / speeds[name] for name, x in moved.items()}

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())

    @property
    def mfu(self) -> float:
        """The share of the peak that the products reach in these seconds; float32 takes several passes for each."""
        return self.flops.total / self.chip.flops / self.seconds

    def record(self) -> dict[str, Any]:
        """All fields and what follows from them, for JSON."""
        derived = "total", "share", "bounds", "seconds", "mfu"
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def compile_report(program: Program, topology: str, chips: int) -> Report:
    """Compile a program for the `chips` of a topology, over which its step and arguments are laid out."""
    counted = flops.count(program.step, *program.args)
    report = Report(
        name=program.name,
        topology=topology,
        chips=chips,
        tokens=program.tokens,
        arguments=argument_bytes(program.args, chips),
        temporaries=0.0,
        outputs=0.0,
        code=0.0,
        beside=argument_bytes(program.beside, chips),
        counted=program.counted,
        host=0.0,
        flops=flops.Flops(counted.total / chips, counted.passes / chips),
        traffic=None,
        compile_seconds=0.0,
    )
    start = time.perf_counter()
    try:
        with _no_cache():
            compiled = program.step.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT])\)", str(error), re.DOTALL)
        if needed is None:
            raise
        total = float(needed[1]) * 1024 ** " KMGT".index(needed[2])
        seconds = time.perf_counter() - start
        return dataclasses.replace(report, temporaries=total - report.arguments, compile_seconds=seconds)
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes + memory.host_temp_size_in_bytes
    return dataclasses.replace(
        report,
        arguments=float(memory.argument_size_in_bytes),
        temporaries=float(memory.temp_size_in_bytes),
        outputs=float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        code=float(memory.generated_code_size_in_bytes),
        host=float(host - memory.host_alias_size_in_bytes),
        traffic=hlo.traffic(compiled.as_text()),
        compile_seconds=seconds,
    )


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Turn off JAX's persistent cache, which cannot load a program for devices that are not there.

    JAX decides once whether it uses the cache. So it is reset before and afterwards, to decide again.
    """
    used = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


def argument_bytes(args: Any, chips: int) -> float:
    """The bytes that arguments of these shapes take on a chip, without the padding of its memory layout."""

    def size(x: Any) -> float:
        if x.sharding is not None and x.sharding.memory_kind == parallel.HOST:
            return 0.0
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        one = jax.ShapeDtypeStruct((), x.dtype)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            one = jax.eval_shape(jax.random.key_data, one)
        return math.prod(shape) * one.size * one.dtype.itemsize / (chips if x.sharding is None else 1)

    return math.fsum(map(size, jax.tree.leaves(args)))


def train_bytes(
    config: models.Config, mesh: Mapping[str, int], rows: int, columns: int, microbatches: int = 1
) -> float:
    """The temporaries of a train step of one network on a mesh of this shape, counted on paper.

    Bytes a chip for a batch of `rows`, where the backward pass recomputes the layers (`remat="full"`):

    - the gradient in float32, of which a chip has its part; with micro-batches twice, the sum and what is added to it
    - the input of each layer, in the type of the trunk, as everything below but logits
    - the weights of one layer, gathered over "fsdp", and their gradient; its activations, and their gradient
    - the unembedding, gathered likewise; its gradient, the logits of one chunk, and their gradient, in float32

    "tensor" divides heads, the width of MLPs, the vocabulary, if that divides, and the columns of the inputs.
    """
    c, tensor = config, mesh["tensor"]
    width = 4 if c.compute.dtype == "float32" else 2
    parts = math.prod(mesh[name] for name in parallel.ROWS) * microbatches
    tokens = rows * columns / parts  # on a chip
    gradient = 4 * models.parameter_count(c) / (mesh["fsdp"] * tensor) * (1 if microbatches == 1 else 2)
    query, both = c.n_heads * c.head_dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    gates = 2 if c.gated else 1
    mlp, experts = (gates + 1) * c.d_ff, c.experts
    weights = c.d_model * (both + query + mlp * (1 if experts is None else experts.count)) / tensor
    # A chip has room for all experts of its tokens, since they might all be its own.
    added = mlp / tensor if experts is None else experts.active * (mlp + 2 * c.d_model)
    activations = 5 * c.d_model + (both + query) / tensor + added  # of a token
    vocabulary = c.vocab_size / (1 if c.vocab_size % tensor else tensor)
    logits = min(c.compute.chunk or columns, columns) * rows / parts * vocabulary
    table = vocabulary * c.d_model
    inputs = c.n_layers * tokens * c.d_model / tensor
    return gradient + width * (inputs + 2 * weights + 2 * tokens * activations + table) + 4 * (table + 2 * logits)


def table(reports: Sequence[Report]) -> str:
    """The reports as a table in Markdown: GiB a chip, TFLOP a chip, and times at the chip's peak."""
    rows = [_cells(report) for report in reports]
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *(list(cells.values()) for cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(report: Report) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    r, gib = report, lambda size: f"{size / GIB:.2f}"
    collectives = sorted(r.traffic.collectives.items()) if r.traffic else []
    return {
        "step": r.name,
        "arguments": gib(r.arguments),
        "temporaries": gib(r.temporaries),
        "counted": "" if r.counted is None else gib(r.counted),
        "beside": gib(r.beside),
        "total": gib(r.total),
        "of memory": f"{100 * r.share:.0f} %" + (": does not fit" if r.share > 1 else ""),
        "collectives": ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in collectives) or "none",
        "TFLOP": f"{r.flops.total / 1e12:.3g}",
        "seconds": f"{r.seconds:.3g}" if r.traffic else "",
        "by": max(r.bounds, key=lambda name: r.bounds[name]) if r.traffic else "",
        "MFU": f"{100 * r.mfu:.0f} %" if r.traffic else "",
        "tokens/s": f"{r.tokens / r.seconds:,.0f}" if r.traffic else "",
        "compiled in": f"{r.compile_seconds:.0f} s",
    }
