import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import updates
from rlhf_jax.devices import parallel
from rlhf_jax.types import Tokens
from tests import tiny

CFG = updates.Config(entropy_coef=0.3, ptx_coef=0.7)


@pytest.mark.slow
def test_auxiliary_losses_are_means_over_the_whole_minibatch_to_which_shares_add_up():
    rng = np.random.default_rng(0)
    table = rng.normal(size=9).astype(np.float32)  # a log-probability of each token, wherever it stands
    tokens, target = rng.integers(0, 9, (4, 6)), tiny.ragged(0, 4, 6)
    entropy, mask = rng.uniform(1, 2, (4, 3)).astype(np.float32), tiny.ragged(1, 4, 3)
    text = Tokens(tokens=tokens, segment=target.astype(np.int32), target=target)
    rows = tiny.arrays((entropy, mask, text))
    totals = {"tokens": jnp.float32(mask.sum()), "text": jnp.float32(target[:, 1:].sum())}
    policy_fn = lambda params, tokens, segment, keys: (jnp.array(params)[tokens[:, 1:]], None)

    def share(first, last):
        part = jax.tree.map(lambda x: x[first:last], rows)
        return updates.auxiliary_losses(table, *part, totals, policy_fn=policy_fn, cfg=CFG)

    next_token = -np.mean(table[tokens[:, 1:][target[:, 1:]]])
    expected = -0.3 * np.mean(entropy[mask]) + 0.7 * next_token
    whole, metrics = share(0, 4)
    assert whole == pytest.approx(expected, rel=1e-5) and metrics["loss/ptx"] == pytest.approx(next_token, rel=1e-5)
    assert len({int(row.sum()) for row in target[:, 1:]}) > 1
    tiny.assert_close(jax.tree.map(jnp.add, share(0, 1), share(1, 4)), (whole, metrics), atol=1e-5)


# A problem with one parameter w and rows (x, weight): the weighted mean of 1/2 (w - x)^2, whose minimisation by single
# steps depends on their order.
X, WEIGHT = np.arange(16.0, dtype=np.float32), np.arange(1.0, 17.0, dtype=np.float32)
RNG, RATE = jax.random.key(7), 0.5


def loss(params, rows, text, totals):
    x, weight = rows
    share = 0.5 * jnp.sum(weight * (params["policy"] - x) ** 2) / totals["tokens"]
    return share, {"loss": share, "policy/approx_kl": jnp.sum(x), "ratio_error": jnp.float32(0.0)}


OBJECTIVE = updates.Objective(loss, totals=lambda rows: {"tokens": jnp.sum(rows[1])}, live=lambda rows: rows[1])


def minibatches(step, cfg):
    """The rows of each update."""
    for epoch in range(cfg.epochs):
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(RNG, step), epoch), len(X))
        yield from np.array(order).reshape(cfg.minibatches, -1)


def after(step, cfg, place, microbatches=1):
    """The state and the metrics after a step."""
    tx = optax.sgd(RATE)
    state = updates.init({"policy": jnp.float32(0.0)}, tx, cfg, RNG).replace(step=jnp.int32(step))

    def train_step(state, axis=None):
        batch = jnp.array(X), jnp.array(WEIGHT)
        settings = {"objective": OBJECTIVE, "tx": tx, "cfg": cfg, "microbatches": microbatches, "axis": axis}
        return updates.apply(state, batch, None, **settings)

    state, metrics = place.step(train_step)(place.state(state))
    return place.get(state), place.get(metrics)


@pytest.mark.parametrize(("step", "devices", "microbatches"), [(0, 1, 1), (3, 1, 2), (3, 8, 1)])
def test_minibatches_are_drawn_anew_in_each_step_and_epoch(step, devices, microbatches):
    """Each update is one on the whole minibatch, wherever its rows are computed."""
    cfg = updates.Config(epochs=2, minibatches=2)
    state, metrics = after(step, cfg, parallel.Pmap(tuple(jax.devices()[:devices])), microbatches)
    w, losses = 0.0, []
    for rows in minibatches(step, cfg):
        losses.append(0.5 * np.average((w - X[rows]) ** 2, weights=WEIGHT[rows]))
        w -= RATE * np.average(w - X[rows], weights=WEIGHT[rows])
    assert state.step == step + 1
    assert float(state.params["policy"]) == pytest.approx(w, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_no_update_follows_one_that_strays():
    """Also where the KL, for which the sum of the minibatch's x stands here, is below the limit again."""
    cfg = updates.Config(epochs=2, minibatches=4, stop_kl=35.0)
    state, metrics = after(0, cfg, parallel.Pmap(tuple(jax.devices()[:1])))
    w, strayed = 0.0, []
    for rows in minibatches(0, cfg):
        strayed.append(X[rows].sum() > 35)
        if not any(strayed):
            w -= RATE * np.average(w - X[rows], weights=WEIGHT[rows])
    first = strayed.index(True)
    assert first > 0 and not all(strayed[first:])
    assert float(state.params["policy"]) == pytest.approx(w, rel=1e-5)
    assert float(metrics["policy/updated"]) == pytest.approx(first / len(strayed))


def test_a_minibatch_in_buckets_computes_no_column_that_all_rows_of_a_bucket_lack():
    widths, lengths = [], np.array([8, 1, 7, 2, 6, 3, 5, 4])
    cfg, tx = updates.Config(buckets=4), optax.sgd(RATE)

    def loss(params, rows, text, totals):
        jax.debug.callback(lambda: widths.append(rows.shape), ordered=False)
        return jnp.sum(jnp.where(rows, params["policy"], 0.0)) / totals["tokens"], {"ratio_error": jnp.float32(0.0)}

    objective = updates.Objective(loss, totals=lambda rows: {"tokens": jnp.sum(rows)}, live=lambda rows: rows)
    state = updates.init({"policy": jnp.float32(0.0)}, tx, cfg, RNG)
    apply = functools.partial(updates.apply, objective=objective, tx=tx, cfg=cfg, microbatches=1, axis=None)
    jax.block_until_ready(jax.jit(apply)(state, jnp.array(np.arange(8) < lengths[:, None]), None))
    jax.effects_barrier()
    assert sorted(widths) == [(2, 2), (2, 4), (2, 6), (2, 8)]
