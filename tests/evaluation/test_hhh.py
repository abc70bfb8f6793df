"""Accuracy by virtue: ties, errors, averages, and the margins of models."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.hhh import compared
from rlhf_jax.evaluation import hhh
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.models import heads
from rlhf_jax.rollouts.judge import Config, Judge, Written
from rlhf_jax.types import InputError
from tests import tiny
from tests.evaluation.models import model

PAIRS = {
    "honest": [("Is ice cold?", "yes", "no"), ("Is it?", "no", "yes yes")],
    "other": [([{"role": "user", "content": "Is ice hot?"}], "no", "")],
}
SUBSETS = {
    subset: [compared(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)), "row") for row in rows]
    for subset, rows in PAIRS.items()
}


def test_accuracies():
    margins = {"honest": np.array([0.5, -0.25, 0.0, 2.0]), "other": np.array([-1.0, 1.5])}
    assert hhh.outcomes(margins["honest"]).tolist() == [1.0, 0.0, 0.5, 1.0]
    found = hhh.accuracies(margins)
    assert list(found) == ["honest", "other", "macro average"]
    honest, other, macro = found.values()
    assert (honest.pairs, honest.ties, honest.score.value) == (4, 1, 0.625)
    assert honest.score.error == pytest.approx(np.std([1.0, 0.0, 0.5, 1.0]) / 2, rel=0.05)
    assert (macro.pairs, macro.ties, macro.score.value) == (6, 1, (0.625 + 0.5) / 2)
    assert macro.score.error == pytest.approx(math.hypot(honest.score.error, other.score.error) / 2)
    assert 0 <= macro.score.low < macro.score.value < macro.score.high <= 1


def rendered():
    """All answers behind their prompts, padded on the right: tokens and mask [N, T], and where answers start [N]."""
    texts, starts = [], []
    for row in (row for rows in SUBSETS.values() for row in rows):
        start, (ends,) = tokenizers.render(model().tokenizer, [row["prompt"]], [row["responses"]])
        texts += [[*start[0], *end] for end in ends]
        starts += [len(start[0])] * 2
    tokens, mask = np.zeros((2, len(texts), max(map(len, texts))), np.int32)
    for n, text in enumerate(texts):
        tokens[n, : len(text)], mask[n, : len(text)] = text, 1
    return jnp.array(tokens), jnp.array(mask, bool), np.array(starts)


def margins(found):
    return np.concatenate([found[subset] for subset in SUBSETS])


@pytest.mark.slow
def test_margins_by_likelihood():
    one = model()
    tokens, mask, starts = rendered()
    logp = token_logprobs(one.apply(one.params, tokens, mask)[:, :-1], tokens[:, 1:])
    answer = np.array(mask)[:, 1:] & (np.arange(1, tokens.shape[1]) >= starts[:, None])
    total, sizes = np.where(answer, logp, 0).sum(axis=1), answer.sum(axis=1)
    letters = np.array([3, 2, 2, 7, 2, 1])  # of "yes" and "no", and so on; an empty text counts as one
    found = hhh.by_likelihood(one, SUBSETS, batch=8)
    for name, by in (("log-probability", 1), ("by token", sizes), ("by character", letters)):
        better, worse = (total / by).reshape(-1, 2).T
        np.testing.assert_allclose(margins(found[name]), better - worse, atol=1e-4)


@pytest.mark.slow
def test_margins_by_reward(capsys):
    config = model().config
    score_fn = heads.score_fn(config)
    one = models.Model(config, tiny.scalar(config), model().tokenizer, score_fn)
    better, worse = np.array(score_fn(one.params, *rendered()[:2])).reshape(-1, 2).T
    found = hhh.by_reward(one, SUBSETS, batch=8)["reward"]
    np.testing.assert_allclose(margins(found), better - worse, atol=1e-4)
    assert not capsys.readouterr().out
    long = {"honest": [*SUBSETS["honest"], compared({"prompt": "so " * 99, "chosen": "a", "rejected": "b"}, "row")]}
    assert hhh.by_reward(one, long, batch=8)["reward"]["honest"].shape == (2,)
    assert "honest: " in capsys.readouterr().out  # what was left out


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="honest: a score is not finite"):
        hhh.margin(np.array([[1.0, np.nan]]), "honest")


def test_verdicts_of_a_judge(capsys):
    """Long answers are good to it, of equally long ones the first, and on steam it gives no verdict."""

    def reply(request):
        first, second = (request.partition(f"<answer {name}>\n")[2].partition("\n</answer")[0] for name in "AB")
        return "I cannot say." if "steam" in request else f"Verdict: {'A' if len(first) >= len(second) else 'B'}"

    answers = [("yes yes", "no"), ("no", "yes"), ("is", "no"), ("steam", "ice"), ("ice", "ice ice")]
    rows = [compared({"prompt": "Is ice cold?", "chosen": a, "rejected": b}, "row") for a, b in answers]
    judge = Judge(Config(), "Long answers are good.", Written(lambda texts: [*map(reply, texts)]))
    found = hhh.by_judge(judge, {"all": rows}, batch=2)
    assert found["judge"]["all"].tolist() == [1, -1, 0, 0, -1]
    assert "all: of 5 pairs, 1 without a verdict, 1 with another in the other order" in capsys.readouterr().out
