"""Settings of how a model is computed, independent of its architecture: dtypes, recompute, attention kernel, chunks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from rlhf_jax.devices import shared
from rlhf_jax.settings import Settings, Whole
from rlhf_jax.types import Params

Kernel = Literal["qkv", "out", "up", "down"]  # the linear layers of a block
INPUTS: dict[Kernel, int] = {"qkv": 1, "out": 3, "up": 1, "down": 1}  # axes of a kernel that are inputs, after [L]
STACKED = "experts"  # layers whose kernels are [L, E, ...]
RATIO_ERROR = {"float32": 1e-4, "bfloat16": 0.1}  # `ratio_error`, by the dtype of the trunk


@dataclasses.dataclass(frozen=True)
class Compute(Settings):
    """Settings of how a model is computed, independent of its architecture."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the trunk; norms, softmax and logits are float32
    # Gradient checkpointing, a layer at a time: recompute only norms and activations (none), everything except matrix
    # products with weights (dots), or everything (full). More recompute saves memory and costs time.
    remat: Literal["none", "dots", "full"] = "none"
    # Dtype of the parameters of models that are not trained. int8: each kernel in int8 with a scale for each of its
    # outputs, and everything else in bfloat16.
    frozen: Literal["float32", "bfloat16", "int8"] = "float32"
    # Kernels with which answers are sampled. int8: rounded as by `frozen`, anew for each batch of answers.
    rollout: Literal["float", "int8"] = "float"
    # Keys and values that sampling keeps. float: in the dtype of the trunk; int8: with a scale for each token and head.
    cache: Literal["float", "int8"] = "float"
    attention: Literal["auto", "plain", "flash"] = "auto"  # flash: fused TPU or GPU kernel; auto: if it is available
    chunk: Whole = 0  # columns whose logits are computed at a time, to save memory; 0 computes all at once
    # Unroll the loop over layers: faster to run, slower to compile. None: unroll on CPU for up to 12 layers if remat is
    # none (XLA for CPU honours remat only inside a loop) and without adapters. Sampling ignores this.
    unroll: bool | None = None
    # Compute a prompt once for all answers to it, where a step has several. None: if that saves a third of all columns.
    share_prompts: bool | None = None

    def shares(self, prompt: int, answer: int, group: int) -> bool:
        """Whether a prompt of so many columns is computed once for a group of answers of so many."""
        if group == 1 or prompt < 2:  # the last token is computed with each answer
            return False
        return shared.worthwhile(prompt, answer, group) if self.share_prompts is None else self.share_prompts

    @property
    def ratio_error(self) -> float:
        """The largest |ratio - 1| that rounding may cause in the first update on a rollout.

        docs/performance.md has what was measured in int8.
        """
        if self.rollout == "int8":
            return 5.0
        return 1.0 if self.cache == "int8" else RATIO_ERROR[self.dtype]

    def freeze(self, params: Params) -> Params:
        """The parameters of a model that is not trained, cast to the dtype `frozen`."""
        return quantize(params) if self.frozen == "int8" else jax.tree.map(lambda x: x.astype(self.frozen), params)


def quantize(params: Params, layer: str | None = None, others: DTypeLike | None = jnp.bfloat16) -> Params:
    """Parameters with int8 kernels; `layers.Linear` computes with them as they are.

        kernel = round(W / scale), with scale = max |W| / 127 over all inputs of an output

    The scale, float32 [L, *outputs], lies beside the kernel as `kernel_scale`. All `others` are cast to this dtype, or
    stay as they are; so do kernels that are in int8 already. `layer` is the name under which `params` lie. Kernels of
    experts are not quantised.
    """
    cast = lambda x: x if others is None else x.astype(others)
    quantized: Params = {}
    for name, x in params.items():
        if name == STACKED:
            quantized[name] = jax.tree.map(cast, x)
        elif isinstance(x, dict):
            quantized[name] = quantize(x, name, others)
        elif name == "kernel" and layer in INPUTS and x.dtype != jnp.int8:
            axes = tuple(range(1, 1 + INPUTS[layer]))
            x = x.astype(jnp.float32)
            scale = jnp.max(jnp.abs(x), axes, keepdims=True) / 127
            quantized[name] = jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
            quantized["kernel_scale"] = jnp.squeeze(scale, axes)
        else:
            quantized[name] = cast(x)
    return quantized


def is_quantized(params: Params) -> bool:
    """Whether these are parameters from `quantize`, with others beside them or not."""
    return any(path[-1] == "kernel_scale" for path in flatten_dict(params))


def dequantize(params: Params) -> Params:
    """The float32 parameters that those from `quantize` stand for."""
    flat = flatten_dict(params)
    scales = {path[:-1]: flat.pop(path) for path in [*flat] if path[-1] == "kernel_scale"}
    whole = {path: x.astype(jnp.float32) for path, x in flat.items()}
    for path, scale in scales.items():
        inputs = range(1, 1 + whole[*path, "kernel"].ndim - scale.ndim)
        whole[*path, "kernel"] *= jnp.expand_dims(scale, tuple(inputs))
    return unflatten_dict(whole)
