"""The decoder-only Transformer. GPT-2, Llama, Mistral, Qwen and Gemma 2 are settings of one block.

The layers are one scanned block whose parameters are stacked on a leading axis [L]. Query heads lie beside the key and
value head that they share: one fused projection yields [G groups, R query heads + key + value, head_dim].
Padding may be anywhere in a row: a token attends to the earlier real tokens of its own document, and its position is
how many of them there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import entropy, map_columns, token_logprobs
from rlhf_jax.models.attention import Attention, kernel
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.config import Config
from rlhf_jax.models.layers import EVERY, MLP, Columns, Norm, View, capped, causal, dropout, pick, positions
from rlhf_jax.models.rope import turns
from rlhf_jax.types import InputError, LogprobsFn, Params


class Block(nn.Module):
    """Pre-norm attention and MLP, the body of the scan over layers. Of what it yields, `columns` alone are computed."""

    config: Config

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Cache | None], layer: int | Array, view: View, columns: Columns = EVERY
    ) -> tuple[tuple, None]:
        c = self.config
        x, cache = carry
        mixed, cache = Attention(c, name="attention")(Norm(c, name="norm_1")(x), layer, view, cache, columns)
        if c.post_norm:
            mixed = Norm(c, name="post_norm_1")(mixed)
        x = pick(x, columns) + dropout(mixed, view.keys, 2 * layer + 1, c.dropout)
        added = MLP(c, name="mlp")(Norm(c, name="norm_2")(x))
        if c.post_norm:
            added = Norm(c, name="post_norm_2")(added)
        x = x + dropout(added, view.keys, 2 * layer + 2, c.dropout)
        # What the backward pass keeps of a layer, if anything.
        return (parallel.constrain(x, parallel.ROWS, "tensor"), cache), None


SAVED = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Transformer(nn.Module):
    """The trunk and its unembedding. `__call__` maps tokens to logits; `hidden` stops before the unembedding."""

    config: Config

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model))
        if c.position == "learned":
            self.position_table = self.param("positions", init, (c.max_length, c.d_model))
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
        tokens: Array,
        segment: Array,
        keys: Array | None = None,
        cache: Cache | None = None,
        layers: Sequence[Params] | None = None,
        columns: Columns = EVERY,
    ) -> tuple[Array, Cache | None]:
        """Final hidden states [B, N, D] of these of the columns, and the cache with all T of them appended.

        `segment` is a bool mask or document ids [B, T]. `keys` [B] turn residual dropout on. With a cache, T columns
        are appended at `cache.column`: either the whole prompt into an empty cache, or one column. `layers` are the
        parameters of the blocks one by one (`layers_of`), which then run one by one, on a cache that is `apart`.
        """
        if self.config.position == "learned" and tokens.shape[1] > self.config.max_length:
            raise InputError(f"{tokens.shape[1]} columns exceed the model's context of {self.config.max_length}")
        if cache is None and unrolled(self.config) and not self.is_initializing():
            layers = layers_of(self.variables["params"], self.config)
        position, attend = positions(segment), causal(segment)
        key_position = position
        if cache is not None:
            start = (0, cache.column)
            cache = cache.replace(mask=jax.lax.dynamic_update_slice(cache.mask, segment.astype(bool), start))
            if tokens.shape[1] == 1:
                position = jnp.sum(cache.mask, axis=1, dtype=jnp.int32, keepdims=True) - 1
                attend = cache.mask[:, None, :]
        near = None
        if self.config.window is not None:
            if cache is not None and tokens.shape[1] == 1:
                key_position = jnp.cumsum(cache.mask, axis=1) - 1
            near = attend & (position[:, :, None] - key_position[:, None, :] < self.config.window)
        x = self.embedding[tokens]
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.d_model**0.5, self.config.compute.dtype)
        if self.config.position == "learned":
            x = x + self.position_table[position]
        x = dropout(x.astype(self.config.compute.dtype), keys, 0, self.config.dropout)
        x = parallel.constrain(x, parallel.ROWS, "tensor")
        table = turns(tokens.shape[1], self.config) if cache is None else cache.turns
        turn = jax.tree.map(lambda part: jnp.take(part, position, axis=0, mode="clip"), table)  # padding's may be any
        view = View(turn=turn, attend=attend, near=near, segment=segment, keys=keys)
        if layers is None:
            (x, cache), _ = self.blocks((x, cache), jnp.arange(self.config.n_layers), view)
        else:
            # Of the last layer only what is asked for, unless that takes dropout of all, or is no faster.
            whole = (keys is not None and self.config.dropout > 0) or kernel(self.config, *(tokens.shape[1],) * 2)
            asked, columns = (EVERY, columns) if whole else (columns, EVERY)
            for layer, params in enumerate(layers):
                last = layer == self.config.n_layers - 1
                x, cache = self._block(params, x, cache, layer, view, asked if last else EVERY)
        if cache is not None:
            cache = cache.replace(column=cache.column + tokens.shape[1])
        return self.final_norm(pick(x, columns)), cache

    def _block(
        self, params: Params, x: Array, cache: Cache | None, layer: int, view: View, columns: Columns
    ) -> tuple[Array, Cache | None]:
        """One layer by itself."""

        def run(params: Params, x: Array) -> tuple[Array, Cache | None]:
            return Block(self.config, parent=None).apply({"params": params}, (x, cache), layer, view, columns)[0]

        if self.config.compute.remat != "none":
            run = jax.checkpoint(run, policy=SAVED[self.config.compute.remat])
        return run(params, x)

    def unembed(self, hidden: Float[Array, "B T D"], over: str | None = None) -> Float[Array, "B T V"]:
        """Logits of the next token, float32; the vocabulary is spread `over` an axis of the mesh, or whole."""
        table = self.embedding if self.config.tie_embeddings else self.unembedding
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(flat, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        logits = capped(logits, self.config.logit_cap).reshape(*hidden.shape[:2], -1)
        return parallel.constrain(logits, parallel.ROWS, None, over)

    def logprobs(
        self,
        tokens: Int[Array, "B T"],
        segment: Array,
        keys: Array | None = None,
        *,
        start: int = 0,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
        """Log-probability of each token after column `start`, N = T - 1 - start, and the entropy that it came out of.

        Of `softmax(logits / temperature)`. Logits exist for these columns alone, `compute.chunk` of them at a time.
        """
        hidden, _ = self.hidden(tokens, segment, keys, columns=slice(start, -1))

        def read(hidden: Array, targets: Array) -> tuple[Array, Array | None]:
            logits = self.unembed(hidden, over="tensor")
            logp = token_logprobs(logits, targets, temperature)
            return logp, entropy(logits, temperature) if with_entropy else None

        return map_columns(read, self.config.compute.chunk, hidden, tokens[:, start + 1 :])

    def __call__(self, tokens: Array, segment: Array, keys: Array | None = None) -> Float[Array, "B T V"]:
        """Logits at each column, which predict the token at the next."""
        return self.unembed(self.hidden(tokens, segment, keys)[0])


def bind(module: Any, method: Callable | None = None) -> Callable:
    """`module.apply` on bare parameters: `(params, *args) -> method(*args)`; no method is the module's `__call__`.

    A float32 trunk is float32 on every device: some compute such matrix products in bfloat16 unless told otherwise.
    """
    precision = "highest" if module.config.compute.dtype == "float32" else None

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return module.apply({"params": params}, *args, method=method, **kwargs)

    return apply


def logprobs_fn(config: Config) -> LogprobsFn:
    """The network of `sft`, `dpo` and, as a `part` of what they train, of PPO and its kin: `Transformer.logprobs`."""
    return bind(Transformer(config), Transformer.logprobs)


def part(name: str, network: Callable) -> Callable:
    """`network` as a function of a dict of parameters, of which it takes those under this name."""
    return lambda params, *args, **kwargs: network(params[name], *args, **kwargs)


def layers_of(params: Params, config: Config) -> list[Params]:
    """The parameters of each block, cut out of the stack."""
    leaves, tree = jax.tree.flatten(params["blocks"])
    cut = [jax.lax.split(x, (1,) * config.n_layers) for x in leaves]
    return [jax.tree.unflatten(tree, [jnp.squeeze(x[layer], 0) for x in cut]) for layer in range(config.n_layers)]


def unrolled(config: Config) -> bool:
    """Whether the layers are written out, in what is being traced."""
    compute = config.compute
    if compute.unroll is None:
        return config.n_layers <= 12 and compute.remat == "none" and parallel.platform() == "cpu"
    return compute.unroll


def parameter_shapes(config: Config) -> Params:
    """The tree of parameters as `jax.ShapeDtypeStruct`s, without computing any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda t: Transformer(config).init(jax.random.key(0), t, t)["params"], tokens)


def parameter_count(config: Config) -> int:
    """Number of parameters, from shapes alone."""
    return sum(x.size for x in jax.tree.leaves(parameter_shapes(config)))
