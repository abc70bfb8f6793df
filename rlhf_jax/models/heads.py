"""Models that map each token to a scalar: a reward model is read at the last real token, a critic at every token.

Both are one module with the same parameters, so that a critic can start from a reward model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rlhf_jax.devices import shared
from rlhf_jax.logprobs import last_index
from rlhf_jax.models.config import Config
from rlhf_jax.models.layers import ALL, Columns
from rlhf_jax.models.transformer import Transformer, bind
from rlhf_jax.types import Params, ScoreFn, Tree, ValueFn


class ScalarModel(nn.Module):
    """A trunk and a linear map from its hidden states to one float32 number a token."""

    config: Config

    def setup(self) -> None:
        self.trunk = Transformer(dataclasses.replace(self.config, tie_embeddings=True))  # without an unembedding
        # The reward head of Ziegler et al. 2019: standard deviation 1 / sqrt(d + 1).
        std = (self.config.d_model + 1) ** -0.5
        self.kernel = self.param("kernel", nn.initializers.normal(std), (self.config.d_model,))
        self.bias = self.param("bias", nn.initializers.zeros, ())

    def __call__(
        self, tokens: Array, segment: Array | Tree, keys: Array | None = None, columns: Columns = ALL
    ) -> Float[Array, "B N"]:
        """The scalar at each of these columns."""
        hidden = self.trunk.hidden(tokens, segment, keys, columns)
        return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), self.kernel) + self.bias

    def last(
        self, tokens: Array, mask: Bool[Array, "B T"], keys: Array | None = None, *, start: int = 0, group: int = 1
    ) -> Float[Array, "B"]:
        """The scalar at each row's last real token; arbitrary for a row that is all padding.

        Each `group` rows have the same prompt through column `start`; it is computed once where that pays.
        """
        group = shared.rows(len(tokens), group)
        if not self.config.compute.shares(start + 1, tokens.shape[1] - 1 - start, group):
            column = jnp.maximum(last_index(mask), 0)
            return self(tokens, mask, keys, column[:, None])[:, 0]
        joined, tree = shared.fork(tokens, mask, start, group)
        first = start + (tokens.shape[1] - start) * jnp.arange(group)
        column = jnp.maximum(last_index(mask[:, start:]), 0).reshape(-1, group) + first[None]
        return self(joined, tree, None if keys is None else keys[::group], column).reshape(-1)


def trunk(policy: Params) -> Params:
    """The parameters of a language model that a scalar model has too; what balances routers is left to the policy."""
    return {name: value for name, value in policy.items() if name not in ("unembedding", "balance")}


def from_policy(policy: Params, config: Config, key: Array) -> Params:
    """Parameters of a scalar model with the trunk of a language model and a random head."""
    std = (config.d_model + 1) ** -0.5
    kernel = std * jax.random.normal(key, (config.d_model,))
    return {"trunk": trunk(policy), "kernel": kernel, "bias": jnp.zeros(())}


def score_fn(config: Config) -> ScoreFn:
    """`ScalarModel.last` as a function of parameters: the network of `reward`."""
    return bind(ScalarModel(config), ScalarModel.last)


def critic(config: Config) -> ValueFn:
    """A critic that is a network of its own, params["critic"]."""
    per_token = bind(ScalarModel(config))
    return lambda params, tokens, mask, start: per_token(params["critic"], tokens, mask, columns=slice(start, -1))


def shared_critic(config: Config) -> ValueFn:
    """A critic that is a head, params["critic"], on the trunk of params["policy"]."""
    whole = critic(config)

    def value(params: Params, tokens: Array, mask: Array, start: int) -> Float[Array, "B N"]:
        return whole({"critic": params["critic"] | {"trunk": trunk(params["policy"])}}, tokens, mask, start)

    return value


def fresh(config: Config) -> Params:
    """The head with which a `shared_critic` begins: it values everything at 0 (Ziegler et al. 2019)."""
    return {"kernel": jnp.zeros(config.d_model), "bias": jnp.zeros(())}
