"""A mixture of experts in place of an MLP (arXiv:1701.06538): a router sends each token to a few of many experts.

No token is dropped, whatever the router does, and all shapes are static. On a TPU the pairs of a token and an expert
are sorted by expert and multiplied group by group (`ragged_dot`), so that only these are computed. Elsewhere XLA has no
such product, and every expert computes every token; what was not asked for gets the weight 0. On a mesh each device of
the axis "tensor" holds some of the experts, and computes these for the tokens of its rows; the results are summed.

A router left to itself comes to send all tokens to the same few experts, so training adds a `balance_loss`, see
`algorithms.balance`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.devices import parallel
from rlhf_jax.models.config import Config
from rlhf_jax.models.layers import Linear, activation, recompute
from rlhf_jax.types import Fork, Params


def balance_weight(weight: float, *configs: Config | None) -> float:
    """The weight of the load-balancing loss in training these networks: 0 where none of them has experts."""
    return weight if any(config is not None and config.experts is not None for config in configs) else 0.0


def route(
    probability: Float[Array, "*tokens E"], active: int, normalized: bool
) -> tuple[Float[Array, "*tokens A"], Int[Array, "*tokens A"]]:
    """The likeliest experts of each token, and the weight of each: its probability, or its share in theirs."""
    weight, chosen = jax.lax.top_k(probability, active)
    return (weight / jnp.sum(weight, axis=-1, keepdims=True) if normalized else weight), chosen


def balance_loss(
    probability: Float[Array, "B T E"], chosen: Int[Array, "B T A"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The load-balancing loss of one router, mean over rows; 1 where the experts of a row are equally loaded.

        E sum_e f_e P_e

    f_e is the share of a row's choices that fell on expert e, and P_e the mean of its probability over the row's tokens
    (arXiv:2101.03961, eq. 4-6, on each row by itself: arXiv:2412.19437, eq. 17-20). So it is a mean over rows, which is
    the same however these are spread over devices and micro-batches. Only P has a gradient. A row of padding adds 0.
    """
    experts, active = probability.shape[-1], chosen.shape[-1]
    count = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]
    took = jnp.sum(jax.nn.one_hot(chosen, experts), axis=2)  # [B T E]
    mean = lambda x: jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1) / count
    return jnp.mean(experts * jnp.sum(mean(took) / active * mean(probability), axis=-1))


def apart(x: Shaped[Array, "A S ..."], fork: Fork) -> Shaped[Array, "B T ..."]:
    """A row for each branch of a fork, with the prefix before it."""
    branches = (len(x), fork.branches)
    prefix = jnp.broadcast_to(x[:, None, : fork.prefix], (*branches, fork.prefix, *x.shape[2:]))
    behind = x[:, fork.prefix :].reshape(*branches, -1, *x.shape[2:])
    return jnp.concatenate([prefix, behind], axis=2).reshape(math.prod(branches), -1, *x.shape[2:])


@jax.custom_vjp
def with_loss(x: Array, loss: Float[Array, ""]) -> Array:
    """`x`, whose gradient is that of the scalar too: as if `loss` were added to whatever is differentiated."""
    return x


with_loss.defvjp(lambda x, loss: (x, loss), lambda loss, gradient: (gradient, jnp.ones_like(loss)))


@jax.custom_vjp
def permute(x: Shaped[Array, "M ..."], order: Int[Array, "M"], inverse: Int[Array, "M"]) -> Shaped[Array, "M ..."]:
    """The rows of `x` in another order. Its gradient is gathered by `inverse`: scatters are slow on TPUs."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, gradient: (gradient[inverse], None, None))


def compute_sorted(
    x: Float[Array, "N D"],
    weight: Float[Array, "N A"],
    chosen: Int[Array, "N A"],
    up: Params,
    down: Params,
    activate: Callable[[Array], Array],
) -> Float[Array, "N D"]:
    """The weighted sum of what its chosen experts make of each token, which only they compute.

    Experts are numbered from 0 to E - 1 in the kernels; a choice of E is that of none.
    """
    tokens, active = chosen.shape
    experts = up["kernel"].shape[0]
    pair = chosen.reshape(-1)
    order = jnp.argsort(pair, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(pair[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    # Rows behind the last group are those of no expert. They hold anything, which must not reach what is summed.
    used = (jnp.arange(tokens * active) < jnp.sum(sizes))[:, None]

    def product(x: Array, bank: Params) -> Array:
        multiply = lambda x, kernel: jax.lax.ragged_dot(x, kernel.reshape(*kernel.shape[:2], -1), sizes)
        y = multiply(x, bank["kernel"])
        if "kernel_a" in bank:
            y = y + multiply(multiply(x, bank["kernel_a"]), bank["kernel_b"])
        return y.reshape(-1, *bank["kernel"].shape[2:])

    rows = jnp.where(used, permute(jnp.repeat(x, active, axis=0), order, inverse), 0)
    made = jnp.where(used, product(activate(product(rows, up)), down), 0)
    return jnp.einsum("na,nad->nd", weight.astype(x.dtype), permute(made, inverse, order).reshape(tokens, active, -1))


def compute_all(
    x: Float[Array, "N D"],
    weight: Float[Array, "N A"],
    chosen: Int[Array, "N A"],
    up: Params,
    down: Params,
    activate: Callable[[Array], Array],
) -> Float[Array, "N D"]:
    """The same as `compute_sorted`, for which every expert computes every token."""
    experts = up["kernel"].shape[0]

    def product(x: Array, bank: Params) -> Array:
        multiply = lambda x, kernel: x @ kernel.reshape(*kernel.shape[:2], -1)
        y = multiply(x, bank["kernel"])
        if "kernel_a" in bank:
            y = y + multiply(multiply(x, bank["kernel_a"]), bank["kernel_b"])
        return y.reshape(*y.shape[:2], *bank["kernel"].shape[2:])

    made = product(activate(product(x[None], up)), down)  # [E N D]
    share = jnp.sum(jax.nn.one_hot(chosen, experts) * weight[..., None], axis=1)  # [N E]
    return jnp.einsum("ne,end->nd", share.astype(x.dtype), made)


class Bank(nn.Module):
    """One kernel an expert, in a dict with LoRA's factors beside it where there are any."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self) -> Params:
        self.param("kernel", nn.initializers.normal(self.std), self.shape)
        return dict(self.variables["params"])


class Experts(nn.Module):
    """The weighted sum of what the chosen experts make of each token; 0 at padding."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        weight: Float[Array, "B T A"],
        chosen: Int[Array, "B T A"],
        mask: Bool[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        c = self.config
        assert c.experts is not None
        count, hidden = c.experts.count, (2, c.d_ff) if c.gated else (c.d_ff,)
        up = Bank((count, c.d_model, *hidden), 0.02, name="up")()
        down = Bank((count, c.d_ff, c.d_model), 0.02 / (2 * c.n_layers) ** 0.5, name="down")()
        up, down = jax.tree.map(lambda kernel: kernel.astype(x.dtype), (up, down))
        chosen = jnp.where(mask[..., None], chosen, count)  # padding goes to none
        return _per_device(functools.partial(_compute, activate=recompute(activation(c))), count)(
            x, weight, chosen, up, down
        )


def _compute(
    x: Float[Array, "B T D"], weight: Array, chosen: Array, up: Params, down: Params, *, activate: Callable
) -> Float[Array, "B T D"]:
    compute = compute_sorted if parallel.platform() == "tpu" else compute_all
    flat = lambda part: part.reshape(-1, part.shape[-1])
    return compute(flat(x), flat(weight), flat(chosen), up, down, activate).reshape(x.shape)


def _per_device(compute: Callable[..., Array], count: int) -> Callable[..., Array]:
    """`compute`, on a mesh by each device for its own rows and experts: all of `count` where these do not divide."""
    if not parallel.has_mesh():
        return compute

    def shared(x: Array, weight: Array, chosen: Array, up: Params, down: Params) -> Array:
        own = up["kernel"].shape[0]
        if own == count:
            return compute(x, weight, chosen, up, down)
        chosen = chosen - own * jax.lax.axis_index("tensor")
        chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
        return jax.lax.psum(compute(x, weight, chosen, up, down), "tensor")

    def call(x: Array, weight: Array, chosen: Array, up: Params, down: Params) -> Array:
        rows, experts = parallel.partition(x, parallel.ROWS), parallel.partition(up["kernel"], "tensor")
        specs = rows, rows, rows, experts, experts
        return jax.shard_map(shared, in_specs=specs, out_specs=rows, check_vma=False)(x, weight, chosen, up, down)

    return call


class Mixture(nn.Module):
    """The router and the experts: what a block has in place of an MLP.

    `balance` is None, or the weight that the router's `balance_loss` gets, and 0, see `algorithms.balance`. Branches of
    a `fork` are balanced as rows of their own, since it depends on the devices how many share a row.
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        balance: Float[Array, "2"] | None,
        fork: Fork | None,
    ) -> Float[Array, "B T D"]:
        c = self.config
        assert c.experts is not None
        with jax.default_matmul_precision("highest"):  # rounding may change the choice
            logits = Linear(c, (c.d_model,), (c.experts.count,), 0.02, False, name="router")(x.astype(jnp.float32))
        probability = jax.nn.softmax(logits)
        weight, chosen = route(probability, c.experts.active, c.experts.normalized)
        y = Experts(c, name="experts")(x, weight, chosen, mask)
        if balance is None:
            return y
        if fork is not None:
            probability, chosen, mask = (apart(part, fork) for part in (probability, chosen, mask))
            mask = mask & jnp.any(mask[:, fork.prefix :], axis=1, keepdims=True)
        loss, real = balance_loss(probability, chosen, mask), jnp.mean(jnp.any(mask, axis=1))
        return with_loss(y, balance[0] * loss + balance[1] * real)
