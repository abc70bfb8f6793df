"""Which way to use the same labels buys most gold for the distance? PPO, RLOO, GRPO, DPO and best-of-n.

All learn from the labels of one seed: PPO, RLOO, GRPO and best-of-n through the same reward model, DPO directly. The
first three go without a KL penalty, and their distance grows along the run; DPO is run once for each beta.

Run:     python -m experiments.studies.frontier
Parent:  ppo, grpo, rloo, dpo
Result:  docs/frontier.md
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import dpo, grpo, rloo
from experiments.studies import courses, study, tables
from experiments.studies.tables import Point
from rlhf_jax import runs
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import NonNegative, Positive

NAME = "frontier"


# The types of the experiments are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(courses.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    budgets: tuple[NonNegative, ...] = (0.25, 0.5, 1.0, 2.0)  # nats, at which the table compares
    betas: tuple[Positive, ...] = (0.5, 0.1)  # of DPO, one run each
    # Without a KL penalty, as `ppo` here; what they share with it they take from there.
    grpo: "grpo.Config" = grpo.Config(
        algorithm=grpo_lib.Config(minibatches=4, group=4, kl_coef=0.0, kl_in="reward", unfinished_score=-1.0)
    )
    rloo: "rloo.Config" = rloo.Config(
        algorithm=rloo_lib.Config(minibatches=4, group=4, kl_coef=0.0, unfinished_score=-1.0)
    )
    dpo: "dpo.Config" = dpo.Config()


def main(cfg: Config) -> dict[str, list[list[Point]]]:
    """Run what has not been run, then write table and plot; returns the points of each algorithm and seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    study.fine_tune(cfg)
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {name: [found[name] for found in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def run_seed(cfg: Config, seed: int) -> dict[str, list[Point]]:
    """Run each algorithm on the labels of a seed; returns their courses."""
    judge = study.learn_reward(cfg, seed, study.all_labels(cfg)).model
    best_of_n = courses.best_of_n_course(cfg, seed, judge)
    start, *optimized = courses.ppo_course(cfg, seed, judge)
    return {
        "best-of-n": best_of_n,
        "PPO": [start, *optimized],
        "RLOO": [start, *grouped_course(cfg, seed, judge, "rloo", cfg.rloo, rloo.main)],
        "GRPO": [start, *grouped_course(cfg, seed, judge, "grpo", cfg.grpo, grpo.main)],
        "DPO": [start, *(dpo_point(cfg, seed, judge, beta) for beta in cfg.betas)],
    }


def grouped_course(
    cfg: Config, seed: int, judge: Path, name: str, config: grpo.Config, experiment: Callable[[Any], Any]
) -> list[Point]:
    """The course of GRPO or RLOO, of the sizes of PPO."""
    run = cli.hand_down(
        name,
        config,
        study.shared_settings(cfg, seed),
        out=cfg.out / f"seed{seed}" / name,
        init=study.fine_tune(cfg),
        reward=(judge,),
        data=cfg.ppo.data,
        text=cfg.ppo.text,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
        batch=cfg.ppo.batch,
        steps=cfg.ppo.steps,
        samples_every=cfg.ppo.samples_every,
        samples=cfg.ppo.samples,
    )
    runs.once(experiment, run)
    return courses.read_course(run.out)


def dpo_point(cfg: Config, seed: int, judge: Path, beta: float) -> Point:
    """The place where DPO ends, which learns from the labels that the reward model learnt from."""
    out = cfg.out / f"seed{seed}" / f"dpo-{beta:g}"
    run = cli.hand_down(
        "dpo",
        dataclasses.replace(cfg.dpo, algorithm=dataclasses.replace(cfg.dpo.algorithm, beta=beta)),
        study.shared_settings(cfg, seed),
        out=out,
        init=study.fine_tune(cfg),
        data=str(study.labels_path(cfg, seed, cfg.prompts)),
    )
    runs.once(dpo.main, run)
    sampled_as = study.ppo_run(cfg, seed, judge, out)
    return runs.once(courses.measure, courses.Trained(out / "answers", sampled_as, out / "model", 8 * cfg.answered))


def report(cfg: Config, results: dict[str, list[list[Point]]]) -> None:
    """Publish a row for each algorithm, gold at each budget and where it ends, and one panel of all."""
    header = ["algorithm", *(f"gold at {budget:g} nats" for budget in cfg.budgets), "last gold", "at nats"]
    rows, lines = [], {}
    for name, seeds in results.items():
        at_budgets = [tables.interpolate(points, "gold", np.array(cfg.budgets)) for points in seeds]
        lasts = ([points[-1][measure] for points in seeds] for measure in ("gold", "kl"))
        rows.append([name, *map(tables.mean_sd, [*np.transpose(at_budgets), *lasts])])
        where = np.linspace(0.0, max(point["kl"] for points in seeds for point in points), 25)
        lines[name] = tables.band([tables.interpolate(points, "gold", where) for points in seeds], where)
    draw = functools.partial(
        plots.lines, panels={"gold (0 to 1)": lines}, x="KL to the fine-tuned model (nats a response)"
    )
    study.publish(cfg, NAME, tables.markdown(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
