"""How far can a reward model be followed? Gold against distance, after Gao et al. 2022 (arXiv:2210.10760).

Reward models that learnt from fewer labels, or are smaller, are maximised by PPO without a KL penalty and by best-of-n.
Gold is what each answer is worth (rlhf_jax/data/world.py); the proxy is the reward model's score. Distance d is the
square root of the KL from the fine-tuned model. The curves of the paper are fitted to the gain in gold.

Run:     python -m experiments.studies.overoptimization
Parent:  rank, reward, ppo
Result:  docs/overoptimization.md
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import ppo
from experiments.studies import study
from rlhf_jax import runs
from rlhf_jax.algorithms import best_of_n
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.analysis import overoptimization
from rlhf_jax.runs import cli, plots
from rlhf_jax.types import InputError, check_positive

NAME = "overoptimization"
MEASURES = {"gold": "gold (0 to 1)", "proxy": "proxy (sd of answers)"}


# The type of the stage is quoted: by the time it was evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Following(study.Config):
    """Settings of reward models that are followed without restraint: no KL penalty, no pretraining text."""

    answers: int = 32  # to each prompt, of which best-of-n takes n at most
    answered: int = 192  # prompts of best-of-n
    ppo: "ppo.Config" = ppo.Config(
        steps=40,
        text=None,
        ppo=ppo_lib.Config(minibatches=4, kl_coef=0.0, unfinished_score=-1.0),
        samples_every=1,  # and as many as there are, so that gold is known along the run
        samples=64,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "answers", "answered")


@dataclasses.dataclass(frozen=True)
class Config(Following):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    labels: tuple[int, ...] = (100, 400)  # prompts to learn from, beside all
    epochs: tuple[int, ...] = (4, 2)  # passes over each of them: few labels shall not mean few steps alone
    sizes: tuple[str, ...] = ("llama-micro", "llama-tiny")  # presets of smaller reward models, with all labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.epochs) != len(self.labels):
            raise InputError(f"epochs={self.epochs}: expected a number for each of labels={self.labels}")
        if self.labels and max(self.labels) >= self.prompts:
            raise InputError(f"labels={self.labels}: expected fewer than the {self.prompts} of --prompts")


@dataclasses.dataclass(frozen=True)
class Pick:
    """Best-of-n of the model that `run` starts from, by its reward model."""

    out: Path
    run: ppo.Config
    prompts: int
    answers: int  # to each, so n at most


@dataclasses.dataclass(frozen=True)
class Start:
    """The model that `run` starts from."""

    out: Path
    run: ppo.Config
    prompts: int


def main(cfg: Config) -> dict[str, Any]:
    """Run what has not been run, then write table and plot; returns the points of each seed and reward model."""
    study.page(cfg, NAME)
    study.together(cfg, study.tuned, (cfg.pretrain.preset, *cfg.sizes))
    seeds = study.together(cfg, of_seed, range(cfg.seeds))
    results = {name: [found[name] for found in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def of_seed(cfg: Config, seed: int) -> dict[str, dict[str, Any]]:
    """What each reward model of a seed is worth, and where best-of-n and PPO go that follow it."""
    found = {name: study.judge(cfg, seed, **settings) for name, settings in judges(cfg).items()}
    return {
        "accuracy": {name: one["accuracy"] for name, one in found.items()},
        "best_of_n": {name: best_of_n_course(cfg, seed, one["model"]) for name, one in found.items()},
        "ppo": {name: ppo_course(cfg, seed, one["model"]) for name, one in found.items()},
    }


def judges(cfg: Config) -> dict[str, dict[str, Any]]:
    """The reward models by name, with what sets each apart."""
    fewer = {f"{n} prompts": {"prompts": n, "epochs": e} for n, e in zip(cfg.labels, cfg.epochs, strict=True)}
    smaller = {f"{cfg.prompts} prompts, {size}": {"preset": size} for size in cfg.sizes}
    return fewer | {f"{cfg.prompts} prompts": {}} | smaller


def ppo_course(cfg: Following, seed: int, judge: Path) -> list[study.Point]:
    """Where PPO goes, from the model that it starts from."""
    home = cfg.out / f"seed{seed}"
    out = home / f"ppo-{judge.parent.name}"
    run = cli.hand_down("ppo", cfg.ppo, out=out, **study.policy(cfg, seed, judge))
    runs.once(ppo.main, run)
    start = runs.once(started, Start(out / "start", run, 8 * cfg.answered))
    return [start, *study.course(out)]


def started(start: Start) -> study.Point:
    """Its place, by many samples: every gain is counted from here."""
    scored, gold = study.answers(start.run, start.run.init, start.prompts)
    return {"kl": 0.0, "gold": float(gold.mean()), "proxy": float(scored.score.mean())}


def best_of_n_course(cfg: Following, seed: int, judge: Path) -> list[study.Point]:
    """The best of 1, 2, 4, .. `cfg.answers` answers. Their KL is a bound where answers are alike."""
    out = cfg.out / f"seed{seed}" / f"best-of-n-{judge.parent.name}"
    run = cli.hand_down("ppo", cfg.ppo, out=out, **study.policy(cfg, seed, judge))
    return runs.once(picked, Pick(out, run, cfg.answered, cfg.answers))["points"]


def picked(pick: Pick) -> dict[str, list[study.Point]]:
    """See `best_of_n_course`."""
    scored, gold = study.answers(pick.run, pick.run.init, pick.prompts, pick.answers)
    by, proxy, worth = (x.reshape(-1, pick.answers) for x in (best_of_n.selection_scores(scored), scored.score, gold))
    points = [
        {
            "kl": best_of_n.kl(n),
            "gold": best_of_n.expected(by, worth, n),
            "proxy": best_of_n.expected(by, proxy, n),
        }
        for n in (2**k for k in range(pick.answers.bit_length()))
    ]
    return {"points": points}


def fitted(curve: overoptimization.Curve, points: Sequence[study.Point]) -> tuple[float, float]:
    """alpha and beta of the gain in gold over the first point; nan where the policy has not left it."""
    d, gold = np.array([(math.sqrt(max(point["kl"], 0.0)), point["gold"]) for point in points]).T
    if len(set(d[d > 0])) < 2:
        return math.nan, math.nan
    return overoptimization.fit(curve, d, gold - gold[0])


def report(cfg: Config, results: dict[str, list]) -> None:
    """A row a reward model and way to follow it; a line each in the panels."""
    header = ["reward model from", "held-out accuracy", "by", "last d", "last proxy", "last gold", "alpha", "beta"]
    curves = {"best_of_n": overoptimization.best_of_n, "ppo": overoptimization.reinforcement}
    labels = {"best_of_n": f"best of {cfg.answers}", "ppo": "PPO"}
    rows = []
    panels: dict[str, dict] = {f"{way}: {what}": {} for way in labels.values() for what in MEASURES.values()}
    for name, (way, label) in itertools.product(judges(cfg), labels.items()):
        runs = [seed[name] for seed in results[way]]
        lasts = [points[-1] for points in runs]
        columns = [
            [math.sqrt(max(last["kl"], 0.0)) for last in lasts],
            *([last[measure] for last in lasts] for measure in ("proxy", "gold")),
            *np.transpose([fitted(curves[way], points) for points in runs]),
        ]
        accuracy = study.mean_sd([seed[name] for seed in results["accuracy"]])
        rows.append([name, accuracy, label, *map(study.mean_sd, columns)])
        where = np.linspace(0.0, math.sqrt(max(point["kl"] for points in runs for point in points)), 13)
        for measure, what in MEASURES.items():
            values = [study.interpolated(points, measure, where, of=math.sqrt) for points in runs]
            panels[f"{label}: {what}"][name] = study.band(values, where)
    draw = functools.partial(plots.lines, panels=panels, x="d, square root of the KL (nats)")
    study.publish(cfg, NAME, study.table(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
