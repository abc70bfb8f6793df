"""How far can a reward model be followed? Gold against distance, after Gao et al. 2022 (arXiv:2210.10760).

Reward models that learnt from fewer labels, or are smaller, are maximised by PPO without a KL penalty and by best-of-n.
Gold is what each answer is worth (rlhf_jax/data/world); the proxy is the reward model's score. Distance d is the
square root of the KL from the fine-tuned model. The curves of the paper are fitted to the gain in gold.

Run:     python -m experiments.studies.overoptimization
Parent:  rank, reward, ppo
Result:  docs/overoptimization.md
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.studies import courses, study, tables
from experiments.studies.tables import Point
from rlhf_jax.analysis import overoptimization as curves
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count
from rlhf_jax.types import InputError

NAME = "overoptimization"
MEASURES = {"gold": "gold (0 to 1)", "proxy": "proxy (sd of answers)"}


@dataclasses.dataclass(frozen=True)
class Config(courses.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    labels: tuple[Count, ...] = (100, 400)  # prompts to learn from, beside all
    epochs: tuple[Count, ...] = (4, 2)  # passes over each of them: few labels shall not mean few steps alone
    sizes: tuple[str, ...] = ("llama-micro", "llama-tiny")  # presets of smaller reward models, with all labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.epochs) != len(self.labels):
            raise InputError(f"epochs={self.epochs}: expected a number for each of labels={self.labels}")
        if self.labels and max(self.labels) >= self.prompts:
            raise InputError(f"labels={self.labels}: expected fewer than the {self.prompts} of --prompts")


@dataclasses.dataclass(frozen=True)
class Followed:
    """The accuracy of a reward model, and the courses of best-of-n and PPO that follow it."""

    accuracy: float
    best_of_n: list[Point]
    ppo: list[Point]


def main(cfg: Config) -> dict[str, list[Followed]]:
    """Run what has not been run, then write table and plot; returns what was found of each reward model and seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    study.run_each(cfg, study.fine_tune, (cfg.pretrain.preset, *cfg.sizes))
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {name: [followed[name] for followed in seeds] for name in specs(cfg)}
    report(cfg, results)
    return results


def specs(cfg: Config) -> dict[str, study.RewardSpec]:
    """The reward models by name."""
    preset, everything = cfg.pretrain.preset, f"{cfg.prompts} prompts"
    fewer = {
        f"{prompts} prompts": study.RewardSpec(prompts, preset, epochs)
        for prompts, epochs in zip(cfg.labels, cfg.epochs, strict=True)
    }
    smaller = {f"{everything}, {size}": study.RewardSpec(cfg.prompts, size) for size in cfg.sizes}
    return fewer | {everything: study.all_labels(cfg)} | smaller


def run_seed(cfg: Config, seed: int) -> dict[str, Followed]:
    """Learn each reward model from the labels of a seed, and follow it."""
    learnt = {name: study.learn_reward(cfg, seed, spec) for name, spec in specs(cfg).items()}
    # All of best-of-n first: it samples one set of answers for all the reward models.
    best_of_n = {name: courses.best_of_n_course(cfg, seed, judge.model) for name, judge in learnt.items()}
    ppo = {name: courses.ppo_course(cfg, seed, judge.model) for name, judge in learnt.items()}
    return {name: Followed(judge.accuracy, best_of_n[name], ppo[name]) for name, judge in learnt.items()}


def fit_gain(curve: curves.Curve, points: Sequence[Point]) -> tuple[float, float]:
    """alpha and beta of the gain in gold over the first point; nan where the policy has not left it."""
    d = np.array([distance(point) for point in points])
    gold = np.array([point["gold"] for point in points])
    if len(set(d[d > 0])) < 2:
        return math.nan, math.nan
    return curves.fit(curve, d, gold - gold[0])


def distance(point: Point) -> float:
    """d, the square root of the KL."""
    return math.sqrt(max(point["kl"], 0.0))


def last_columns(curve: curves.Curve, seeds: Sequence[Sequence[Point]]) -> Iterator[str]:
    """The last distance, proxy and gold of a way to follow a reward model, and the fit of its curve."""
    lasts = [points[-1] for points in seeds]
    yield tables.mean_sd([distance(last) for last in lasts])
    yield tables.mean_sd([last["proxy"] for last in lasts])
    yield tables.mean_sd([last["gold"] for last in lasts])
    yield from map(tables.mean_sd, np.transpose([fit_gain(curve, points) for points in seeds]))


def report(cfg: Config, results: dict[str, list[Followed]]) -> None:
    """Publish a row for each reward model and way to follow it, and a line for each in the panels."""
    header = ["reward model from", "held-out accuracy", "by", "last d", "last proxy", "last gold", "alpha", "beta"]
    rows = []
    panels: dict[str, dict] = {}
    for name, seeds in results.items():
        accuracy = tables.mean_sd([followed.accuracy for followed in seeds])
        ways = (
            (f"best of {cfg.answers}", curves.best_of_n, [followed.best_of_n for followed in seeds]),
            ("PPO", curves.reinforcement, [followed.ppo for followed in seeds]),
        )
        for way, curve, found in ways:
            rows.append([name, accuracy, way, *last_columns(curve, found)])
            where = np.linspace(0.0, max(distance(point) for points in found for point in points), 13)
            for measure, label in MEASURES.items():
                values = [tables.interpolate(points, measure, where, math.sqrt) for points in found]
                panels.setdefault(f"{way}: {label}", {})[name] = tables.band(values, where)
    draw = functools.partial(plots.lines, panels=panels, x="d, square root of the KL (nats)")
    study.publish(cfg, NAME, tables.markdown(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
