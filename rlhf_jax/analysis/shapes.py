"""A layout that places shapes instead of arrays, so that an experiment's own `main` tells which steps it compiles.

`Shapes` stands where an experiment expects its `parallel.Layout`. It runs no step: it notes the shapes of the step's
arguments and of whatever else lies on the devices as a `Call`, and returns shapes of the results. So `main` comes to
its next step with all that it would hold by then, but without a byte of it. Run it under `jax.eval_shape`, so that
what it computes outside of steps has no more than a shape either.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.analysis import tpu
from rlhf_jax.devices import parallel
from rlhf_jax.types import TrainState

T = TypeVar("T")


class Placed(np.lib.mixins.NDArrayOperatorsMixin):
    """The shape of an array on the devices; what is computed from it is a tracer."""

    def __init__(self, struct: jax.ShapeDtypeStruct):
        self.struct, self.shape, self.dtype, self.ndim = struct, struct.shape, struct.dtype, len(struct.shape)

    def __jax_array__(self) -> jax.Array:
        return unknown(self.shape, self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any) -> jax.Array:
        """The result of an operator such as `*`."""
        known = [x.__jax_array__() if isinstance(x, Placed) else x for x in inputs]
        return getattr(jnp, ufunc.__name__)(*known)

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # type: ignore[assignment]


def unknown(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of this shape; under `jax.eval_shape` it takes no memory."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    return jnp.zeros(shape, dtype)


def shapes(tree: Any) -> Any:
    """The shapes of arrays on host or device, of tracers, and of what is placed."""
    one = lambda x: x.struct if isinstance(x, Placed) else jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True)
class Call:
    """A step, and the shapes with which it was called first."""

    function: str  # name of the function that the step compiles
    step: Callable
    args: tuple
    result: Any
    beside: list[jax.ShapeDtypeStruct]  # what else lay on the devices: states and models, no rows


class Shapes:
    """A layout that places shapes as `layout` places arrays."""

    def __init__(self, layout: parallel.Layout):
        self.layout = layout
        self.calls: list[Call] = []
        self._meshed = isinstance(layout, parallel.Mesh)
        self._held: weakref.WeakSet[Placed] = weakref.WeakSet()  # what is on the devices, as long as somebody has it

    def loaded(self, tree: T) -> T:
        """Parameters as `models.load` returns them: on a mesh where they shall lie, else on the host."""
        return self.state(tree) if self._meshed else jax.tree.map(lambda x: unknown(x.shape, x.dtype), tree)

    def state(self, tree: T) -> T:
        return self._place(tree, tpu.state_shapes(self.layout, shapes(tree)))

    def frozen(self, tree: T) -> T:
        return self._place(tree, tpu.state_shapes(self.layout, shapes(tree), frozen=True))

    def _place(self, tree: T, structs: T) -> T:
        known: dict[int, Placed] = {}  # a mesh does not copy what is in a tree twice

        def place(x: Any, struct: jax.ShapeDtypeStruct) -> Placed:
            if self._meshed and isinstance(x, Placed) and x.struct.sharding == struct.sharding:
                return x
            if self._meshed and id(x) in known:
                return known[id(x)]
            known[id(x)] = placed = Placed(struct)
            self._held.add(placed)
            return placed

        return jax.tree.map(place, tree, structs)

    def rows(self, tree: T, rows_axis: int = 0) -> T:
        return jax.tree.map(Placed, tpu.row_shapes(self.layout, shapes(tree), rows_axis))

    def step(self, step: Callable, *, donate: tuple[int, ...] = ()) -> Callable:
        compiled = self.layout.step(step, donate=donate)
        inner = step
        while isinstance(inner, functools.partial):
            inner = inner.func
        results: dict[Any, Any] = {}

        def call(*args: Any) -> Any:
            structs = self._placed_shapes(args)
            leaves, tree = jax.tree.flatten(structs)
            key = tree, tuple((x.shape, x.dtype) for x in leaves)
            if key not in results:
                results[key] = jax.eval_shape(compiled, *structs)
                mine = {id(x) for x in jax.tree.leaves(args)}
                beside = [x.struct for x in self._held if id(x) not in mine]
                self.calls.append(Call(inner.__name__, compiled, structs, results[key], beside))
            for n in donate:
                for x in jax.tree.leaves(args[n]):
                    self._held.discard(x)
            return jax.tree.map(self._result, results[key], is_leaf=lambda x: isinstance(x, TrainState))

        return call

    def _placed_shapes(self, args: tuple) -> tuple:
        """The shapes of arguments, of which some may have been computed from what was placed."""
        if not self._meshed:
            return shapes(args)
        whole = tpu.state_shapes(self.layout, shapes(args))
        return jax.tree.map(lambda x, struct: x.struct if isinstance(x, Placed) else struct, args, whole)

    def _result(self, x: Any) -> Any:
        if isinstance(x, TrainState):
            placed = jax.tree.map(Placed, tpu.state_shapes(self.layout, x) if self._meshed else x)
            self._held.update(jax.tree.leaves(placed))
            return placed
        if not self._meshed:
            return Placed(x)
        return Placed(tpu.row_shapes(self.layout, x) if x.ndim else tpu.state_shapes(self.layout, x))

    def get(self, tree: T) -> T:
        """On a mesh what it is given, but numbers, which the host may want to see, are made up."""

        def one(x: Any) -> Any:
            shape = x.shape if self._meshed else x.shape[1:]
            if not shape and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return np.ones((), x.dtype)
            return x if self._meshed else unknown(shape, x.dtype)

        return jax.tree.map(one, tree)

    def gather(self, tree: T) -> T:
        """Rows that are made up: 0 and 1 in turn, so that they vary."""

        def one(x: Any) -> np.ndarray:
            shape = x.shape if self._meshed else (x.shape[0] * x.shape[1], *x.shape[2:])
            return (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(x.dtype)

        return jax.tree.map(one, tree)

    fetch = gather

    def sharding(self, path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return self.layout.sharding(path, shape)
