"""Low-rank adaptation (arXiv:2106.09685): y = x W + (alpha / rank) x A B, where only A and B are trained.

Trained parameters and the frozen base are two trees. Adapters have the paths of the kernels that they adapt, so
`attach` merges one tree into the other; the result can be used wherever parameters can, since `layers.Linear` adds
x A B where it finds adapters beside its kernel. A scalar model's head is trained whole. Without a rank all parameters
are trained and the base is empty, so that an experiment is written once for both.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlhf_jax.devices.compute import INPUTS, STACKED, Kernel, dequantize, is_quantized
from rlhf_jax.settings import Count, Positive, Settings
from rlhf_jax.types import InputError, Params, TrainState

HEAD = ("kernel",), ("bias",)  # paths of a scalar model's head


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the adapters."""

    rank: Count | None = None  # of A B; None trains all weights instead
    alpha: Positive = 16.0  # alpha / rank multiplies A B
    kernels: tuple[Kernel, ...] = ("qkv", "out", "up", "down")  # what is adapted, in attention and in the MLP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and any(getattr(self, field.name) != field.default for field in dataclasses.fields(self)):
            raise InputError("alpha and kernels have no effect without a rank")
        if not self.kernels:
            raise InputError(f"no kernels: expected some of {', '.join(INPUTS)}")


def split(params: Params, cfg: Config, key: jax.Array) -> tuple[Params, Params]:
    """Trained and base parameters of a network; `attach` of the two computes the same as `params`.

    The trained ones are the adapters, `kernel_a` [L, inputs, rank] from N(0, 1 / inputs) and `kernel_b`
    [L, rank, outputs], at first 0, and a scalar model's head; experts have one each, [L, E, ...]. Without a rank they
    are all of `params`.
    """
    if cfg.rank is None:
        return params, {}
    base = flatten_dict(params)
    trained = {path: base.pop(path) for path in HEAD if path in base}
    adapted = [path[:-1] for path in sorted(base) if path[-1] == "kernel" and path[-2] in cfg.kernels]
    for n, path in enumerate(adapted):
        shape = base[*path, "kernel"].shape
        stack = 2 if path[-2] == STACKED else 1
        split_at = stack + INPUTS[path[-1]]
        inputs, outputs = math.prod(shape[stack:split_at]), math.prod(shape[split_at:])
        noise = jax.random.normal(jax.random.fold_in(key, n), (*shape[:stack], inputs, cfg.rank))
        trained[*path, "kernel_a"] = inputs**-0.5 * noise
        trained[*path, "kernel_b"] = jnp.zeros((*shape[:stack], cfg.rank, outputs))
    return unflatten_dict(trained), unflatten_dict(base)


def attach(base: Params, trained: Params, cfg: Config) -> Params:
    """Parameters for an apply function: `trained` merged into `base`, with `kernel_b` scaled by alpha / rank."""
    scaled = {
        path: x * (cfg.alpha / cfg.rank) if path[-1] == "kernel_b" and cfg.rank else x
        for path, x in flatten_dict(trained).items()
    }
    return unflatten_dict(flatten_dict(base) | scaled)


def merge(base: Params, trained: Params, cfg: Config) -> Params:
    """Parameters to save, whose kernels are W + (alpha / rank) A B: they compute the same as `attach` of the two.

    Those on an int8 base are float32.
    """
    attached = attach(base, trained, cfg)
    params = flatten_dict(dequantize(attached) if is_quantized(attached) else attached)
    for path in [path[:-1] for path in params if path[-1] == "kernel_a"]:
        change = jnp.matmul(params.pop((*path, "kernel_a")), params.pop((*path, "kernel_b")), precision="highest")
        kernel = params[*path, "kernel"]
        params[*path, "kernel"] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten_dict(params)


def with_base(network: Callable, base: Params, cfg: Config) -> Callable:
    """`network(params, ...)` as a function of the trained parameters, on this base."""
    return lambda trained, *args, **kwargs: network(attach(base, trained, cfg), *args, **kwargs)


def on_base(cfg: Config, make_step: Callable[[Callable[[Callable], Callable]], Callable]) -> Callable:
    """A train step `(state, base, *batch)` that trains adapters on a frozen base.

    `make_step(on)` returns a train step `(state, *batch)`; `on(network)` is the network on the base:

        on_base(cfg, lambda on: functools.partial(sft.train_step, logprobs_fn=on(network), tx=tx))
    """

    return functools.partial(_step_on_base, cfg=cfg, make_step=make_step)


def _step_on_base(
    state: TrainState, base: Params, *batch: Any, cfg: Config, make_step: Callable, axis: str | None = None
) -> Any:
    return make_step(lambda network: with_base(network, base, cfg))(state, *batch, axis=axis)
