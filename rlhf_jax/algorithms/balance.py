"""The load-balancing loss of mixtures of experts, which every train step can add to its own.

    loss(params) + weight * balance(params)

A network computes the second term where its routers are (`models.experts.balance_loss` defines it), and no loss that
calls the network sees it. It travels through the parameters: `attach` puts the weight beside the layers of each
network, and the gradient of what is differentiated is then that of the sum. The derivative by the weight is the loss
itself, so that it arrives with the gradients, summed over micro-batches and devices as they are; `detach` takes it out.

    params = balance.attach(state.params, weight, microbatches, axis)
    grads, metrics = ...  # of the loss, over all micro-batches and devices
    grads, balance_metrics = balance.detach(grads)

Models that do not train (a reference, a teacher) have no weight, and so no part in it.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.types import Metrics, Params

LEAF = "balance"  # [2]: the weight, and 0, by which the derivative is the share of rows that are not all padding
LAYERS = "blocks"  # what a network with layers has


def attach(params: Params, weight: float, parts: int, axis: str | None) -> Params:
    """The parameters with a weight beside the layers of each network; without one if it is 0.

    Every device and each of so many `parts` of its rows adds the mean over its own rows.
    """
    if not weight:
        return params
    shares = parts * (1 if axis is None else jax.lax.axis_size(axis))

    def add(tree: Params) -> Params:
        if not isinstance(tree, dict):
            return tree
        if LAYERS in tree:
            return tree | {LEAF: jnp.array([weight / shares, 0.0], jnp.float32)}
        return {name: add(part) for name, part in tree.items()}

    return add(params)


def detach(grads: Params) -> tuple[Params, Metrics]:
    """The gradients without those by the weights, and the loss of each network that has one.

    The metric is "loss/balance", or "loss/balance/policy" where the network is one of several. It is the mean over
    routers and rows that are not all padding, and 1 where all experts are equally loaded.
    """
    metrics: Metrics = {}

    def take(tree: Params, name: str) -> Params:
        if not isinstance(tree, dict):
            return tree
        if LEAF in tree:
            loss, count = tree[LEAF]
            metrics[name] = loss / jnp.maximum(count, 1e-9)
        return {
            key: take(part, name if key == "trunk" else f"{name}/{key}") for key, part in tree.items() if key != LEAF
        }

    return take(grads, "loss/balance"), metrics
