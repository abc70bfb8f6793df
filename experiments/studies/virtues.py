"""Helpful against harmless: which policies lie on the frontier, by weights and by a constraint?

Users of the assistant world also ask for help to do harm. Who rates an answer as helpful wants it given; who rates it
as harmless does not. Two reward models learn from these ratings, and a cost model from the second. PPO maximises a
weighted sum of the two rewards, once for each weight; or the first alone, while the mean cost stays below a threshold,
once for each threshold (Safe RLHF, arXiv:2310.12773).

Run:     python -m experiments.studies.virtues
Parent:  rank, reward, ppo
Result:  docs/virtues.md
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np

from experiments import ppo, reward
from experiments.studies import courses, study, tables
from rlhf_jax import runs
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.algorithms import rewards as rewards_lib
from rlhf_jax.runs import cli, log, plots
from rlhf_jax.settings import Count, NonNegative, Unbounded
from rlhf_jax.types import Virtue

NAME = "virtues"
MEASURES = {
    "helpful": "helpful, as users rate it",
    "harmless": "harmless, where harm is asked for",
    "gold": "gold",
    "kl": "KL (nats)",
}
CONSTRAINT = rewards_lib.Config(threshold=0.0, multiplier=0.2, multiplier_lr=1.0)

Threshold = Annotated[float, Unbounded("costs have either sign")]


# The type of the stage is quoted: by the time it was evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Sizes with which one seed takes two CPU cores some minutes."""

    weights: tuple[NonNegative, ...] = (0.0, 0.25, 0.5, 1.0)  # of harmless, beside a weight of 1 of helpful
    thresholds: tuple[Threshold, ...] = (-2.4, -2.7, -3.0)  # bounds of the mean cost
    prompts: Count = 800  # prompts whose answers are ranked and rated, a seed
    answered: Count = 512  # prompts with which a policy is measured
    ppo: "ppo.Config" = ppo.Config(
        steps=40, text=None, algorithm=ppo_lib.Config(minibatches=4, kl_coef=0.2, unfinished_score=-1.0)
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy, or the fine-tuned model, that is to be measured by its answers."""

    out: Path
    run: ppo.Config
    model: Path
    prompts: int


def main(cfg: Config) -> dict[str, list[dict[str, float]]]:
    """Run what has not been run, then write table and plot; returns the measures of each policy and seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    study.fine_tune(cfg)
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {name: [found[name] for found in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def run_seed(cfg: Config, seed: int) -> dict[str, dict[str, float]]:
    """Learn the models of each virtue from the ratings of a seed, then train and measure each policy."""
    helpful = learn(cfg, seed, "helpful")
    harmless = learn(cfg, seed, "harmless")
    cost = learn(cfg, seed, "harmless", reward_lib.Config(loss="cost"))
    home = cfg.out / f"seed{seed}"
    start = study.ppo_run(cfg, seed, helpful, home / "virtues-start")
    results = {"SFT": runs.once(measure, Measured(start.out, start, start.init, cfg.answered))}
    for name, run in policies(cfg, study.ppo_run(cfg, seed, helpful, home), harmless, cost):
        runs.once(ppo.main, run)
        trained = Measured(run.out / "answers", run, run.out / "model", cfg.answered)
        results[name] = runs.once(measure, trained) | last_multiplier(run.out)
    return results


def policies(cfg: Config, helpful: ppo.Config, harmless: Path, cost: Path) -> Iterator[tuple[str, ppo.Config]]:
    """The name and the configuration of each policy, from that of one which maximises helpful alone."""
    for weight in cfg.weights:
        yield (
            f"weight {weight:g}",
            dataclasses.replace(
                helpful,
                out=helpful.out / f"weight-{weight:g}",
                reward=(*helpful.reward, harmless),
                algorithm=dataclasses.replace(helpful.algorithm, rewards=rewards_lib.Config(weights=(1.0, weight))),
            ),
        )
    for threshold in cfg.thresholds:
        constraint = dataclasses.replace(CONSTRAINT, threshold=threshold)
        yield (
            f"cost at most {threshold:g}",
            dataclasses.replace(
                helpful,
                out=helpful.out / f"threshold{threshold:g}",
                cost=cost,
                algorithm=dataclasses.replace(helpful.algorithm, rewards=constraint),
            ),
        )


def learn(cfg: Config, seed: int, virtue: Virtue, algorithm: reward_lib.Config | None = None) -> Path:
    """The model that learns from the ratings of a virtue; with `algorithm`, by that loss."""
    ranked = study.rank_answers(cfg, seed)
    algorithm = algorithm or cfg.reward.algorithm
    run = cli.hand_down(
        "reward",
        dataclasses.replace(cfg.reward, virtue=virtue, algorithm=algorithm),
        study.shared_settings(cfg, seed),
        out=cfg.out / f"seed{seed}" / f"{virtue}-{algorithm.loss}",
        init=study.fine_tune(cfg),
        data=str(ranked / "train.jsonl"),
        held_out=str(ranked / "held_out.jsonl"),
    )
    runs.once(reward.main, run)
    return run.out / "model"


def measure(measured: Measured) -> dict[str, float]:
    """How helpful, harmless and good a model's answers are, and how far it is from where it started.

    Helpful is the mean over all prompts, harmless that over the prompts that ask for harm.
    """
    answers = courses.answers(measured.run, measured.model, measured.prompts)
    virtues = [courses.WORLD.virtues(prompt, text) for prompt, text in answers.texts]
    harm = [courses.WORLD.parse(prompt).category == "harm" for prompt, _ in answers.texts]
    sampled = answers.sampled
    ratio = np.where(sampled.response_mask, sampled.logp - sampled.logp_ref, 0.0)
    return {
        "helpful": float(np.mean([one["helpful"] for one in virtues])),
        "harmless": float(np.mean([one["harmless"] for one, asked in zip(virtues, harm, strict=True) if asked])),
        "gold": float(np.mean([courses.gold_score(*pair) for pair in answers.texts])),
        "kl": float(np.sum(ratio, axis=1).mean()) if measured.model != measured.run.init else 0.0,
    }


def last_multiplier(run: Path) -> dict[str, float]:
    """The mean cost and the multiplier of the last quarter of a run, if it had a constraint."""
    rows = log.read(run)
    rows = rows[-max(len(rows) // 4, 1) :]
    names = {"cost": "cost/mean", "multiplier": "cost/multiplier"}
    return {short: float(np.mean([row[name] for row in rows])) for short, name in names.items() if name in rows[-1]}


def report(cfg: Config, results: dict[str, list[dict[str, float]]]) -> None:
    """Publish a row for each policy, and helpful over harmless."""
    extra = {"cost": "mean cost", "multiplier": "multiplier"}
    rows = []
    for name, seeds in results.items():
        cells = [tables.mean_sd([one[measure] for one in seeds]) for measure in MEASURES]
        cells += [tables.mean_sd([one[measure] for one in seeds]) if measure in seeds[0] else "-" for measure in extra]
        rows.append([name, *cells])
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, seeds in results.items():
        family = "SFT" if name == "SFT" else "weights" if name.startswith("weight") else "constraint"
        place = tuple(float(np.mean([one[measure] for one in seeds])) for measure in ("harmless", "helpful"))
        lines.setdefault(family, []).append((place[0], place[1]))
    draw = functools.partial(
        plots.lines, panels={MEASURES["helpful"]: lines}, x="harmless answers, of prompts that ask for harm"
    )
    study.publish(cfg, NAME, tables.markdown(["policy", *MEASURES.values(), *extra.values()], rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
