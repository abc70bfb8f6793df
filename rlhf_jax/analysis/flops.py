"""Count the floating-point operations of a step, in its traced program before XLA changes anything, or by a formula.

A product of matrices [m, k] and [k, n] counts 2 m k n, as often as a loop repeats it or a backward pass recomputes it.
All else (softmax, norms, activations) is left out: beside the products it is small, and other units compute it.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rlhf_jax import models

PASSES = {  # of a TPU's matrix unit, which multiplies bfloat16, over a float32 product of this precision
    jax.lax.Precision.DEFAULT: 1,
    jax.lax.Precision.HIGH: 3,
    jax.lax.Precision.HIGHEST: 6,
}


PEAKS = {  # dense bfloat16 products a second, by `jax.Device.device_kind`, from the makers' tables
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # a device is half a chip
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """The operations of all devices together."""

    total: float = 0.0
    passes: float = 0.0  # the same, each counted once for every pass that a TPU's matrix unit makes over it

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.total + other.total, self.passes + other.passes)

    def __mul__(self, times: float | int) -> "Flops":
        return Flops(self.total * times, self.passes * times)


def count(step: Callable, *args: Any) -> Flops:
    """The operations of one call of a step, which may be mapped over devices; `args` may be shapes.

    A while-loop counts as often as it can run.
    """
    return _count(jax.make_jaxpr(step)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr, share: float = 1.0) -> Flops:
    """The operations of a program; `share` is the part of the rows of a grouped product that has a group."""
    total = Flops()
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "dot_general":
                total += _product(eqn)
            case "ragged_dot_general":
                total += _grouped_product(eqn) * share
            case "scan":
                total += _count(eqn.params["jaxpr"].jaxpr, share) * eqn.params["length"]
            case "while":
                total += _count(eqn.params["body_jaxpr"].jaxpr, share) * _trip_count(eqn)
            case "shard_map":
                total += _count(eqn.params["jaxpr"], _own_share(eqn)) * eqn.params["mesh"].size
            case "cond":
                total += max((_count(branch.jaxpr, share) for branch in _branches(eqn)), key=lambda x: x.total)
            case "pallas_call":
                total += _kernel(eqn)
            case _:
                for inner in _inner(eqn):
                    total += _count(inner, share)
    return total


def _product(eqn: core.JaxprEqn) -> Flops:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _multiplied(eqn, contracted)


def _multiplied(eqn: core.JaxprEqn, contracted: Sequence[int]) -> Flops:
    """The operations of a product whose left factor has these contracted axes."""
    left: Any = eqn.invars[0].aval
    result: Any = eqn.outvars[0].aval
    flops = 2.0 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)
    precision = eqn.params["precision"]
    single = left.dtype.itemsize > 2
    passes = PASSES[precision[0] if isinstance(precision, tuple) else jax.lax.Precision.DEFAULT] if single else 1
    return Flops(flops, flops * passes)


def _grouped_product(eqn: core.JaxprEqn) -> Flops:
    """The operations of a product in which each row is multiplied by the matrix of its own group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    sizes: Any = eqn.invars[2].aval
    # Where rows are summed over, the result has a matrix for each group, and a row adds to one of them.
    summed = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return _multiplied(eqn, contracted) * (1 / sizes.shape[-1] if summed else 1)


def _own_share(eqn: core.JaxprEqn) -> float:
    """The part of its rows for which a device of a mesh has the group: groups are spread over the axis tensor."""
    split = any(
        "tensor" in (axes if isinstance(axes, tuple) else (axes,)) for spec in eqn.params["in_specs"] for axes in spec
    )
    return 1 / eqn.params["mesh"].shape["tensor"] if split else 1.0


def _kernel(eqn: core.JaxprEqn) -> Flops:
    """The operations of a Pallas kernel: those of its body for each point of the grid."""
    return _count(eqn.params["jaxpr"]) * math.prod(eqn.params["grid_mapping"].grid)


def _trip_count(eqn: core.JaxprEqn) -> int:
    """The most times that a while-loop runs, where its condition is `counter < constant`; else 1."""
    condition = eqn.params["cond_jaxpr"].jaxpr
    carried = condition.invars[eqn.params["cond_nconsts"] :]
    first = eqn.invars[eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] :]
    for test in condition.eqns:
        if test.primitive.name == "lt" and isinstance(test.invars[1], core.Literal) and test.invars[0] in carried:
            start = first[carried.index(test.invars[0])]
            return int(test.invars[1].val) - (int(start.val) if isinstance(start, core.Literal) else 0)
    return 1


def _branches(eqn: core.JaxprEqn) -> tuple:
    """The branches that may be taken: where the platform decides, those of a TPU."""
    platforms = eqn.params.get("branches_platforms") or [None] * len(eqn.params["branches"])
    own = [n for n, names in enumerate(platforms) if names and "tpu" in names]
    others = [n for n, names in enumerate(platforms) if names is None] or range(len(platforms))
    return tuple(eqn.params["branches"][n] for n in own or others)


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def forward(
    config: models.Config, rows: float | int, columns: float | int, read: float | int, logits: bool = True
) -> float:
    """The operations of a forward pass over rows of so many columns, each of which sees those before it and itself.

    The last layer computes only the last `read` columns of a row, which are unembedded if `logits`. A backward pass
    takes twice as much again. What an implementation does beyond it (padding, scores that a mask hides, more of the
    last layer, recompute) is not counted, so that this measures utilisation.
    """
    c = config
    width = c.n_heads * c.head_dim
    qkv = c.d_model * (width + 2 * c.n_kv_heads * c.head_dim)  # for every column, since others see its key and value
    mlp = (3 if c.gated else 2) * c.d_ff
    if c.experts is not None:  # those that compute a token, and the router
        mlp = c.experts.active * mlp + c.experts.count
    out_and_mlp = c.d_model * (width + mlp)
    # The term in `width` is query . key and weights . value over the columns that each one sees.
    layer = lambda read: columns * qkv + read * (out_and_mlp + width * (2 * columns - read + 1))
    unembedding = read * c.d_model * c.vocab_size if logits else 0
    return float(2 * rows * ((c.n_layers - 1) * layer(columns) + layer(read) + unembedding))


def peak(dtype: Any) -> float:
    """The products a second of all devices together: by PEAKS, or else as measured on one large product."""
    device = jax.devices()[0]
    known = PEAKS.get(device.device_kind) if jnp.dtype(dtype) == jnp.bfloat16 else None
    return jax.device_count() * (known or _measure_peak(jnp.dtype(dtype), device.platform == "cpu"))


@functools.cache
def _measure_peak(dtype: Any, small: bool) -> float:
    size = 1024 if small else 8192
    x = jnp.zeros((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        return time.perf_counter() - start

    # Devices that are made of one CPU share its cores, which the product had to itself.
    return 2 * size**3 / min(seconds() for _ in range(5)) / (jax.device_count() if small else 1)
