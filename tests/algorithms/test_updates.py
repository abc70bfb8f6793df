import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import updates
from rlhf_jax.types import Tokens, TrainState
from tests import tiny

CFG = updates.Config(entropy_coef=0.3, ptx_coef=0.7)


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


@pytest.mark.parametrize(("step", "microbatches"), [(0, 1), (3, 2)])
def test_minibatches_are_drawn_anew_in_each_step_and_epoch(step, microbatches):
    """Of the rows x, a least-squares loss 1/2 (w - x)^2, whose result depends on the order of the updates."""
    x, rng, cfg = np.arange(6.0, dtype=np.float32) ** 2, jax.random.key(7), updates.Config(epochs=2, minibatches=3)

    def loss(params, rows, text, totals):
        share = 0.5 * jnp.sum((params["policy"] - rows) ** 2) / totals["tokens"]
        return share, {"loss": share, "ratio_error": jnp.float32(0.0)}

    objective = updates.Objective(
        loss, totals=lambda rows: {"tokens": jnp.float32(rows.shape[0])}, live=lambda rows: rows
    )
    tx = optax.sgd(0.5)
    before = updates.init({"policy": jnp.float32(0.0)}, tx, cfg, rng)
    state = before.replace(step=jnp.int32(step))
    apply = functools.partial(updates.apply, objective=objective, tx=tx, cfg=cfg, microbatches=microbatches, axis=None)
    after, metrics = jax.jit(lambda state: apply(state, jnp.array(x), None))(state)

    weight, losses = 0.0, []
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(rng, step), epoch), 6)
        for rows in np.array(order).reshape(3, 2):
            losses.append(0.5 * np.mean((weight - x[rows]) ** 2))
            weight -= 0.5 * np.mean(weight - x[rows])
    assert after.step == step + 1 and isinstance(after, TrainState)
    assert float(after.params["policy"]) == pytest.approx(weight, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
