"""A scalar read off each token: the reward model reads the last real token, the critic reads every one.

Both are the same module with the same parameters, so that a critic can start from a reward model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rlhf_jax.logprobs import last_index
from rlhf_jax.models.config import Config
from rlhf_jax.models.layers import EVERY, Columns
from rlhf_jax.models.transformer import Transformer, bind
from rlhf_jax.types import Params, ScoreFn, ValueFn


class ScalarModel(nn.Module):
    """Trunk and a linear map to one number a token, float32."""

    config: Config

    def setup(self) -> None:
        self.trunk = Transformer(dataclasses.replace(self.config, tie_embeddings=True))  # none of its own to carry
        # N(0, 1 / sqrt(d + 1)), as Ziegler et al. 2019 for the reward model.
        std = (self.config.d_model + 1) ** -0.5
        self.kernel = self.param("kernel", nn.initializers.normal(std), (self.config.d_model,))
        self.bias = self.param("bias", nn.initializers.zeros, ())

    def __call__(
        self, tokens: Array, segment: Array, keys: Array | None = None, columns: Columns = EVERY
    ) -> Float[Array, "B N"]:
        hidden, _ = self.trunk.hidden(tokens, segment, keys, columns=columns)
        return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), self.kernel) + self.bias

    def last(self, tokens: Array, mask: Bool[Array, "B T"], keys: Array | None = None) -> Float[Array, "B"]:
        """The scalar at each row's last real token; an empty row yields whatever column 0 holds."""
        column = jnp.maximum(last_index(mask), 0)
        return self(tokens, mask, keys, column[:, None])[:, 0]


def trunk(policy: Params) -> Params:
    """What a language model has in common with a scalar model."""
    return {name: value for name, value in policy.items() if name != "unembedding"}


def from_policy(policy: Params, config: Config, key: Array) -> Params:
    """Scalar-model parameters with the trunk of a language model and a fresh head."""
    std = (config.d_model + 1) ** -0.5
    kernel = std * jax.random.normal(key, (config.d_model,))
    return {"trunk": trunk(policy), "kernel": kernel, "bias": jnp.zeros(())}


def score_fn(config: Config) -> ScoreFn:
    """The network of `reward`: `ScalarModel.last`."""
    return bind(ScalarModel(config), ScalarModel.last)


def critic(config: Config) -> ValueFn:
    """A critic params["critic"] that is a network of its own."""
    per_token = bind(ScalarModel(config))
    return lambda params, tokens, mask, start: per_token(params["critic"], tokens, mask, columns=slice(start, -1))


def shared_critic(config: Config) -> ValueFn:
    """A critic that is a head, params["critic"], on the trunk of params["policy"]."""
    own = critic(config)

    def value(params: Params, tokens: Array, mask: Array, start: int) -> Float[Array, "B N"]:
        return own({"critic": params["critic"] | {"trunk": trunk(params["policy"])}}, tokens, mask, start)

    return value


def fresh(config: Config) -> Params:
    """The head of a `shared_critic`, which values everything at 0 (Ziegler et al. 2019)."""
    return {"kernel": jnp.zeros(config.d_model), "bias": jnp.zeros(())}
