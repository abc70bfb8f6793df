"""Settings of how a model is computed, independent of its architecture: dtypes, recompute, attention kernel, chunks."""

import dataclasses
from typing import Literal

import jax

from rlhf_jax.devices import shared
from rlhf_jax.settings import Settings, Whole
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Compute(Settings):
    """Settings of how a model is computed, independent of its architecture."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the trunk; norms, softmax and logits are float32
    # Gradient checkpointing, a layer at a time: recompute only norms and activations (none), everything except matrix
    # products with weights (dots), or everything (full). More recompute saves memory and costs time.
    remat: Literal["none", "dots", "full"] = "none"
    frozen: Literal["float32", "bfloat16"] = "float32"  # dtype of the parameters of models that are not trained
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

    def freeze(self, params: Params) -> Params:
        """The parameters of a model that is not trained, cast to the dtype `frozen`."""
        return jax.tree.map(lambda x: x.astype(self.frozen), params)
