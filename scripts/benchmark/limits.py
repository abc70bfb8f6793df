"""The least time that a model's matrix products and reads take on this machine, at rates that are measured here."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import models
from rlhf_jax.analysis import flops


def clock(amount: float, run: Callable[[], Any]) -> tuple[float, float]:
    """`amount`, and the seconds until all that `run` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return amount, time.perf_counter() - start


def fastest(run: Callable[[], Any], repeats: int = 5, least: float = 0.05) -> float:
    """The seconds of the fastest of some runs, which together take at least `least` seconds."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats or math.fsum(times) < least:
        times.append(clock(1, run)[1])
    return min(times)


class Limits:
    """The least seconds for parts of the work with one model."""

    def __init__(self, config: models.Config) -> None:
        self.config, c = config, config
        width, ff = c.n_heads * c.head_dim, 2 * c.d_ff if c.gated else c.d_ff
        # The shapes [k, n] of a layer's matrices, and of the unembedding.
        self.layer = [
            (c.d_model, width + 2 * c.n_kv_heads * c.head_dim),
            (width, c.d_model),
            (c.d_model, ff),
            (c.d_ff, c.d_model),
        ]
        self.unembedding = c.d_model, c.vocab_size
        self.dtype = jnp.dtype(c.compute.dtype)

    @functools.cache  # noqa: B019
    def product(self, m: int, k: int, n: int) -> float:
        """The seconds of [m, k] @ [k, n], as a mean of it and the two products of its gradient."""
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (m, k), self.dtype)
        w = jax.random.normal(keys[1], (k, n), self.dtype)
        chain = 3

        @jax.jit
        def products(x: jax.Array, w: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None):
                for _ in range(chain):
                    y = x @ w
                    x = y @ (x.T @ y).T
                return x

        return fastest(lambda: products(x, w)) / (3 * chain)

    @functools.cache  # noqa: B019
    def bandwidth(self, size: int) -> float:
        """The bytes a second that are read or written where `size` bytes are copied within the device."""
        x = jnp.zeros(max(size, 2**20) // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1.0)
        return 2 * x.nbytes / fastest(lambda: add(x))

    def forward(self, rows: int, columns: float, read: float, logits: bool = True) -> float:
        """The seconds of one forward pass, as `flops.forward` counts it, at the rates of the layers' products."""
        m = max(1, round(rows * columns))
        seconds = sum(self.product(m, k, n) for k, n in self.layer) / sum(2 * m * k * n for k, n in self.layer)
        seconds *= flops.forward(self.config, rows, columns, read, logits=False)
        return seconds + (self.product(max(1, round(rows * read)), *self.unembedding) if logits else 0.0)

    def training(self, rows: int, columns: float, read: int, logits: bool = True) -> float:
        """The seconds of one forward and backward pass."""
        return 3 * self.forward(rows, columns, read, logits)

    def decoding(self, rows: int, prompt: int, tokens: float, prompts: int | None = None) -> float:
        """The seconds of a prefill and `tokens` new tokens, sampled for all rows at once.

        The rows have so many different `prompts`: each its own, by default.
        """
        c, prompts = self.config, prompts or rows
        matrices = [*(c.n_layers * self.layer), self.unembedding]
        kept = 2 * c.n_layers * c.n_kv_heads * c.head_dim * self.dtype.itemsize  # bytes of a token in the cache
        cache = kept * (prompts * prompt + tokens / 2)  # bytes, on average over the steps
        weights = self.dtype.itemsize * sum(k * n for k, n in matrices)
        speed = self.bandwidth(round(weights + cache))
        reads = [self.dtype.itemsize * k * n / speed for k, n in matrices]
        step = sum(max(self.product(rows, k, n), read) for (k, n), read in zip(matrices, reads, strict=True))
        return self.forward(prompts, prompt, 1) + (step + cache / speed) * tokens / rows
