import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import optim, sft
from rlhf_jax.devices import parallel
from rlhf_jax.types import Tokens
from tests import tiny
from tests.oracles import cases

CONFIG = dataclasses.replace(tiny.GPT, dropout=0.1)
LOGPROBS = models.logprobs_fn(CONFIG)
TX = optim.adamw(1e-3, weight_decay=0.1)
STEP = functools.partial(sft.train_step, logprobs_fn=LOGPROBS, tx=TX)


def batch(seed: int, rows: int = 8) -> Tokens:
    segment = tiny.ragged(seed, rows, 10).astype(np.int32)
    target = segment.astype(bool) & (np.random.default_rng(seed).random(segment.shape) < 0.7)
    target[:, 0] = False
    return jax.tree.map(jnp.array, Tokens(tokens=tiny.random_tokens(seed, rows, 10), segment=segment, target=target))


def test_loss_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]], [[0.2, 0.2, 0.6], [0.9, 0.05, 0.05]]]))
    targets, mask = jnp.array([[1, 1], [2, 0]]), jnp.array([[True, True], [True, False]])
    np.testing.assert_allclose(sft.next_token_loss(logits, targets, mask), -np.log(0.25 * 0.7 * 0.6) / 3, rtol=1e-6)


@cases("next_token_loss")
def test_loss_oracle(case):
    mask = case["loss_mask"][:, 1:]

    def loss(logits):
        return sft.next_token_loss(logits[:, :-1], case["tokens"][:, 1:], mask)

    value, grad = jax.value_and_grad(loss)(case["logits"])
    case.check(loss=value, grad_logits=grad, n_targets=mask.sum())


@cases("next_token_loss_microbatches")
def test_micro_batch_shares_add_up_oracle(case):
    logits, tokens, mask = case["logits"][:, :-1], case["tokens"][:, 1:], case["loss_mask"][:, 1:]
    parts = [slice(0, case["split"]), slice(case["split"], None)]
    shares = [sft.next_token_loss(logits[p], tokens[p], mask[p], jnp.sum(mask)) for p in parts]
    case.check(loss=sum(shares))


@pytest.mark.slow
def test_documents_in_one_row_are_learnt_as_in_rows_of_their_own():
    tokens = tiny.random_tokens(0, 2, 5)
    ones = jnp.ones((2, 5), jnp.int32)
    apart = Tokens(tokens=jnp.array(tokens), segment=ones, target=jnp.cumsum(ones, axis=1) > 1)
    one = jax.tree.map(lambda x: x.reshape(1, 10), apart)
    packed = one.replace(segment=jnp.repeat(jnp.array([[1, 2]]), 5, axis=1))
    losses = [sft.loss(tiny.policy(), rows, LOGPROBS) for rows in (apart, packed, one)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert abs(float(losses[2] - losses[0])) > 1e-4


@pytest.mark.slow
def test_every_device_returns_the_same_state():
    spread = parallel.replicate(optim.init(tiny.policy(), TX, jax.random.key(0)))
    spread, _ = parallel.pmap(STEP)(spread, parallel.shard(batch(0)))
    for leaf in jax.tree.leaves(spread.params):
        np.testing.assert_array_equal(np.asarray(leaf), np.broadcast_to(leaf[:1], leaf.shape))


@pytest.mark.slow
def test_what_is_not_a_target_is_not_learnt():
    state = optim.init(tiny.policy(), TX, jax.random.key(0))
    plain = batch(0)
    unseen = jnp.where(~plain.segment.astype(bool), plain.tokens + 1, plain.tokens) % 31  # change padding only
    one, other = jax.jit(STEP)(state, plain)[0], jax.jit(STEP)(state, plain.replace(tokens=unseen))[0]
    tiny.assert_close(one.params, other.params, atol=0)


def test_dropout_noise_differs_between_steps():
    state = optim.init(tiny.policy(), TX, jax.random.key(0))
    step = jax.jit(STEP)
    later = step(state.replace(step=jnp.int32(1)), batch(0))[1]
    assert float(step(state, batch(0))[1]["loss/next_token"]) != float(later["loss/next_token"])


@pytest.mark.slow
def test_it_learns():
    state = optim.init(tiny.policy(), optim.adamw(1e-2), jax.random.key(0))
    step = jax.jit(functools.partial(sft.train_step, logprobs_fn=LOGPROBS, tx=optim.adamw(1e-2)))
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch(0))
        losses.append(float(metrics["loss/next_token"]))
    assert losses[-1] < 0.5 * losses[0]


def test_evaluate_counts_every_target_once():
    nll, count = jax.jit(functools.partial(sft.evaluate, logprobs_fn=LOGPROBS))(tiny.policy(), batch(0))
    assert int(count) == int(batch(0).target.sum())
    np.testing.assert_allclose(
        nll / count, jax.jit(functools.partial(sft.loss, logprobs_fn=LOGPROBS))(tiny.policy(), batch(0)), rtol=1e-5
    )


@pytest.mark.slow
def test_the_held_out_loss_is_the_mean_over_all_tokens():
    """Batches have different numbers of targets, one has none, and dropout is off."""
    parts = [batch(0), batch(1), batch(2).replace(target=jnp.zeros((8, 10), bool))]
    logp, _ = LOGPROBS(
        tiny.policy(), *(jnp.concatenate([getattr(x, name) for x in parts]) for name in ("tokens", "segment"))
    )
    target = np.concatenate([x.target[:, 1:] for x in parts])
    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    step = functools.partial(sft.held_out_loss, logprobs_fn=LOGPROBS)
    one = parallel.Pmap(tuple(jax.devices()[:1]))
    for layout in (one, parallel.PMAP, parallel.layout(parallel.Config(fsdp=4, tensor=2))):
        metrics = layout.get(layout.step(step)(layout.state(tiny.policy()), layout.rows(stacked, rows_axis=1)))
        assert list(metrics) == ["loss/held_out"]
        np.testing.assert_allclose(metrics["loss/held_out"], -np.mean(np.asarray(logp)[target]), rtol=1e-5)
