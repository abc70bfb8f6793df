"""The decoder-only Transformer. Every family of `families` is settings of one block.

The parameters of the layers are stacked on a leading axis [L], for one scan over them; where the layers are unrolled,
each takes its slice. Query heads lie beside the key and value head that they share: one fused projection yields
[G groups, R query heads + key + value, head_dim].

Padding may be anywhere in a row: a token attends to the earlier real tokens of its own document, in a `types.Tree` to
its ancestors alone, and its position is the number of those. `Transformer.hidden` computes whole rows, for training and
scoring; for generation, `prefill` reads a prompt into a cache and `decode` appends a token to it; `append` appends any
number of tokens to a cache by row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.devices import parallel, shared
from rlhf_jax.logprobs import entropy, map_columns, precise, token_logprobs
from rlhf_jax.models import attention
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.config import Compute, Config
from rlhf_jax.models.experts import Mixture
from rlhf_jax.models.layers import (
    ALL,
    MLP,
    Columns,
    Norm,
    View,
    appended_view,
    continued_view,
    depth,
    dropout,
    real_tokens,
    soft_cap,
    take_columns,
    token_view,
    whole_view,
)
from rlhf_jax.models.rope import rotary_table
from rlhf_jax.types import InputError, LogitsFn, LogprobsFn, Params, Tree

LAST = slice(-1, None)  # the last column of each row


class Block(nn.Module):
    """Attention and MLP: one layer, which yields the residual stream at `columns` and the cache."""

    config: Config

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], layer: int | Array, view: View, columns: Columns = ALL
    ) -> tuple[tuple, None]:
        c = self.config
        x, cache = carry
        normed = Norm(c, name="norm_1")(x) if c.pre_norm else x
        mixed, cache = attention.Attention(c, name="attention")(normed, layer, view, cache, columns)
        if c.post_norm:
            mixed = Norm(c, name="post_norm_1")(mixed)
        before = take_columns(x, columns)
        x = before + dropout(mixed, view.keys, 2 * layer + 1, c.dropout)
        read = before if c.parallel_residual else x
        read = Norm(c, name="norm_2")(read) if c.pre_norm else read
        if c.experts is None:
            added = MLP(c, name="mlp")(read)
        else:
            mask = take_columns(real_tokens(view.segment), columns)
            fork = view.segment.fork if isinstance(view.segment, Tree) else None
            added = Mixture(c, name="mlp")(read, mask, view.balance, fork)
        if c.post_norm:
            added = Norm(c, name="post_norm_2")(added)
        x = x + dropout(added, view.keys, 2 * layer + 2, c.dropout)
        # On a mesh the backward pass stores x, its input to the next layer, sharded over tensor too.
        return (parallel.constrain(x, parallel.ROWS, "tensor"), cache), None


SAVED = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Transformer(nn.Module):
    """The trunk and its unembedding; `__call__` maps tokens to logits."""

    config: Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model))
        if c.position == "learned":
            self.position_table = self.param("positions", init, (c.position_offset + c.max_length, c.d_model))
        if not c.tie_embeddings:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.d_model))
        block = Block
        if c.compute.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=SAVED[c.compute.remat])
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
        )(c)
        self.final_norm = Norm(c)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment: Int[Array, "B T"] | Bool[Array, "B T"] | Tree,
        keys: Array | None = None,
        columns: Columns = ALL,
    ) -> Float[Array, "B N D"]:
        """Final hidden states at these columns; `keys` [B] turn residual dropout on."""
        view = whole_view(self.config, segment, rotary_table(depth(tokens.shape[1], segment), self.config), keys)
        if self.config.experts is not None and self.has_variable("params", "balance"):
            view = view.replace(balance=self.variables["params"]["balance"] / self.config.n_layers)
        x = self._embed(tokens, view)
        if not self.is_initializing() and unrolled(self.config, self.variables["params"]):
            layers = layers_of(self.variables["params"], self.config)
            x, _ = self._unrolled(layers, x, None, view, columns)
        else:
            x, _ = self._scanned(x, None, view, columns)
        return self.final_norm(x)

    def prefill(
        self,
        tokens: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
        cache: Cache,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the token after the prompt, whose last column is real, and the empty cache with the prompt in it.

        `layers` are the parameters of each block (`layers_of`), to run them unrolled, with an unstacked cache.
        """
        cache = cache.extend_mask(mask)
        return self._next_logits(tokens, whole_view(self.config, mask, cache.rotary_table), cache, layers)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        cache: Cache,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits and cache as of `prefill`, for tokens that follow those in the cache, where each row has some."""
        cache = cache.extend_mask(mask)
        view = continued_view(self.config, cache.mask, cache.column, tokens.shape[1], cache.rotary_table)
        return self._next_logits(tokens, view, cache, layers)

    def decode(
        self, token: Int[Array, "B"], cache: Cache, layers: Sequence[Params] | None = None
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the token after this one, and the cache with this one in it; `layers` as in `prefill`."""
        tokens = token[:, None]
        cache = cache.extend_mask(jnp.ones_like(tokens, bool))
        view = token_view(self.config, cache.seen, *cache.positions(), cache.rotary_table)
        return self._next_logits(tokens, view, cache, layers)

    def append(
        self, tokens: Int[Array, "B T"], count: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after the first `count` of each row's tokens, at least one, and the cache `by_row` with these in it.

        What follows them is padding: it lies behind the row's next column to fill, where nothing reads it.
        """
        # Columns as many as the cache has can only be its first ones: then they attend to themselves, as in `prefill`.
        view = appended_view(self.config, cache.column, tokens.shape[1], cache.key.shape[3], cache.rotary_table)
        logits, read = self._next_logits(tokens, view, cache, None, count[:, None] - 1)
        return logits, read.replace(column=cache.column + count)

    def append_hidden(self, tokens: Int[Array, "B T"], count: Int[Array, "B"], cache: Cache) -> tuple[Array, Cache]:
        """Final hidden states [B, T, D] of all columns, for `unembed`, and the cache as `append` gives it."""
        view = appended_view(self.config, cache.column, tokens.shape[1], cache.key.shape[3], cache.rotary_table)
        x, read = self._scanned(self._embed(tokens, view), cache, view, ALL)
        return self.final_norm(x), read.replace(column=cache.column + count)

    def _next_logits(
        self,
        tokens: Int[Array, "B T"],
        view: View,
        cache: Cache,
        layers: Sequence[Params] | None,
        columns: Columns = LAST,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one column of each row, and the cache with all of them; its mask has them already."""
        x = self._embed(tokens, view)
        if layers is None:
            x, cache = self._scanned(x, cache, view, columns)
        else:
            x, cache = self._unrolled(layers, x, cache, view, columns)
        return self.unembed(self.final_norm(x))[:, 0], cache.advance(tokens.shape[1])

    def _embed(self, tokens: Int[Array, "B T"], view: View) -> Float[Array, "B T D"]:
        """The input of the first block."""
        c = self.config
        x = self.embedding[tokens]
        if c.scale_embedding:
            x = x * jnp.asarray(c.d_model**0.5, c.compute.dtype)
        if c.position == "learned":
            if tokens.shape[1] > c.max_length and not isinstance(view.segment, Tree):  # which is wider than it is deep
                raise InputError(f"{tokens.shape[1]} columns exceed the model's context of {c.max_length}")
            row = view.position + c.position_offset if c.position_offset else view.position
            x = x + self.position_table[row]
        x = dropout(x.astype(c.compute.dtype), view.keys, 0, c.dropout)
        return parallel.constrain(x, parallel.ROWS, "tensor")

    def _scanned(self, x: Array, cache: Any, view: View, columns: Columns) -> tuple[Array, Any]:
        """All blocks, as one loop over the stack of their parameters: the output at these columns, and the cache."""
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.config.n_layers), view)
        return take_columns(x, columns), cache

    def _unrolled(
        self, layers: Sequence[Params], x: Array, cache: Any, view: View, columns: Columns
    ) -> tuple[Array, Any]:
        """All blocks, one by one: the output at these columns, and the cache.

        The last one computes these columns alone, unless that is no faster, as with a kernel, or takes dropout of all,
        or a router to balance.
        """
        c, length = self.config, x.shape[1]
        plain = isinstance(view.segment, Tree) and view.segment.fork is None
        whole = (
            (view.keys is not None and c.dropout > 0)
            or view.balance is not None
            or attention.kernel(c, length, length, plain)
        )
        of_last, afterwards = (ALL, columns) if whole else (columns, ALL)
        for layer, params in enumerate(layers):
            x, cache = self._block(params, x, cache, layer, view, of_last if layer == c.n_layers - 1 else ALL)
        return take_columns(x, afterwards), cache

    def _block(
        self, params: Params, x: Array, cache: Any, layer: int, view: View, columns: Columns
    ) -> tuple[Array, Any]:
        """The block with these parameters."""

        def run(params: Params, x: Array) -> tuple[Array, Any]:
            return Block(self.config, parent=None).apply({"params": params}, (x, cache), layer, view, columns)[0]

        if self.config.compute.remat != "none":
            run = jax.checkpoint(run, policy=SAVED[self.config.compute.remat])
        return run(params, x)

    def unembed(self, hidden: Float[Array, "B T D"], vocab_axis: str | None = None) -> Float[Array, "B T V"]:
        """Logits of the next token, float32; on a mesh the vocabulary is sharded over `vocab_axis`, or replicated."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        logits = soft_cap(logits, self.config.logit_cap).reshape(*hidden.shape[:2], -1)
        return parallel.constrain(logits, parallel.ROWS, None, vocab_axis)

    def logprobs(
        self,
        tokens: Int[Array, "B T"],
        segment: Array | Tree,
        keys: Array | None = None,
        *,
        start: int = 0,
        temperature: float = 1.0,
        with_entropy: bool = False,
        group: int = 1,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
        """Log-probability of each token after column `start`, N = T - 1 - start, and the entropy of its distribution.

        The distribution is `softmax(logits / temperature)`. Logits exist for these columns alone, `compute.chunk`
        columns at a time. Of each `group` rows, whose `segment` is a mask, the prompt is computed once where that pays.
        """
        group = shared.rows(len(tokens), group)
        shares = self.config.compute.shares(start + 1, tokens.shape[1] - 1 - start, group)
        if shares and not isinstance(segment, Tree):
            joined, tree = shared.fork(tokens[:, :-1], segment[:, :-1], start, group)
            hidden = self.hidden(joined, tree, None if keys is None else keys[::group], slice(start, None))
            hidden = hidden.reshape(len(tokens), -1, hidden.shape[-1])
        else:
            hidden = self.hidden(tokens, segment, keys, slice(start, -1))

        def read(hidden: Array, targets: Array) -> tuple[Array, Array | None]:
            logits = self.unembed(hidden, vocab_axis="tensor")
            logp = token_logprobs(logits, targets, temperature)
            return logp, entropy(logits, temperature) if with_entropy else None

        return map_columns(read, self.config.compute.chunk, hidden, tokens[:, start + 1 :])

    def logits(self, tokens: Int[Array, "B T"], segment: Array | Tree, *, start: int = 0) -> Float[Array, "B N V"]:
        """Logits of each token after column `start`, N = T - 1 - start."""
        return self.unembed(self.hidden(tokens, segment, None, slice(start, -1)), vocab_axis="tensor")

    def logprobs_at(
        self,
        tokens: Int[Array, "B T"],
        segment: Array | Tree,
        columns: Int[Array, "B N"],
        targets: Int[Array, "B N K"],
    ) -> tuple[Float[Array, "B N K"], Bool[Array, "B N K"]]:
        """The log-probability of each of K tokens to follow each of these columns, and whether it is the likeliest.

        Logits exist for these columns alone, `compute.chunk` of them at a time.
        """
        hidden = self.hidden(tokens, segment, columns=columns)

        def read(hidden: Array, targets: Array) -> tuple[Array, Array]:
            logits = self.unembed(hidden, vocab_axis="tensor")
            logp = jnp.take_along_axis(logits, targets, axis=2) - jax.nn.logsumexp(logits, axis=2, keepdims=True)
            return logp, targets == jnp.argmax(logits, axis=2, keepdims=True)

        return map_columns(read, self.config.compute.chunk, hidden, targets)

    def distributions(
        self, tokens: Int[Array, "B T"], segment: Array | Tree, *, start: int, temperature: float, best: int
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Int[Array, "B N K"], Float[Array, "B N K"]]:
        """The results of `logprobs` with entropies, and the `best` likeliest tokens of each distribution."""
        hidden = self.hidden(tokens, segment, None, slice(start, -1))

        def read(hidden: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
            logits = self.unembed(hidden, vocab_axis="tensor")
            highest, ids = jax.lax.top_k(jax.nn.log_softmax(precise(logits) / temperature), best)
            return token_logprobs(logits, targets, temperature), entropy(logits, temperature), ids, highest

        return map_columns(read, self.config.compute.chunk, hidden, tokens[:, start + 1 :])

    def __call__(self, tokens: Array, segment: Array | Tree, keys: Array | None = None) -> Float[Array, "B T V"]:
        """Logits at each column, which predict the token at the next."""
        return self.unembed(self.hidden(tokens, segment, keys))


def bind(module: Any, method: Callable | None = None) -> Callable:
    """`module.apply` on bare parameters: `(params, *args) -> method(*args)`; no method is the module's `__call__`.

    A float32 trunk multiplies in float32 on every device: some would use bfloat16 unless told otherwise.
    """
    precision = "highest" if module.config.compute.dtype == "float32" else None

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *args, method=method, **kwargs)

    return apply


def logprobs_fn(config: Config) -> LogprobsFn:
    """`Transformer.logprobs` as a function of parameters: the network of `sft`, `dpo` and, as a `part`, of PPO."""
    return bind(Transformer(config), Transformer.logprobs)


def logits_fn(config: Config) -> LogitsFn:
    """`Transformer.logits` as a function of parameters: the networks of `distillation`."""
    return bind(Transformer(config), Transformer.logits)


def part(name: str, network: Callable) -> Callable:
    """`network` as a function of a dict of parameters, of which it takes those under this name."""
    return lambda params, *args, **kwargs: network(params[name], *args, **kwargs)


def layers_of(params: Params, config: Config) -> list[Params]:
    """The parameters of each block, sliced out of the stack."""
    leaves, tree = jax.tree.flatten(params["blocks"])
    slices = [jax.lax.split(x, (1,) * config.n_layers) for x in leaves]
    return [jax.tree.unflatten(tree, [jnp.squeeze(x[layer], 0) for x in slices]) for layer in range(config.n_layers)]


def unrolled(config: Config, params: Params) -> bool:
    """Whether training and scoring unroll the layers, on the platform that is traced for.

    `compute.unroll` says so. None: unroll on CPU for up to 12 layers if remat is none (XLA for CPU honours remat only
    inside a loop), and there are no adapters. Slices of a stack are copies on CPU, and the backward pass needs those of
    all frozen kernels, a second copy of the layers; a loop holds that of one layer at a time.
    """
    compute = config.compute
    if compute.unroll is None:
        adapted = any(path[-1] == "kernel_a" for path in flatten_dict(params["blocks"]))
        few = config.n_layers <= 12 and compute.remat == "none"
        return few and not adapted and parallel.platform() == "cpu"
    return compute.unroll


def parameter_shapes(config: Config) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s, without computing any."""
    shapes = _parameter_shapes(dataclasses.replace(config, dropout=0.0, compute=Compute()))
    return jax.tree.map(lambda x: x, shapes)  # a tree of the caller's own


@functools.lru_cache(maxsize=64)  # tracing the network takes as long as loading a small one
def _parameter_shapes(config: Config) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: Transformer(config).init(jax.random.key(0), t, t)["params"], tokens)


def parameter_count(config: Config) -> int:
    """Number of parameters, from shapes alone."""
    return sum(x.size for x in jax.tree.leaves(parameter_shapes(config)))
