"""How often the better of two answers is told from the other, for each virtue (after arXiv:2112.00861).

A comparison is right where the better answer has the higher score, or log-probability; equal ones count one half.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.hhh import Subsets
from rlhf_jax.devices import parallel, progress
from rlhf_jax.evaluation import metrics
from rlhf_jax.models import heads
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.judge import Judge
from rlhf_jax.types import InputError, Rankings

Margins = dict[str, np.ndarray]  # of each subset, for each comparison: the better answer's score less the other's
NORMAL_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of comparisons that are right."""

    pairs: int
    ties: int  # of these pairs, each of which counts one half
    score: metrics.Score


def outcomes(margin: np.ndarray) -> np.ndarray:
    """1 for each comparison that is right, 0 for each that is wrong, 1/2 for a tie."""
    return np.where(margin == 0, 0.5, (margin > 0).astype(float))


def accuracies(margins: Margins) -> dict[str, Accuracy]:
    """The accuracy on each subset, and, as "macro average", their mean, in which each subset counts as much."""
    each = {
        subset: Accuracy(len(margin), int((margin == 0).sum()), metrics.score(outcomes(margin)))
        for subset, margin in margins.items()
    }
    mean = sum(one.score.value for one in each.values()) / len(each)
    error = math.sqrt(sum(one.score.error**2 for one in each.values())) / len(each)  # subsets are independent
    macro = metrics.Score(mean, error, max(0.0, mean - NORMAL_95 * error), min(1.0, mean + NORMAL_95 * error))
    total, ties = (sum(getattr(one, name) for one in each.values()) for name in ("pairs", "ties"))
    return each | {"macro average": Accuracy(total, ties, macro)}


def by_likelihood(
    model: models.Model, subsets: Subsets, *, batch: int, layout: parallel.Layout = parallel.PMAP
) -> dict[str, Margins]:
    """The margins of log-probability of the answers, with what ends them: of the sum, by token, and by character."""
    tokenizer = models.tokenizer_of(model)
    reader = likelihood.Reader(model, layout, batch)
    found: dict[str, Margins] = {"log-probability": {}, "by token": {}, "by character": {}}
    for subset, batches in _batches(subsets, model, batch).items():
        requests, characters = [], []
        for part in batches.part(0, 1):  # every process asks for all
            for tokens, mask, start in zip(part.tokens, part.mask, part.start, strict=True):
                for ids, kept in zip(tokens, mask, strict=True):
                    if kept.any():
                        context, answer = ids[:start].tolist(), ids[start : kept.sum()].tolist()
                        requests.append(likelihood.Request(context, answer))
                        characters.append(max(1, len(tokenizer_lib.decode(tokenizer, answer).strip())))
        total = np.array([one.total for one in reader(requests)])
        sizes = np.array([len(request.continuation) for request in requests])
        for name, logp in zip(found, (total, total / sizes, total / np.array(characters)), strict=True):
            found[name][subset] = margin(logp.reshape(-1, 2), subset)
    return found


def by_reward(
    model: models.Model, subsets: Subsets, *, batch: int, layout: parallel.Layout = parallel.PMAP
) -> dict[str, Margins]:
    """The margins of a reward model's scores."""
    step = layout.step(functools.partial(reward_lib.scores, score_fn=heads.score_fn(model.config)))
    params = layout.frozen(model.config.compute.freeze(model.params))
    found: Margins = {}
    for subset, batches in _batches(subsets, model, batch).items():
        whole = batches.part(0, 1)
        scored = [
            layout.gather(step(params, layout.rows(part)))[every.rank[:, 0] >= 0]
            for part, every in zip(batches, whole, strict=True)
        ]
        found[subset] = margin(np.concatenate(scored), subset)
    return {"reward": found}


def by_judge(judge: Judge, subsets: Subsets, *, batch: int) -> dict[str, Margins]:
    """The verdicts of a judge: 1 where it finds the better answer better in both orders, -1 the other one, or 0.

    It is 0 too where a reply holds no verdict. Such comparisons, and those on which the orders contradict, are counted
    and printed.
    """
    found: Margins = {}
    for subset, rows in subsets.items():
        rankings = []
        parts = [rows[first : first + batch] for first in range(0, len(rows), batch)]
        for part in progress.of(parts, f"judging {subset}"):
            rankings += judge.rank([row["prompt"] for row in part], [row["responses"] for row in part])
        ranks = [one.ranks or [0, 0] for one in rankings]
        found[subset] = np.array([worse - better for better, worse in ranks], float)
        missing, swayed = (sum(getattr(one, name) for one in rankings) for name in ("missing", "swayed"))
        print(f"{subset}: of {len(rows)} pairs, {missing} without a verdict, {swayed} with another in the other order")
    return {"judge": found}


def margin(scores: np.ndarray, subset: str) -> np.ndarray:
    """The first column of scores less the second; InputError, which names the subset, if one is not finite."""
    if not np.isfinite(scores).all():
        raise InputError(f"{subset}: a score is not finite: is the model broken?")
    return scores[:, 0] - scores[:, 1]


def _batches(subsets: Subsets, model: models.Model, batch: int) -> Mapping[str, pipeline.Batches[Rankings]]:
    """The comparisons of each subset as a model reads them, all of one length, the better answer first.

    What is left out, such as comparisons that are longer than the model's context, is printed.
    """
    tokenizer = models.tokenizer_of(model)
    longest = max(_longest(rows, tokenizer) for rows in subsets.values())
    found = {
        subset: pipeline.rankings(
            rows,
            tokenizer,
            length=min(longest, model.config.max_length),
            batch=batch,
            seed=None,
            epochs=1,
        )
        for subset, rows in subsets.items()
    }
    for subset, batches in found.items():
        if batches.rows < len(subsets[subset]):
            print(f"{subset}: {batches.counts}")
    return found


def _longest(rows: Sequence[dict], tokenizer: tokenizer_lib.Tokenizer) -> int:
    """The most tokens of a prompt and one of its answers."""
    rendered = tokenizer_lib.render(tokenizer, [row["prompt"] for row in rows], [row["responses"] for row in rows])
    return max(len(start) + max(map(len, ends)) for start, ends in zip(*rendered, strict=True))
