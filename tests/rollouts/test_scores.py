import functools
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import ppo, updates
from rlhf_jax.data import steps, tokenizer
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.steps import Marks
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.rollouts import judge, scores
from rlhf_jax.types import InputError, Rollout
from tests import tiny

EOS, P, N = 2, 3, 5
SCALAR = jax.jit(models.bind(heads.ScalarModel(tiny.GPT)))


def reward(seed: int) -> models.Model:
    return models.Model(tiny.GPT, tiny.scalar(seed=seed), None, lambda: None)


def episodes(rows: int = 16) -> Rollout:
    """Responses that are not stopped at their EOS; some have one."""
    tokens = tiny.random_tokens(0, rows, P + N)
    tokens[::2, P + 1] = EOS
    mask = np.concatenate([tiny.ragged(1, rows, P, left=True), np.ones((rows, N), bool)], axis=1)
    zeros = np.zeros((rows, N), np.float32)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=mask[:, P:],
        logp=zeros,
        logp_ref=zeros,
        ended=np.arange(rows) % 2 == 0,
        index=np.arange(rows, dtype=np.int32),
    )


def read(sampled: Rollout) -> np.ndarray:
    mask = sampled.mask.copy()
    mask[::2, P + 2 :] = False
    return mask


def test_a_reward_model_reads_through_the_first_eos():
    sampled = episodes()
    found = parallel.gather(scores.reward_models([reward(5)], EOS)(parallel.shard(sampled)))
    per_token = np.asarray(SCALAR(tiny.scalar(seed=5), sampled.tokens, read(sampled)))
    last = np.where(np.arange(16) % 2 == 0, P + 1, P + N - 1)
    np.testing.assert_allclose(found.score, per_token[np.arange(16), last], atol=1e-5)
    assert found.disagreement is None and found.token_score is None
    np.testing.assert_array_equal(found.tokens, sampled.tokens)


def test_a_reward_model_reads_in_buckets():
    sampled = parallel.shard(episodes())
    whole, parts = (parallel.gather(scores.reward_models([reward(5)], EOS, buckets=n)(sampled)).score for n in (1, 2))
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    with pytest.raises(InputError, match="do not divide into 3 parts"):
        scores.reward_models([reward(5)], EOS, buckets=3)(sampled)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_each_model_and_a_cost_model_score_by_themselves(devices, monkeypatch):
    layout = parallel.layout(devices=jax.devices()[:devices])
    sampled = layout.rows(episodes())
    llama = models.Model(tiny.LLAMA, tiny.scalar(tiny.LLAMA), None, lambda: None)
    five, other, six = (
        layout.gather(scores.reward_models([one], EOS, layout=layout)(sampled)).score
        for one in (reward(5), llama, reward(6))
    )
    named = tuple((Path(str(n)), model) for n, model in enumerate((reward(5), llama, reward(6))))
    judges = scores.Models(named=named, costs=True, weighted=True, pessimism=0.0)
    rows = Rows([], lambda row, n: row, {}, Path(), lambda row, n: "")  # which no model reads
    monkeypatch.setattr(models, "stop_ids", lambda policy: (EOS,))
    found = layout.gather(scores.scorer(judges, None, rows, reward(0), layout)(sampled))
    np.testing.assert_allclose(found.scores, np.stack([five, other], axis=1), atol=1e-5)
    np.testing.assert_allclose(found.score, (five + other) / 2, atol=1e-5)
    np.testing.assert_allclose(found.cost, six, atol=1e-5)


@pytest.mark.slow
def test_an_ensemble_takes_its_disagreement_off_its_mean():
    sampled = parallel.shard(episodes())
    alone = [parallel.gather(scores.reward_models([reward(n)], EOS)(sampled)).score for n in (5, 6, 7)]
    found = parallel.gather(scores.reward_models([reward(n) for n in (5, 6, 7)], EOS, pessimism=0.5)(sampled))
    np.testing.assert_allclose(found.disagreement, np.std(alone, axis=0), atol=1e-5)
    np.testing.assert_allclose(found.score, np.mean(alone, axis=0) - 0.5 * np.std(alone, axis=0), atol=1e-5)
    found = tiny.arrays(found)
    metrics = updates.describe(found, found.score)
    np.testing.assert_allclose(metrics["reward/disagreement"], np.std(alone, axis=0).mean(), atol=1e-5)
    other = models.Model(tiny.LLAMA, tiny.scalar(tiny.LLAMA), None, lambda: None)
    with pytest.raises(InputError, match="differ in architecture"):
        scores.reward_models([reward(5), other], EOS)


def test_token_scores_are_rewards_where_they_stand():
    sampled = episodes()
    found = parallel.gather(scores.token_model(reward(5), EOS)(parallel.shard(sampled)))
    on = read(sampled)
    per_token = np.where(on, SCALAR(tiny.scalar(seed=5), sampled.tokens, on), 0)[:, P:]
    np.testing.assert_allclose(found.token_score, per_token, atol=1e-5)
    assert not found.score.any()
    ones = tiny.arrays(found.replace(value=np.zeros((16, N), np.float32)))
    cfg = ppo.Config(lam=1.0, whiten_advantages=None)
    batch, metrics = ppo.experience(ones, jnp.float32(0.0), cfg)
    np.testing.assert_allclose(batch.advantage, per_token[:, ::-1].cumsum(axis=1)[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(metrics["reward/total"], per_token.sum(axis=1).mean(), atol=1e-5)
    np.testing.assert_allclose(updates.response_score(ones, cfg), per_token.sum(axis=1), atol=1e-5)


def test_steps_have_rewards_where_they_are_over():
    """Every third token is a new line; the model is read before it."""
    sampled = episodes()
    marks = Marks(np.arange(31) % 3 == 0, (np.arange(31) % 3 == 0) | (np.arange(31) == EOS))
    found = parallel.gather(scores.token_model(reward(5), EOS, value="logarithm", marks=marks)(parallel.shard(sampled)))
    on = read(sampled)
    output = np.asarray(SCALAR(tiny.scalar(seed=5), sampled.tokens, on))[:, P:]
    over, column = steps.find(sampled.tokens[:, P:], on[:, P:], marks)
    expected = np.where(over, -np.log1p(np.exp(-np.take_along_axis(output, np.maximum(column, 0), axis=1))), 0)
    np.testing.assert_array_equal(found.step, over)
    np.testing.assert_allclose(found.token_score, expected, atol=1e-5)
    assert over.any() and (column[over] < np.broadcast_to(np.arange(N), over.shape)[over]).any()


def test_one_thing_alone_scores():
    for given, said in (
        (
            (lambda prompt, text: 1.0, judge.Config(model=Path("m"), rubric=Path("r"))),
            "a function of the text and judge would",
        ),
        (
            (None, judge.Config(model=Path("m"), rubric=Path("r")), scores.Process(model=Path("p"))),
            "judge and process would",
        ),
    ):
        source, judged, process = (*given, scores.Process())[:3]
        with pytest.raises(InputError, match=said):
            scores.other(source, judged, process, parallel.PMAP, models.Compute(), 0, ())
    with pytest.raises(InputError, match=r"process.at has no effect without a model"):
        scores.Process(at="token")


def test_a_function_sees_prompt_and_response(tmp_path):
    tok = tokenizer.train(["What is the film about ? It is about a fish ."] * 9, 300, tmp_path)
    answers = ["a fish", "It is about a film"] * 8
    ids = [[*tok(text).input_ids, tok.eos_token_id] for text in answers]
    width = max(map(len, ids))
    mask = np.arange(width) < np.array([[len(row)] for row in ids])
    tokens = np.array([row + [tok.pad_token_id] * (width - len(row)) for row in ids], np.int32)
    sampled = Rollout(
        tokens=np.pad(tokens, ((0, 0), (P, 0)), constant_values=5),
        mask=np.pad(mask, ((0, 0), (P, 0)), constant_values=True),
        response_mask=mask,
        logp=np.zeros(mask.shape, np.float32),
        logp_ref=np.zeros(mask.shape, np.float32),
        ended=np.ones(16, bool),
        index=np.arange(16, dtype=np.int32)[::-1].copy(),
    )
    seen = {}

    def function(prompt, response):
        seen[prompt] = response
        return float(len(response))

    rows = [{"prompt": f"p{n}"} for n in range(16)]
    found = parallel.gather(scores.text_function(function, rows, tok)(parallel.shard(sampled)))
    assert seen == {f"p{15 - n}": text for n, text in enumerate(answers)}
    np.testing.assert_array_equal(found.score, [len(text) for text in answers])
    on = sampled.replace(response_mask=np.ones_like(mask), mask=np.ones_like(sampled.mask))  # not stopped at its EOS
    junk = np.where(on.mask & ~sampled.mask, tok("fish").input_ids[0], sampled.tokens)
    found = parallel.gather(scores.text_function(function, rows, tok)(parallel.shard(on.replace(tokens=junk))))
    np.testing.assert_array_equal(found.score, [len(text) for text in answers])


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (-1.25, -1.25),
        (3, 3.0),
        (np.float64(0.3), 0.3),
        (np.int8(-7), -7.0),
        (np.array(2.5), 2.5),
        (jnp.float32(0.75), 0.75),
        (jnp.bfloat16(1.5), 1.5),
        (Fraction(1, 4), 0.25),
        (Decimal("0.1"), 0.1),
        (-3.4e38, -3.4e38),
    ],
)
def test_a_score_is_any_real_number(value, score):
    assert scores.score_text(lambda prompt, response: value, "p", "r") == score


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "nan"),
        (jnp.float32("inf"), "inf"),
        ("0.5", "'0.5'"),
        (True, "True"),
        (np.bool_(False), "False"),
        (1j, "1j"),
        (np.ones(2), "array"),
        (np.ones(1), "array"),
        (jnp.ones((2, 2)), "Array"),
        ([0.5], r"\[0.5\]"),
        ({}, "{}"),
        (1e39, r"1e\+39"),
        (10**400, "1000"),
        (Decimal("NaN"), "Decimal"),
        (object(), "<object object"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_score_that_is_no_number_is_named(value, shown):
    def exact_match(prompt, response):
        return value

    prompt = [{"role": "user", "content": "What is\nit about?"}]
    for function in (exact_match, functools.partial(exact_match)):
        with pytest.raises(InputError, match=shown) as error:
            scores.score_text(function, prompt, "a long\nanswer " * 20)
        message = str(error.value)
        assert "\n" not in message and len(message) < 400
        for part in (
            "exact_match returned ",
            r"'a long\nanswer a long",
            r"'What is\nit about?'",
            "expected one finite",
        ):
            assert part in message


def test_an_exception_of_a_score_function_says_of_which_response():
    def exact_match(prompt, response):
        raise {"key": KeyError, "input": InputError}[prompt](response)

    with pytest.raises(KeyError) as error:
        scores.score_text(exact_match, "key", "an answer")
    (note,) = error.value.__notes__
    assert "exact_match was to score the response 'an answer' to the prompt 'key'" in note
    with pytest.raises(InputError, match="exact_match: an answer, for the response 'an answer' to the prompt 'input'"):
        scores.score_text(exact_match, "input", "an answer")


def test_a_rollout_is_not_scored_by_what_is_no_number(tmp_path):
    tok = tokenizer.train(["a fish"] * 9, 300, tmp_path)
    sampled = episodes()
    rows = [{"prompt": f"p{n}"} for n in range(16)]
    source = scores.text_function(lambda prompt, response: None if prompt == "p3" else 1.0, rows, tok)
    with pytest.raises(InputError, match=r"<lambda> returned None for the response .* to the prompt 'p3'"):
        source(parallel.shard(sampled))
