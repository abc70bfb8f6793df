import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import optim, reward
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.types import InputError, Rankings
from tests import tiny
from tests.devices import test_shared
from tests.oracles import Case, cases

SCORE = heads.score_fn(tiny.GPT)
SCORES = jax.jit(functools.partial(reward.scores, score_fn=SCORE))
TX = optim.adamw(
    1e-3, optim.Adam(eps=1e-5)
)  # the gradient of the head's bias is 0 but for rounding: keep Adam from amplifying it
STEP = functools.partial(reward.train_step, score_fn=SCORE, tx=TX)


def batch(seed: int, rows: int = 8, responses: int = 5) -> Rankings:
    """Ragged lengths, ties, absent responses, and one prompt with no pair at all."""
    rng = np.random.default_rng(seed)
    mask = tiny.ragged(seed, rows * responses, 9).reshape(rows, responses, 9)
    rank = rng.integers(0, 4, (rows, responses)).astype(np.int32)
    rank[rng.random(rank.shape) < 0.2] = -1
    rank[0] = 1
    mask[rank < 0] = False
    return jax.tree.map(
        jnp.array,
        Rankings(tokens=tiny.random_tokens(seed, rows, responses, 9), mask=mask, start=np.ones(rows, int), rank=rank),
    )


def test_bradley_terry_by_hand():
    score = jnp.array([[1.5, -0.5, 0.25], [0.5, 0.75, 9.0], [3.0, 4.0, 5.0]])
    rank = jnp.array([[0, 2, 1], [1, 0, -1], [1, 1, 1]])
    nll = lambda margin: np.log1p(np.exp(-margin))
    first = (nll(2.0) + nll(1.25) + nll(0.75)) / 3
    np.testing.assert_allclose(reward.bradley_terry_loss(score, rank), (first + nll(0.25)) / 2, rtol=1e-6)
    np.testing.assert_allclose(reward.pairwise_accuracy(score, rank), 1.0)
    np.testing.assert_allclose(reward.pairwise_accuracy(-score, rank), 0.0)
    np.testing.assert_allclose(reward.pairwise_accuracy(jnp.zeros((3, 3)), rank), 0.5)


@cases("bradley_terry_ranked")
def test_bradley_terry_oracle(case):
    loss, grad = jax.value_and_grad(reward.bradley_terry_loss)(case["scores"], case["ranks"])
    pairs = reward.pair_mask(case["ranks"]).sum((1, 2))
    accuracy = reward.pairwise_accuracy(case["scores"], case["ranks"])
    case.check(loss=loss, grad_scores=grad, n_pairs=pairs, pair_accuracy_pooled=accuracy)


@cases("bradley_terry_pairs")
def test_bradley_terry_pairs_oracle(case):
    score = jnp.stack([case["chosen"], case["rejected"]], 1)
    rank = jnp.tile(jnp.array([[0, 1]]), (len(score), 1))
    loss, grad = jax.value_and_grad(reward.bradley_terry_loss)(score, rank)
    case.check(loss=loss, grad_chosen=grad[:, 0], grad_rejected=grad[:, 1])
    case.check(accuracy=reward.pairwise_accuracy(score, rank))


def test_what_absent_responses_hold_reaches_nothing():
    score = jnp.array([[1.5, jnp.nan, 0.25]])
    rank = jnp.array([[0, -1, 1]])
    loss, grad = jax.value_and_grad(reward.bradley_terry_loss)(score, rank)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1.25)), rtol=1e-6)
    assert np.isfinite(grad).all() and grad[0, 1] == 0


@cases("bradley_terry_margin")
def test_margin_oracle(case):
    margin = case["margin"][:, None, None]

    def loss(chosen, rejected):
        score = jnp.stack([chosen, rejected], axis=1)
        return reward.bradley_terry_loss(score, jnp.tile(jnp.array([0, 1]), (len(score), 1)), margin=margin)

    value, (chosen, rejected) = jax.value_and_grad(loss, (0, 1))(case["chosen"], case["rejected"])
    case.check(loss=value, grad_chosen=chosen, grad_rejected=rejected)


def test_settings_of_the_loss_by_hand():
    score, rank = jnp.array([[2.0, 0.5, 1.0]]), jnp.array([[0, 2, -1]])
    for cfg, expected in {
        reward.Config(): np.log1p(np.exp(-1.5)),
        reward.Config(margin=0.25): np.log1p(np.exp(-1.0)),  # two steps of rank
        reward.Config(label_smoothing=0.1): 0.9 * np.log1p(np.exp(-1.5)) + 0.1 * np.log1p(np.exp(1.5)),
        reward.Config(centring=0.01): np.log1p(np.exp(-1.5)) + 0.01 * 2.5**2,
        reward.Config(loss="choice", centring=0.01): np.log1p(np.exp(-1.5)) + 0.01 * 2.5**2,
    }.items():
        np.testing.assert_allclose(reward.loss(score, rank, cfg), expected, rtol=1e-6)
        np.testing.assert_allclose(reward.loss(score, rank, cfg, jnp.int32(4)), expected / 4, rtol=1e-6)


def test_the_centre_is_over_pairs_then_prompts():
    score = jnp.array([[1.0, 2.0, 4.0], [1.0, -1.5, jnp.nan], [9.0, 9.0, 9.0]])
    rank = jnp.array([[0, 1, 1], [1, 0, -1], [0, 0, 0]])
    value, grad = jax.value_and_grad(reward.centring_loss)(score, rank)
    np.testing.assert_allclose(value, ((3.0**2 + 5.0**2) / 2 + 0.5**2) / 2, rtol=1e-6)
    assert np.isfinite(grad).all() and not grad[2].any()


@pytest.mark.parametrize("settings", [{"loss": "choice", "margin": 1.0}, {"label_smoothing": 0.5}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError):
        reward.Config(**settings)


@cases("choice_loss")
def test_choice_oracle(case):
    loss, grad = jax.value_and_grad(reward.choice_loss)(case["scores"], case["chosen"])
    case.check(loss=loss, grad_scores=grad)


def test_choice_by_hand():
    score = jnp.log(jnp.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]))
    np.testing.assert_allclose(reward.choice_loss(score, jnp.array([1, 0])), -np.log(0.5 * 0.1) / 2, rtol=1e-6)


def test_ranked_choice_is_the_choice_of_the_smallest_rank():
    score = jnp.array([[1.5, -0.5, 0.25, 2.0], [0.5, 0.75, -1.25, 0.1]])
    ranked = reward.ranked_choice_loss(score, jnp.array([[1, 0, 1, 1], [3, 2, 1, 2]]))
    np.testing.assert_allclose(ranked, reward.choice_loss(score, jnp.array([1, 2])), rtol=1e-6)
    # Among four equal scores it is ln 4, where each of the three pairs would cost ln 2.
    np.testing.assert_allclose(
        reward.ranked_choice_loss(jnp.zeros((1, 4)), jnp.array([[1, 1, 0, 1]])), np.log(4), rtol=1e-6
    )


def test_ranked_choice_leaves_out_absent_responses_and_undecided_prompts():
    score = jnp.array([[1.5, jnp.nan, 0.25], [9.0, 8.0, 7.0], [jnp.nan, jnp.nan, jnp.nan]])
    rank = jnp.array([[1, -1, 0], [0, 0, 0], [-1, -1, -1]])
    loss, grad = jax.value_and_grad(reward.ranked_choice_loss)(score, rank)
    np.testing.assert_allclose(loss, np.log1p(np.exp(1.25)), rtol=1e-6)
    share = 1 / (1 + np.exp(-1.25))
    np.testing.assert_allclose(grad, [[share, 0, -share], [0, 0, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.slow
def test_score_is_read_at_the_last_real_token():
    rows = batch(3)
    score = SCORES(tiny.scalar(), rows)
    row, response = np.argwhere(rows.rank >= 0)[-1]
    length = int(rows.mask[row, response].sum())
    alone = jax.jit(models.bind(heads.ScalarModel(tiny.GPT)))(
        tiny.scalar(), rows.tokens[row, response : response + 1, :length], jnp.ones((1, length), bool)
    )[0, -1]
    np.testing.assert_allclose(score[row, response], alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "microbatches"), [(parallel.Config(), 2), (parallel.Config(fsdp=2, tensor=2), 1)], ids=["pmap", "mesh"]
)
def test_a_step_in_buckets_is_the_whole_one(cfg, microbatches):
    """With dropout too: what is dropped of a row does not depend on how wide it is."""
    place, length = parallel.layout(cfg), 14
    score_fn = heads.score_fn(dataclasses.replace(tiny.GPT, dropout=0.2))
    tokens = tiny.random_tokens(0, 64, 3, length)
    ends = 2 + np.arange(64)[:, None] % 7 + np.arange(3)[None]  # of 2 to 10 tokens: the last columns are of no row
    rank = np.broadcast_to(np.array([1, 0, 2], np.int32), (64, 3))
    rows = Rankings(tokens=tokens, mask=np.arange(length) < ends[..., None], start=np.ones(64, np.int32), rank=rank)
    found = []
    for buckets in (1, 2):
        train_step = functools.partial(reward.train_step, score_fn=score_fn, tx=TX, cfg=reward.Config(buckets=buckets))
        step = functools.partial(train_step, microbatches=microbatches)
        state = place.state(optim.init(tiny.scalar(), TX, jax.random.key(0)))
        scores = functools.partial(reward.scores, score_fn=score_fn, buckets=buckets)
        scored = place.gather(place.step(scores)(state.params, place.rows(rows)))
        state, metrics = place.step(step)(state, place.rows(rows))
        found.append((scored, place.get(state.params), place.get(metrics)))
    tiny.assert_close(found[0], found[1], atol=1e-5)


def test_a_step_in_buckets_computes_no_column_that_all_lack(monkeypatch):
    widths = []

    def score_fn(params, tokens, mask, keys=None, **prompt):
        jax.debug.callback(lambda: widths.append(tokens.shape), ordered=False)
        return params["a"] * jnp.sum(jnp.where(mask, tokens, 0), axis=1).astype(jnp.float32)

    tokens = np.ones((8, 2, 8), np.int32)
    mask = np.arange(8) < np.array([1, 2, 3, 4, 5, 6, 8, 8])[:, None, None] + np.array([0, -1])[:, None]
    rank = np.broadcast_to(np.array([0, 1], np.int32), (8, 2))
    rows = Rankings(tokens=tokens, mask=mask, start=np.zeros(8, np.int32), rank=rank)
    state = optim.init({"a": jnp.float32(1.0)}, TX, jax.random.key(0))
    step = functools.partial(reward.train_step, score_fn=score_fn, tx=TX, cfg=reward.Config(buckets=4))
    jax.block_until_ready(jax.jit(step)(state, tiny.arrays(rows)))
    jax.effects_barrier()
    assert sorted(widths) == [(4, 2), (4, 4), (4, 6), (4, 8)]


def rankings_that_share(seed: int) -> Rankings:
    """Prompts of 2 to 6 tokens before a column where 4 responses of up to 5 begin, some of them absent."""
    tokens, mask = test_shared.rows_that_share(seed, rows=32, group=4, prompt=6, answer=5)
    rank = np.random.default_rng(seed).integers(0, 3, (8, 4)).astype(np.int32)
    rank[1::2, 3], rank[0] = -1, 1
    rows = tokens.reshape(8, 4, 11), mask.reshape(8, 4, 11) & (rank >= 0)[..., None]
    return Rankings(tokens=rows[0], mask=rows[1], start=np.full(8, 6, np.int32), rank=rank, prefix=6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "count", "buckets", "microbatches"),
    [
        (parallel.Config(), 8, 1, 1),
        (parallel.Config(fsdp=2, tensor=2), 4, 2, 2),
    ],
    ids=["pmap", "mesh"],
)
def test_prompts_that_responses_share_change_nothing(devices, count, buckets, microbatches):
    """The gradients, which plain SGD leaves as they are, and the metrics are those of one by one."""
    batch, tx = rankings_that_share(0), optax.sgd(1.0)
    layout = parallel.layout(devices, jax.devices()[:count])
    found = []
    for place, compute, cfg, parts in (
        (parallel.Pmap(tuple(jax.devices()[:1])), models.Compute(share_prompts=False), reward.Config(), 1),
        (layout, models.Compute(share_prompts=True), reward.Config(buckets=buckets), microbatches),
    ):
        score_fn = heads.score_fn(dataclasses.replace(tiny.GPT, compute=compute))
        step = functools.partial(reward.train_step, score_fn=score_fn, tx=tx, cfg=cfg, microbatches=parts)
        state = place.state(optim.init(tiny.scalar(), tx, jax.random.key(0)))
        state, metrics = place.step(step)(state, place.rows(batch))
        scored = place.step(functools.partial(reward.scores, score_fn=score_fn, buckets=cfg.buckets))
        score = place.gather(scored(place.state(tiny.scalar()), place.rows(batch)))
        results = state.params, metrics
        found.append((jax.tree.map(np.asarray, place.get(results)), np.where(batch.rank < 0, 0, score)))
    tiny.assert_close(found[1], found[0], atol=2e-5)


@pytest.mark.slow
def test_a_step_takes_the_loss_it_is_given():
    state = optim.init(tiny.scalar(), TX, jax.random.key(0))
    _, metrics = jax.jit(functools.partial(STEP, cfg=reward.Config(loss="choice")))(state, batch(0))
    score = SCORES(state.params, batch(0))
    np.testing.assert_allclose(metrics["loss/choice"], reward.ranked_choice_loss(score, batch(0).rank), rtol=1e-5)
    assert "loss/bradley_terry" not in metrics


@pytest.mark.slow
def test_it_learns_an_order():
    # Responses are ranked by their last token.
    tokens = jnp.array(tiny.random_tokens(0, 32, 4, 5))
    rank = jnp.argsort(jnp.argsort(-tokens[..., -1], axis=1), axis=1)
    data = Rankings(tokens=tokens, mask=jnp.ones(tokens.shape, bool), start=jnp.ones(32, int), rank=rank)
    tx = optim.adamw(1e-2)
    state, step = optim.init(tiny.scalar(), tx, jax.random.key(0)), jax.jit(functools.partial(STEP, tx=tx))
    for _ in range(60):
        state, metrics = step(state, data)
    assert metrics["reward/accuracy"] > 0.95
    assert reward.pairwise_accuracy(SCORES(state.params, data), data.rank) > 0.95


@cases("reward_normalise_given", "reward_normalise_samples")
def test_normalize_oracle(case):
    raw = case["raw"]
    mean, std = (case["mean"], case["std"]) if "mean" in case else (jnp.mean(raw), jnp.std(raw))
    head = reward.normalize({"kernel": jnp.ones(1), "bias": jnp.zeros(())}, float(mean), float(std))
    unit = raw * head["kernel"] + head["bias"]
    target = case.raw["inputs"]
    case.check(normalised=unit * target["target_std"] + target["target_mean"])


def test_scores_that_are_all_the_same_are_not_normalized():
    with pytest.raises(InputError, match="no two of them differ"):
        reward.normalize(tiny.scalar(), 0.5, 0.0)


def test_normalize_changes_the_scores_as_it_says():
    rows = batch(0)
    score = SCORES(tiny.scalar(), rows)
    changed = SCORES(reward.normalize(tiny.scalar(), 0.5, 2.0), rows)
    np.testing.assert_allclose(changed, (score - 0.5) / 2.0, atol=1e-5)


@pytest.mark.slow
def test_cost_loss_oracle():
    case = Case("cost_model_loss")
    cost = jnp.stack([case["cost_lower"], case["cost_higher"]], axis=1)
    rank = jnp.tile(jnp.array([[0, 1]]), (len(cost), 1))  # the less harmful one is the better
    harmful = jnp.stack([case["sign_lower"], case["sign_higher"]], axis=1) > 0
    value, grad = jax.value_and_grad(reward.cost_loss)(cost, rank, harmful)
    each = [reward.cost_loss(cost[b : b + 1], rank[b : b + 1], harmful[b : b + 1]) for b in range(len(cost))]
    correct, signs = reward.correct_signs(cost, rank, harmful)
    case.check(
        loss=value,
        pair_loss=each,
        grad_cost_higher=grad[:, 1],
        grad_cost_lower=grad[:, 0],
        accuracy=reward.pairwise_accuracy(-cost, rank),
        sign_accuracy=correct / signs,
    )


def test_cost_loss_of_a_ranking_by_hand():
    """Three responses and a gap: the pairs (0, 1) and (2, 1); the second prompt, all ties, is left out."""
    cost = jnp.array([[-0.5, 1.5, 0.25, 9.0], [5.0, 5.0, 5.0, 5.0]])
    rank = jnp.array([[0, 1, 0, -1], [2, 2, 2, 2]])
    harmful = jnp.array([[False, True, True, True], [True, False, True, False]])
    ln = lambda x: np.log1p(np.exp(-x))  # -ln sigmoid(x)
    expected = (ln(2.0) + ln(1.25)) / 2 + 2 * (ln(0.5) + ln(1.5) + ln(0.25)) / 3
    value, grad = jax.value_and_grad(reward.cost_loss)(cost, rank, harmful)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert grad[0, 3] == 0 and not np.any(grad[1])


@pytest.mark.slow
def test_a_cost_model_learns_on_one_device_and_eight():
    cfg, rng = reward.Config(loss="cost"), np.random.default_rng(0)
    ranks = rng.integers(0, 3, (8, 3)).astype(np.int32)
    tokens = tiny.random_tokens(3, 24, 12).reshape(8, 3, 12)
    batch = Rankings(
        tokens=tokens,
        mask=tiny.ragged(4, 24, 12).reshape(8, 3, 12),
        start=np.full(8, 2, np.int32),
        rank=ranks,
        harmful=rng.random((8, 3)) < 0.5,
    )
    results = []
    for devices, microbatches in ((jax.devices()[:1], 4), (jax.devices(), 1)):
        layout = parallel.layout(devices=devices)
        step = functools.partial(
            reward.train_step, score_fn=heads.score_fn(tiny.GPT), tx=TX, cfg=cfg, microbatches=microbatches
        )
        state = layout.state(optim.init(tiny.scalar(), TX, jax.random.key(0)))
        state, metrics = layout.step(step)(state, layout.rows(batch))
        results.append(jax.tree.map(np.asarray, layout.get((state.params, metrics))))
    tiny.assert_close(*results, atol=1e-5)
    metrics = results[0][1]
    assert {"loss/cost", "reward/accuracy", "cost/sign_accuracy"} <= metrics.keys()
    batch = tiny.arrays(batch)
    cost = reward.scores(tiny.scalar(), batch, heads.score_fn(tiny.GPT))
    np.testing.assert_allclose(metrics["loss/cost"], reward.cost_loss(cost, batch.rank, batch.harmful), rtol=1e-5)
    with pytest.raises(InputError, match="needs labels of harmful responses"):
        reward.loss(cost, batch.rank, cfg)
    with pytest.raises(InputError, match="have no effect with loss=cost"):
        reward.Config(loss="cost", centring=0.1)
