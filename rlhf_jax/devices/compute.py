"""How a model is computed, whatever its architecture: types, recomputation, attention kernel, chunks."""

import dataclasses
from typing import Literal

import jax

from rlhf_jax.settings import Settings, Whole
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Compute(Settings):
    """How a model is computed, whatever its architecture."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk; parameters, norms, softmax and logits are float32
    # What the backward pass computes again, a layer at a time: norms and activations, all but matrix products with
    # weights, or all.
    remat: Literal["none", "dots", "full"] = "none"
    frozen: Literal["float32", "bfloat16"] = "float32"  # of the parameters of models that are not trained
    attention: Literal["auto", "plain", "flash"] = "auto"  # flash is TPUs' or GPUs' kernel, auto is where one serves
    chunk: Whole = 0  # columns whose logits exist at a time where log-probabilities are computed; 0 is all of them
    # Whether the program has each layer written out and no loop: faster, and longer to compile. None is where a CPU
    # computes at most 12 layers and remat is none, which its compiler heeds in a loop alone. Sampling has its own way.
    unroll: bool | None = None

    def freeze(self, params: Params) -> Params:
        """Parameters that are not to be trained, in the type that `frozen` names."""
        return jax.tree.map(lambda x: x.astype(self.frozen), params)
