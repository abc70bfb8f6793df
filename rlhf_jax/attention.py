"""Attention whose scores [B, H, T, T] exist a block at a time: the kernel for TPUs that ships with JAX, and cuDNN's.

They serve where queries and keys are of the same columns: training, scoring, and reading a prompt. At padding, whose
results nothing reads, they differ from `transformer.attend`. Over a mesh every device computes its own rows and heads.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import parallel

LANES = 128  # a block of columns is a multiple of it
BLOCK = 512  # columns of the largest one


def worthwhile(columns: int) -> bool:
    """Whether what the step is traced for may have a kernel, and so many columns are worth a block of it."""
    return parallel.platform() in ("tpu", "gpu") and columns > LANES


def compute_capability() -> float:
    """Of this machine's first device; 0 unless that is a GPU by NVIDIA."""
    said = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(said) if re.fullmatch(r"\d+\.\d+", said) else 0.0


def _each_its_own(local: Callable[..., Array]) -> Callable[..., Array]:
    """`local(query, key, value, rows)` on what each device of a mesh has; itself without one."""
    if not parallel.on_mesh():
        return local
    rows, groups = PartitionSpec(parallel.ROWS), PartitionSpec(parallel.ROWS, "tensor")
    heads = PartitionSpec(parallel.ROWS, None, "tensor")
    return jax.shard_map(local, in_specs=(heads, groups, groups, rows), out_specs=heads, check_vma=False)


def _pad(x: Array, columns: int, *axes: int) -> Array:
    """With zeros behind these axes, up to so many columns."""
    return jnp.pad(x, [(0, columns - size if axis in axes else 0) for axis, size in enumerate(x.shape)])


def cudnn(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    mask: Bool[Array, "B T T"],
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T G R H"]:
    """Causal attention over the keys that the mask allows, by cuDNN on a GPU from compute capability 8.0 on.

    In bfloat16, with at most 128 features a head, a multiple of 8. Scores are `scale` times the products of queries
    and keys. `xla` computes the same anywhere, scores and all.
    """
    return _each_its_own(functools.partial(_cudnn, scale=scale, implementation=implementation))(query, key, value, mask)


def _cudnn(query: Array, key: Array, value: Array, mask: Array, *, scale: float, implementation: Any) -> Array:
    rows, columns, groups, shared, size = query.shape
    # With a mask, some versions have NaN in gradients at other lengths (pytorch/pytorch#196678).
    padded = LANES * -(-columns // LANES)
    # A token that sees nothing, not even itself, would have the softmax of no scores.
    mask = _pad(mask, padded, 1, 2) | jnp.eye(padded, dtype=bool)[None]
    query = _pad(query, padded, 1).reshape(rows, padded, groups * shared, size)
    key, value = (_pad(x, padded, 2).transpose(0, 2, 1, 3) for x in (key, value))
    settings: dict[str, Any] = {"scale": scale, "is_causal": True, "implementation": implementation}
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], **settings)
    return mixed[:, :columns].reshape(rows, columns, groups, shared, size)


def splash(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    segment: Int[Array, "B T"] | Bool[Array, "B T"],
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T G R H"]:
    """Causal attention within documents, by splash attention (after arXiv:2205.14135).

    Scores are `scale` times the products of queries and keys, and then `cap tanh(s / cap)`. `interpret` runs the kernel
    anywhere, slowly.
    """
    return _each_its_own(functools.partial(_splash, scale=scale, cap=cap, interpret=interpret))(
        query, key, value, segment
    )


def _splash(
    query: Array, key: Array, value: Array, segment: Array, *, scale: float, cap: float | None, interpret: bool
) -> Array:
    columns, shared = query.shape[1], query.shape[3]
    unit = LANES if columns <= BLOCK else 2 * LANES
    padded = unit * -(-columns // unit)
    block = math.gcd(padded, BLOCK) if padded > BLOCK else padded
    query, segment = _pad(query * scale, padded, 1), _pad(segment.astype(jnp.int32), padded, 1)
    key, value = _pad(key, padded, 2), _pad(value, padded, 2)
    names = "block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * shared),
        block_sizes=kernels.BlockSizes(**sizes),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    within = lambda query, key, value, segment: kernel(query, key, value, kernels.SegmentIds(segment, segment))
    every = jax.vmap(jax.vmap(within, (0, 0, 0, None)))  # rows, and groups of heads
    mixed = every(query.transpose(0, 2, 3, 1, 4), key, value, segment)
    return mixed.transpose(0, 3, 1, 2, 4)[:, :columns]
