import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.likelihood import Request
from rlhf_jax.types import InputError
from tests import tiny


@functools.cache
def model(config: models.Config = tiny.GPT) -> models.Model:
    apply = jax.jit(models.bind(models.Transformer(config)))
    return models.Model(config=config, params=tiny.policy(config), tokenizer=None, apply=apply)


def questions() -> list[Request]:
    """Options of several tokens and of one, to contexts that begin alike; two requests are the same."""
    shots, rng = tiny.random_tokens(0, 9).tolist(), np.random.default_rng(1)
    requests = []
    for _ in range(3):
        context = shots + rng.integers(3, 31, rng.integers(1, 6)).tolist()
        requests += [Request(context, rng.integers(3, 31, size).tolist()) for size in (1, 1, 3, 5)]
    requests += [Request([7], [8, 9]), requests[2], Request([5, 6], tiny.random_tokens(2, 20).tolist())]
    return [requests[n] for n in rng.permutation(len(requests))]


def one_by_one(model: models.Model, requests: list[Request]) -> list[likelihood.Likelihood]:
    found = []
    for context, continuation in requests:
        text = (list(context) + list(continuation))[-model.config.max_length - 1 :]
        padded = np.zeros((1, model.config.max_length), np.int32)
        padded[0, : len(text) - 1] = text[:-1]
        logits = model.apply(model.params, padded, np.arange(padded.shape[1])[None] < len(text) - 1)[0]
        logits = logits[len(text) - 1 - len(continuation) : len(text) - 1]
        logp, ids = jax.nn.log_softmax(logits), jnp.array(continuation)
        total = float(jnp.sum(logp[jnp.arange(len(ids)), ids]))
        found.append(likelihood.Likelihood(total, bool(jnp.all(jnp.argmax(logp, axis=1) == ids))))
    return found


def assert_same(found: list[likelihood.Likelihood], expected: list[likelihood.Likelihood]) -> None:
    np.testing.assert_allclose([one.total for one in found], [one.total for one in expected], atol=2e-5)
    assert [one.greedy for one in found] == [one.greedy for one in expected]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "gemma2"])
def test_likelihoods_are_those_of_one_text_at_a_time(name):
    of = model(tiny.CONFIGS[name])
    requests = questions()
    likeliest = jnp.argmax(of.apply(of.params, jnp.array([[4, 5]]), jnp.ones((1, 2), bool))[0, 1])
    requests.append(Request([4, 5], [int(likeliest)]))
    expected = one_by_one(of, requests)
    assert expected[-1].greedy
    assert_same(likelihood.loglikelihoods(of, requests, batch=8), expected)


def test_every_layout_gives_the_same():
    of, requests = model(), questions()
    expected = likelihood.loglikelihoods(of, requests, batch=8)
    for layout in (parallel.Pmap(tuple(jax.devices()[:1])), parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))):
        assert_same(likelihood.loglikelihoods(of, requests, layout=layout, batch=8), expected)


def test_sharing_changes_nothing():
    of, requests = model(), questions()
    alone = likelihood.Reader(of, parallel.PMAP, 8, share=False)
    assert_same(alone(requests), likelihood.loglikelihoods(of, requests, batch=8))


def test_what_texts_share_is_read_once():
    requests = questions()
    rows = list(likelihood._trees(likelihood._inputs(requests, 24), [r.continuation for r in requests], tiny.GPT))
    whole = sum(len(r.context) + len(r.continuation) - 1 for r in requests)
    assert sum(len(row.tokens) for row in rows) < 0.6 * whole
    assert all((row.reach >= 1).all() for row in rows)


def test_options_of_one_token_are_read_at_one_column():
    (row,) = likelihood._trees([np.array([3, 4, 5])] * 4, [[n] for n in (6, 7, 8, 6)], tiny.GPT)
    assert row.tokens.tolist() == [3, 4, 5] and row.reach.tolist() == [3, 2, 1]
    assert row.columns.tolist() == [2] and row.targets == [[6, 7, 8]]
    assert row.reads.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 0, 3]]


def test_trees_grow_no_wider_than_is_worth_it(monkeypatch):
    monkeypatch.setattr(likelihood, "WIDEST", 12)
    texts = [np.array([1, 2, 3, 4, n, n, n]) for n in range(5, 13)]
    rows = list(likelihood._trees(texts, [[1]] * 8, tiny.GPT))
    assert [len(row.tokens) for row in rows] == [10] * 4


def test_contexts_beyond_the_model_lose_their_oldest_tokens(capsys):
    of = model()
    requests = [
        Request(tiny.random_tokens(0, 40).tolist(), [5, 6]),
        Request([3], tiny.random_tokens(3, 24).tolist()),
        Request([3], [4]),
    ]
    assert_same(likelihood.loglikelihoods(of, requests, batch=8), one_by_one(of, requests))
    assert capsys.readouterr().err.count("warning: 1 of 3 contexts exceed the model's 24 tokens") == 1


def test_what_cannot_be_asked_is_refused():
    of = model()
    with pytest.raises(InputError, match="request 1 has an empty context"):
        likelihood.loglikelihoods(of, [Request([1], [2]), Request([], [2])])
    with pytest.raises(InputError, match="request 0 has an empty continuation"):
        likelihood.loglikelihoods(of, [Request([1], [])])
    with pytest.raises(InputError, match="request 0 has 25 tokens, more than the model's context of 24"):
        likelihood.loglikelihoods(of, [Request([1], [2] * 25)])
    assert likelihood.loglikelihoods(of, []) == []


def test_logits_exist_in_parts(monkeypatch):
    of, requests = model(), questions()
    expected = likelihood.loglikelihoods(of, requests, batch=8)
    monkeypatch.setattr(likelihood, "LOGITS", 2 * 31 * 3)
    changed = dataclasses.replace(of, config=dataclasses.replace(of.config))
    assert_same(likelihood.loglikelihoods(changed, requests, batch=8), expected)
