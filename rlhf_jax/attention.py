"""Attention whose scores [B, H, T, T] exist a block at a time: the kernel for TPUs that ships with JAX.

It serves where queries and keys are of the same columns: training, scoring, and reading a prompt. At padding, whose
results nothing reads, it differs from `transformer.attend`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import parallel

LANES = 128  # a block of columns is a multiple of it
BLOCK = 512  # columns of the largest one


def worthwhile(columns: int) -> bool:
    """Whether the kernel is to be had, on what the step is traced for, and so many columns are worth a block of it."""
    return parallel.platform() == "tpu" and columns > LANES


def flash(
    query: Float[Array, "B T G R H"],
    key: Float[Array, "B G T H"],
    value: Float[Array, "B G T H"],
    segment: Int[Array, "B T"] | Bool[Array, "B T"],
    scale: float,
    cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T G R H"]:
    """Causal attention within documents, by splash attention (after arXiv:2205.14135).

    Scores are `scale` times the products of queries and keys, and then `cap tanh(s / cap)`. Over a mesh every device
    computes its own rows and heads. `interpret` runs the kernel anywhere, slowly.
    """
    local = functools.partial(_flash, scale=scale, cap=cap, interpret=interpret)
    if parallel.on_mesh():
        rows, groups = PartitionSpec(parallel.ROWS), PartitionSpec(parallel.ROWS, "tensor")
        heads = PartitionSpec(parallel.ROWS, None, "tensor")
        local = jax.shard_map(local, in_specs=(heads, groups, groups, rows), out_specs=heads, check_vma=False)
    return local(query, key, value, segment)


def _flash(
    query: Array, key: Array, value: Array, segment: Array, *, scale: float, cap: float | None, interpret: bool
) -> Array:
    columns, shared = query.shape[1], query.shape[3]
    unit = LANES if columns <= BLOCK else 2 * LANES
    padded = unit * -(-columns // unit)
    block = math.gcd(padded, BLOCK) if padded > BLOCK else padded
    pad = lambda x, axis: jnp.pad(x, [(0, padded - columns) if n == axis else (0, 0) for n in range(x.ndim)])
    query, segment = pad(query * scale, 1), pad(segment.astype(jnp.int32), 1)
    key, value = pad(key, 2), pad(value, 2)
    names = "block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv"
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * shared),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    within = lambda query, key, value, segment: kernel(query, key, value, splash.SegmentIds(segment, segment))
    every = jax.vmap(jax.vmap(within, (0, 0, 0, None)))  # rows, and groups of heads
    mixed = every(query.transpose(0, 2, 3, 1, 4), key, value, segment)
    return mixed.transpose(0, 3, 1, 2, 4)[:, :columns]
