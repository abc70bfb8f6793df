import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import dpo, optim, preferences
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora
from rlhf_jax.types import InputError, Rankings
from tests import tiny
from tests.algorithms import test_reward
from tests.oracles import Case, cases


def test_by_hand():
    terms = [jnp.array([x]) for x in (-3.5, -4.0, -4.5, -3.0)]  # margin = .5 * ((-3.5 + 4.5) - (-4 + 3)) = 1
    np.testing.assert_allclose(dpo.loss(*terms, beta=0.5), np.log1p(np.exp(-1.0)), rtol=1e-6)
    smoothed = 0.9 * np.log1p(np.exp(-1.0)) + 0.1 * np.log1p(np.exp(1.0))
    np.testing.assert_allclose(dpo.loss(*terms, beta=0.5, label_smoothing=0.1), smoothed, rtol=1e-6)


@cases("dpo_label_smoothing_0.0", "dpo_label_smoothing_0.1")
def test_oracle(case):
    args = [case[k] for k in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    loss, (chosen, rejected) = jax.value_and_grad(dpo.loss, argnums=(0, 1))(
        *args, case["beta"], case["label_smoothing"]
    )
    case.check(loss=loss, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


@cases("ipo")
def test_ipo_oracle(case):
    args = [case[k] for k in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    loss, (chosen, rejected) = jax.value_and_grad(dpo.ipo_loss, argnums=(0, 1))(*args, case["beta"])
    case.check(loss=loss, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


@cases("dpo_from_tokens")
def test_from_tokens_oracle(case):
    sums = {
        f"{model}_{which}_sum": preferences.sequence_logprobs(case[f"{model}_{which}"], case[f"{which}_mask"])
        for model in ("policy", "ref")
        for which in ("chosen", "rejected")
    }
    case.check(loss=dpo.loss(*sums.values(), case["beta"]), **sums)


@pytest.mark.parametrize(
    ("name", "kind", "smoothing"),
    [("dpo_robust", "robust", 0.1), ("dpo_hinge", "hinge", 0.0), ("exo_pair", "exo", 0.05)],
)
def test_terms_oracle(name, kind, smoothing):
    case = Case(name)
    cfg = dpo.Config(beta=case["beta"], loss=kind, label_smoothing=smoothing)
    assert kind == "hinge" or case["eps"] == smoothing

    def loss(chosen, rejected):
        terms = dpo.TERMS[cfg.loss]((chosen - case["ref_chosen"]) - (rejected - case["ref_rejected"]), cfg)
        return jnp.mean(terms), terms

    args = case["policy_chosen"], case["policy_rejected"]
    (value, terms), (chosen, rejected) = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
    case.check(loss=value, pair_loss=terms, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


def test_per_token_oracle():
    case = Case("dpo_length_normalized")

    def loss(chosen, rejected):
        means = [
            preferences.mean_logprobs(policy - case[f"ref_{which}"], case[f"{which}_mask"])
            for which, policy in (("chosen", chosen), ("rejected", rejected))
        ]
        return jnp.mean(dpo.sigmoid_terms(means[0] - means[1], case["beta"]))

    value, (chosen, rejected) = jax.value_and_grad(loss, (0, 1))(case["policy_chosen"], case["policy_rejected"])
    case.check(loss=value, grad_policy_chosen=chosen, grad_policy_rejected=rejected)


def test_other_terms_by_hand():
    h = jnp.array([2.0, -1.0])
    np.testing.assert_allclose(dpo.hinge_terms(h, 0.5), [0.0, 1.5])
    right, wrong = np.log1p(np.exp(-0.5 * np.array([2.0, -1.0]))), np.log1p(np.exp(0.5 * np.array([2.0, -1.0])))
    np.testing.assert_allclose(dpo.robust_terms(h, 0.5, 0.2), (0.8 * right - 0.2 * wrong) / 0.6, rtol=1e-6)
    # The mean over labels that are flipped with probability e is the loss of the clean labels.
    both = 0.8 * dpo.robust_terms(h, 0.5, 0.2) + 0.2 * dpo.robust_terms(-h, 0.5, 0.2)
    np.testing.assert_allclose(both, dpo.sigmoid_terms(h, 0.5), rtol=1e-6)
    q = 1 / (1 + np.exp(-1.0))
    expected = q * np.log(q / 0.9) + (1 - q) * np.log((1 - q) / 0.1)
    np.testing.assert_allclose(dpo.exo_terms(h[:1], 0.5, 0.1), [expected], rtol=1e-5)


# The step -------------------------------------------------------------------------------------------------------------

POLICY = models.logprobs_fn(tiny.GPT)
LOGITS = models.bind(models.Transformer(tiny.GPT))
TX = optim.adamw(1e-3, optim.Adam(eps=1e-5))
STEP = functools.partial(dpo.train_step, logprobs_fn=POLICY, tx=TX)
LOGPROBS = jax.jit(functools.partial(preferences.response_logprobs, logprobs_fn=POLICY))


def batch(seed: int, rows: int = 8, responses: int = 4) -> Rankings:
    """Prompts of 2 to 4 tokens, each the same in all its responses; ties, absent responses, a prompt without a pair."""
    rng = np.random.default_rng(seed)
    start = rng.integers(2, 5, rows).astype(np.int32)
    tokens = tiny.random_tokens(seed, rows, responses, 9)
    tokens[:, :, :4] = np.where(np.arange(4) < start[:, None, None], tokens[:, :1, :4], tokens[:, :, :4])
    length = rng.integers(start[:, None] + 1, 10, (rows, responses))
    rank = rng.integers(0, 3, (rows, responses)).astype(np.int32)
    rank[rng.random(rank.shape) < 0.2] = -1
    rank[0] = 1
    mask = (np.arange(9) < length[..., None]) & (rank >= 0)[..., None]
    return tiny.arrays(Rankings(tokens=tokens, mask=mask, start=start, rank=rank))


@pytest.mark.slow
def test_a_response_is_scored_without_its_prompt():
    rows = batch(0)
    found = LOGPROBS(tiny.policy(), rows)
    row, k = np.argwhere(rows.rank >= 0)[-1]
    tokens, start, length = rows.tokens[row, k], int(rows.start[row]), int(rows.mask[row, k].sum())
    logp = jax.nn.log_softmax(jax.jit(LOGITS)(tiny.policy(), tokens[None, :length], jnp.ones((1, length), bool))[0])
    expected = sum(float(logp[t - 1, tokens[t]]) for t in range(start, length))
    np.testing.assert_allclose(found[row, k], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "devices", "count", "microbatches"),
    [("ipo", parallel.Config(), 1, 2), ("sigmoid", parallel.Config(fsdp=2, tensor=2), 4, 1)],
    ids=["ipo", "mesh"],
)
def test_prompts_that_responses_share_change_nothing(loss, devices, count, microbatches):
    """Also with adapters, and where dropout of rate 0 has keys."""
    batch, cfg, tx = test_reward.rankings_that_share(1), lora.Config(rank=2), optax.sgd(1.0)
    trained, base = lora.split(tiny.policy(), cfg, jax.random.key(1))
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    found = []
    for place, share, parts in (
        (parallel.Pmap(tuple(jax.devices()[:1])), False, 1),
        (parallel.layout(devices, jax.devices()[:count]), True, microbatches),
    ):
        config = dataclasses.replace(tiny.GPT, compute=models.Compute(share_prompts=share))
        network = models.logprobs_fn(config)
        make = lambda on, network=network, parts=parts: functools.partial(
            dpo.train_step, logprobs_fn=on(network), tx=tx, cfg=dpo.Config(0.3, loss), microbatches=parts
        )
        state = place.state(optim.init(trained, tx, jax.random.key(0)))
        step, reference = place.step(lora.on_base(cfg, make)), place.frozen(tiny.policy(seed=3))
        state, metrics = step(state, place.state(base), place.rows(batch), reference)
        found.append(jax.tree.map(np.asarray, place.get((state.params, metrics))))
    tiny.assert_close(found[1], found[0], atol=2e-5)
    assert found[0][1]["grad_norm"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [dpo.Config(0.3, label_smoothing=0.1), dpo.Config(0.3, "ipo")], ids=["sigmoid", "ipo"])
def test_a_step_averages_pairs_then_prompts(cfg):
    rows, policy, reference = batch(1), tiny.policy(), tiny.policy(seed=3)
    _, metrics = jax.jit(functools.partial(STEP, cfg=cfg))(optim.init(policy, TX, jax.random.key(0)), rows, reference)
    gain = np.subtract(*(LOGPROBS(params, rows) for params in (policy, reference)))
    losses, correct = [], []
    for score, rank in zip(gain, rows.rank, strict=True):
        pairs = [(i, j) for i in range(4) for j in range(4) if 0 <= rank[i] < rank[j]]
        h = np.array([score[i] - score[j] for i, j in pairs])
        terms = (
            (h - 1 / 0.6) ** 2
            if cfg.loss == "ipo"
            else 0.9 * np.log1p(np.exp(-0.3 * h)) + 0.1 * np.log1p(np.exp(0.3 * h))
        )
        correct += list(h > 0)
        losses += [terms.mean()] if pairs else []
    np.testing.assert_allclose(metrics["loss/dpo"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/accuracy"], np.mean(correct), rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "hinge", "label_smoothing": 0.1},
        {"loss": "exo"},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError):
        dpo.Config(**settings)
