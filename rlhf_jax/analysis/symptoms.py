"""The symptoms of training that goes wrong, as a run's own metrics tell them.

docs/troubleshooting.md has the causes of each.

A check compares the means of a metric at the beginning of the run and at its end. Its bounds are far from what healthy
runs of the assistant world do. The checks are in the order in which one fault causes another: the first symptom that is
found is the one to begin with.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.devices.compute import Compute

FEWEST = 10  # steps of a run below which only faults of a single step are told


@dataclasses.dataclass(frozen=True)
class Finding:
    """A symptom that a run has."""

    name: str  # as the heading in docs/troubleshooting.md
    evidence: str  # what the metrics say, with numbers


@dataclasses.dataclass(frozen=True)
class Graded:
    """An answer whose worth is known: of a policy, or among the ranked ones of a reward model."""

    step: int
    prompt: str  # which tells one ranking from another too
    score: float  # of the reward model
    length: int  # in tokens
    gold: float | None = None  # worth in the world, where it is the world's
    rank: int | None = None  # by people: smaller is better


@dataclasses.dataclass(frozen=True)
class Course:
    """The records of a run."""

    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    answers: Sequence[Graded] = ()
    compute: Compute = Compute()  # how the run computed

    def values(self, name: str) -> np.ndarray:
        """A metric at the steps that have it."""
        return np.array([row[name] for row in self.metrics if row.get(name) is not None], float)

    def start(self, name: str) -> float:
        """The mean over the first twentieth of the steps; NaN without any."""
        values = self.values(name)
        return float(np.mean(values[: max(1, len(values) // 20)])) if len(values) else math.nan

    def end(self, name: str) -> float:
        """The mean over the last fifth of the steps, three at least; NaN without any."""
        values = self.values(name)
        return float(np.mean(values[-max(3, len(values) // 5) :])) if len(values) else math.nan

    def error(self, name: str) -> float:
        """The standard error of `end`."""
        values = self.values(name)[-max(3, len(self.values(name)) // 5) :]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def not_finite(course: Course) -> str | None:
    """A loss or gradient norm that is not finite, which a line of metrics has as null."""
    for row in course.metrics:
        for name, value in row.items():
            if value is None and name.startswith(("loss/", "grad_norm")):
                return f"{name} is no finite number at step {row['step']}"
    return None


def ratio_not_one(course: Course) -> str | None:
    """The policy that trains is not the one that sampled, before any update."""
    errors, most = course.values("ratio/first_error"), course.compute.ratio_error
    if not len(errors) or errors.max() <= most:
        return None
    return f"ratio/first_error is {errors.max():.2g}, where rounding causes {most:g} at most"


def negative_kl(course: Course) -> str | None:
    """A KL that its own scatter does not explain cannot be negative."""
    end, error = course.end("kl/reference"), course.error("kl/reference")
    return f"kl/reference ends at {end:.2f} nats an answer" if end < -0.05 - 3 * error else None


def near_chance(course: Course) -> str | None:
    """A reward model that has learnt nothing of the rankings."""
    end = course.end("reward/accuracy")
    return f"reward/accuracy ends at {100 * end:.0f} %, where chance has 50 %" if end < 0.57 else None


def prefers_length(course: Course) -> str | None:
    """A reward model that scores the longer of two answers higher, nearly whatever they say."""
    pairs = [
        (a.length > b.length, a.score > b.score)
        for a in course.answers
        for b in course.answers
        if a.rank is not None and b.rank is not None and a.prompt == b.prompt and a.length > b.length
    ]
    if len(pairs) < 50:
        return None
    share = float(np.mean([scored for _, scored in pairs]))
    return (
        f"it scores the longer of two answers higher in {100 * share:.0f} % of {len(pairs)} pairs"
        if share > 0.8
        else None
    )


def loss_not_falling(course: Course) -> str | None:
    """Pretraining or fine-tuning that learns nothing."""
    values = course.values("loss/next_token")
    start, end = course.start("loss/next_token"), course.end("loss/next_token")
    # The error of the fall: `start` is the mean of a quarter as many steps as `end`.
    error = math.sqrt(5) * course.error("loss/next_token")
    if len(values) < 50 or not end > start - 2 * error:
        return None
    return f"loss/next_token begins at {start:.3f} and ends at {end:.3f}"


def value_not_falling(course: Course) -> str | None:
    """A critic that does not learn to predict the reward."""
    explained = course.end("value/explained_variance")
    start, end = course.start("loss/value"), course.end("loss/value")
    if not (explained < 0.1 and end > 0.5 * start):
        return None
    return f"loss/value goes from {start:.3g} to {end:.3g}, value/explained_variance ends at {explained:.2f}"


def ends_at_once(course: Course) -> str | None:
    """Answers that shrink to next to nothing."""
    start, end = course.start("response/tokens"), course.end("response/tokens")
    if not end < max(2.0, 0.65 * start):
        return None
    return f"response/tokens goes from {start:.1f} to {end:.1f}"


def answers_grow(course: Course) -> str | None:
    """Answers that grow, up to where they are cut off."""
    start, end = course.start("response/tokens"), course.end("response/tokens")
    if not end > 1.4 * start:
        return None
    ended = f"; {100 * course.end('response/ended'):.0f} % end by themselves"
    return f"response/tokens goes from {start:.1f} to {end:.1f}{ended}"


def entropy_collapse(course: Course) -> str | None:
    """A policy that always says the same."""
    start, end = course.start("policy/entropy"), course.end("policy/entropy")
    if not end < 0.15 * start:
        return None
    return f"policy/entropy goes from {start:.3f} to {end:.3f} nats a token"


def exploding_kl(course: Course) -> str | None:
    """A policy that has left the reference behind."""
    end, tokens = course.end("kl/reference"), course.end("response/tokens")
    if not end > 1.5 * tokens:
        return None
    return f"kl/reference ends at {end:.1f} nats an answer, {end / tokens:.2f} a token"


def gold_down(course: Course) -> str | None:
    """Answers to the same prompts that the reward model scores higher than before, and that are worth less."""
    by_step: dict[int, dict[str, list[Graded]]] = {}
    for answer in course.answers:
        if answer.gold is not None:
            by_step.setdefault(answer.step, {}).setdefault(answer.prompt, []).append(answer)
    if len(by_step) < 2:
        return None
    last = max(by_step)
    for step in sorted(by_step.keys() - {last}):
        shared = sorted(by_step[step].keys() & by_step[last].keys())
        if len(shared) < 8:
            continue
        mean = lambda answers, name: float(np.mean([getattr(answer, name) for answer in answers]))
        gains = {
            name: np.array([mean(by_step[last][x], name) - mean(by_step[step][x], name) for x in shared])
            for name in ("score", "gold")
        }
        errors = {name: x.std(ddof=1) / math.sqrt(len(x)) for name, x in gains.items()}
        if gains["score"].mean() > 2 * errors["score"] and gains["gold"].mean() < -3 * errors["gold"]:
            score, gold = (f"{gains[name].mean():+.2f}" for name in ("score", "gold"))
            return f"from step {step} to {last} the score of {len(shared)} prompts changes by {score}, gold by {gold}"
    return None


def slow_rollouts(course: Course) -> str | None:
    """Devices that spend most of a step on what is not the update."""
    parts = {name: course.values(f"seconds/{name}") for name in ("generate", "score", "host", "update")}
    middle = {name: float(np.median(x)) for name, x in parts.items() if len(x)}
    if "update" not in middle or not (total := sum(middle.values())):
        return None
    for name, what in {"generate": "sampling", "score": "scoring", "host": "waiting for the host"}.items():
        if middle.get(name, 0.0) > 0.6 * total:
            return f"{what} takes {100 * middle[name] / total:.0f} % of a step of {total:.2f} s"
    return None


# In the order in which one brings on another: faults of the code, of the reward model, of the critic, of the policy.
CHECKS: dict[str, Callable[[Course], str | None]] = {
    "The loss is NaN": not_finite,
    "The ratio is not 1 at the first step": ratio_not_one,
    "The KL is negative": negative_kl,
    "The reward model is near chance": near_chance,
    "The reward model prefers length": prefers_length,
    "The loss does not fall": loss_not_falling,
    "The value loss does not fall": value_not_falling,
    "Answers end at once": ends_at_once,
    "The KL explodes": exploding_kl,
    "Answers grow": answers_grow,
    "The entropy collapses": entropy_collapse,
    "Reward up, gold down": gold_down,
    "Rollouts are slow": slow_rollouts,
}
AT_ONCE = (not_finite, ratio_not_one)  # what one step is enough to tell


def findings(course: Course) -> list[Finding]:
    """The symptoms of a run, the one to begin with first."""
    checks = CHECKS if len(course.metrics) >= FEWEST else {n: check for n, check in CHECKS.items() if check in AT_ONCE}
    return [Finding(name, said) for name, check in checks.items() if (said := check(course)) is not None]


def anchor(name: str) -> str:
    """The heading of this name as the end of a link."""
    return "".join(x for x in name.lower().replace(" ", "-") if x.isalnum() or x == "-")
