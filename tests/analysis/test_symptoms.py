"""Each symptom is found in metrics that have it, and none in those of a run with nothing wrong."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from experiments import diagnose
from experiments.studies import symptoms as study
from rlhf_jax.analysis import symptoms
from rlhf_jax.analysis.symptoms import Course, Graded, findings
from rlhf_jax.devices.compute import Compute

ROOT = Path(__file__).parents[2]


def run(steps: int = 40, **ends: float) -> list[dict[str, Any]]:
    """A run of PPO as the quickstart's; a metric that is named goes straight to its end, by `__` for the slash."""
    rng = random.Random(0)
    course = {
        "kl/reference": (0.0, 0.45),
        "loss/policy": (0.0, 0.0),
        "loss/value": (0.7, 0.03),
        "policy/entropy": (0.6, 0.33),
        "ratio/first_error": (1e-6, 2e-6),
        "response/ended": (0.92, 0.98),
        "response/tokens": (8.5, 7.2),
        "reward/score": (0.0, 0.63),
        "seconds/generate": (0.07, 0.07),
        "seconds/score": (0.02, 0.02),
        "seconds/update": (0.27, 0.27),
        "value/explained_variance": (-1.0, 0.87),
    }
    course |= {name.replace("__", "/"): (course[name.replace("__", "/")][0], end) for name, end in ends.items()}
    rows = []
    for step in range(1, steps + 1):
        share = min(1.0, step / (0.5 * steps))
        rows.append({"step": step, "time": 0.0})
        for name, (start, end) in course.items():
            noise = 1 + rng.uniform(-0.05, 0.05) if abs(end) > 0.01 else 1
            rows[-1][name] = (start + (end - start) * share) * noise
    return rows


def named(rows: list[dict[str, Any]], *answers: Graded) -> list[str]:
    return [finding.name for finding in findings(Course(rows, answers))]


def test_nothing_is_said_of_a_run_with_nothing_wrong():
    assert named(run()) == named(run(steps=12)) == []


@pytest.mark.parametrize(
    ("ends", "symptom"),
    [
        ({"ratio__first_error": 0.01}, "The ratio is not 1 at the first step"),
        ({"kl__reference": -0.4}, "The KL is negative"),
        ({"kl__reference": 16.0}, "The KL explodes"),
        ({"policy__entropy": 0.01}, "The entropy collapses"),
        ({"response__tokens": 14.0}, "Answers grow"),
        ({"response__tokens": 1.5}, "Answers end at once"),
        ({"loss__value": 0.68, "value__explained_variance": 0.0}, "The value loss does not fall"),
        ({"seconds__generate": 1.0}, "Rollouts are slow"),
    ],
)
def test_a_symptom_is_found(ends: dict[str, float], symptom: str):
    assert named(run(**ends)) == [symptom]


def test_what_one_step_tells_is_found_in_a_run_of_one_step():
    assert named([run(1)[0] | {"loss/value": None}]) == ["The loss is NaN"]
    assert named([run(1)[0] | {"ratio/first_error": 0.2}]) == ["The ratio is not 1 at the first step"]
    for compute, error in ((Compute("bfloat16"), 0.05), (Compute(cache="int8"), 0.5), (Compute(rollout="int8"), 2.0)):
        assert findings(Course([run(1)[0] | {"ratio/first_error": error}], compute=compute)) == []
    assert named(run(steps=5, kl__reference=-0.4)) == []


def test_a_negative_kl_within_its_scatter_is_none():
    rng = random.Random(1)
    rows = [row | {"kl/reference": rng.gauss(0.0, 0.3)} for row in run()]
    assert named(rows) == []


def test_the_cause_comes_before_what_it_brings_on():
    ends = {"kl__reference": 16.0, "policy__entropy": 0.01, "loss__value": 0.7, "value__explained_variance": -1.0}
    assert named(run(**ends)) == ["The value loss does not fall", "The KL explodes", "The entropy collapses"]


def judged(accuracy: float) -> list[dict[str, Any]]:
    return [{"step": n, "time": 0.0, "loss/bradley_terry": 0.6, "reward/accuracy": accuracy} for n in range(1, 60)]


def test_reward_models():
    assert named(judged(0.72)) == []
    assert named(judged(0.51)) == ["The reward model is near chance"]
    long = [Graded(59, f"p{n}", score=float(k), length=k, rank=n % 3) for n in range(20) for k in range(4)]
    fair = [Graded(59, f"p{n}", score=float((k * (n % 5)) % 4), length=k, rank=k) for n in range(20) for k in range(4)]
    assert named(judged(0.72), *long) == ["The reward model prefers length"]
    assert named(judged(0.72), *fair) == named(judged(0.72), *long[:8]) == []


def test_reward_up_and_gold_down():
    def answers(step: int, score: float, gold: float) -> list[Graded]:
        return [Graded(step, f"p{n}", score + 0.01 * n, 7, gold=gold + 0.02 * (n % 3)) for n in range(12)]

    rise, fall = answers(1, 0.0, 0.5) + answers(20, 0.5, 0.8), answers(40, 0.9, 0.4)
    assert named(run(), *rise) == named(run(), *rise, *answers(40, 0.9, 0.8)) == []
    assert named(run(), *rise, *fall) == ["Reward up, gold down"]
    assert named(run(), *rise, *answers(40, 0.2, 0.4)) == ["Reward up, gold down"]  # up since step 1 at least
    assert named(run(), *answers(1, 0.5, 0.8), *answers(40, 0.1, 0.4)) == []  # the score is down too


def test_pretraining():
    losses = lambda end: [
        {"step": n, "time": 0.0, "loss/next_token": 7.0 + (end - 7.0) * n / 100 + 0.05 * math.sin(n)}
        for n in range(1, 101)
    ]
    assert named(losses(3.0)) == []
    assert named(losses(7.0)) == ["The loss does not fall"]


def test_a_start_that_is_high_by_chance_is_no_fall():
    """Nearly all losses that are noise alone are told, and nearly none that fall by as much as the noise."""

    def losses(seed: int, fall: float) -> list[dict[str, float]]:
        rng = random.Random(seed)
        return [
            {"step": n, "time": 0.0, "loss/next_token": rng.gauss(7.0 - fall * n / 800, 0.1)} for n in range(1, 801)
        ]

    assert sum(named(losses(seed, 0.0)) == ["The loss does not fall"] for seed in range(100)) >= 95
    assert sum(named(losses(seed, 0.1)) == [] for seed in range(100)) >= 95


def test_the_command_links_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps(row) for row in run(kl__reference=16.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert diagnose.main(diagnose.Config(run=tmp_path)) == {"symptoms": ["The KL explodes"]}
    said = capsys.readouterr().out
    assert "kl/reference ends at 1" in said and "docs/troubleshooting.md#the-kl-explodes" in said


def test_every_symptom_has_its_section():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    missing = [name for name in symptoms.CHECKS if f"\n## {name}\n" not in page]
    assert not missing
    assert symptoms.anchor("Reward up, gold down") == "reward-up-gold-down"


def test_the_study_draws_metrics_and_what_answers_are_worth():
    watched = [(5, 0.5), (5, 0.0), (1, 1.0), (1, 0.5)]  # step and gold
    answers = [Graded(step, prompt="p", score=float(step), length=3, gold=gold) for step, gold in watched]
    course = Course(metrics=[{"step": 1, "a": 0.5}, {"step": 2}, {"step": 3, "a": None}], answers=answers)
    assert study.points(course, "a") == [(1, 0.5)]
    assert study.points(course, "score") == [(1, 1.0), (5, 5.0)]
    assert study.points(course, "gold") == [(1, 0.75), (5, 0.25)]


def test_each_planted_symptom_is_one_that_diagnose_knows():
    planted = {name: symptom for name, (symptom, _) in study.RUNS.items() if symptom}
    assert set(planted.values()) == set(symptoms.CHECKS)
    assert set(study.TOLD_BY) | {"nan", "ratio", "length"} == set(planted)
    assert {*study.HEALTHY.values(), "healthy-1"} <= study.RUNS.keys() - planted.keys()
