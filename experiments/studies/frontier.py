"""Which way to use the same labels buys most gold for the distance? PPO, RLOO, GRPO, DPO and best-of-n.

All learn from the labels of one seed: PPO, RLOO, GRPO and best-of-n through the same reward model, DPO directly. The
first three go without a KL penalty, and their distance grows along the run; DPO is run once for each beta.

Run:     python -m experiments.studies.frontier
Parent:  overoptimization, grpo, rloo, dpo
Result:  docs/frontier.md
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import dpo, grpo, ppo, rloo
from experiments.studies import overoptimization, study
from rlhf_jax import runs
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.runs import cli, plots

NAME = "frontier"


# The types of the experiments are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(overoptimization.Following):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    budgets: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # nats, at which the table compares
    betas: tuple[float, ...] = (0.5, 0.1)  # of DPO, one run each
    # Without a KL penalty, as `ppo` here; what they share with it they take from there.
    grpo: "grpo.Config" = grpo.Config(
        algorithm=grpo_lib.Config(minibatches=4, group=4, kl_coef=0.0, kl_in="reward", unfinished_score=-1.0)
    )
    rloo: "rloo.Config" = rloo.Config(
        algorithm=rloo_lib.Config(minibatches=4, group=4, kl_coef=0.0, unfinished_score=-1.0)
    )
    dpo: "dpo.Config" = dpo.Config()


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that came from where `run` starts."""

    out: Path
    run: ppo.Config
    model: Path
    prompts: int


def main(cfg: Config) -> dict[str, list]:
    """Run what has not been run, then write table and plot; returns the points of each algorithm and seed."""
    study.page(cfg, NAME)
    study.tuned(cfg)
    seeds = study.together(cfg, of_seed, range(cfg.seeds))
    results = {name: [courses[name] for courses in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def of_seed(cfg: Config, seed: int) -> dict[str, list[study.Point]]:
    """Where each algorithm goes."""
    judge = study.judge(cfg, seed)["model"]
    best_of_n = overoptimization.best_of_n_course(cfg, seed, judge)
    start, *optimized = overoptimization.ppo_course(cfg, seed, judge)
    return {
        "best-of-n": best_of_n,
        "PPO": [start, *optimized],
        "RLOO": [start, *grouped_course(cfg, seed, judge, "rloo", rloo.main)],
        "GRPO": [start, *grouped_course(cfg, seed, judge, "grpo", grpo.main)],
        "DPO": [start, *(preferred(cfg, seed, judge, beta) for beta in cfg.betas)],
    }


def grouped_course(cfg: Config, seed: int, judge: Path, name: str, experiment: Callable) -> list[study.Point]:
    """Where GRPO or RLOO goes."""
    shared = "data", "text", "prompt_length", "max_new_tokens", "batch", "steps", "samples_every", "samples"
    same = {field: getattr(cfg.ppo, field) for field in shared} | study.policy(cfg, seed, judge)
    run = cli.hand_down(name, getattr(cfg, name), out=cfg.out / f"seed{seed}" / name, **same)
    runs.once(experiment, run)
    return study.course(run.out)


def preferred(cfg: Config, seed: int, judge: Path, beta: float) -> study.Point:
    """Where DPO ends that learns from the labels of the reward model."""
    given = {"init": study.tuned(cfg), "data": str(study.labels(cfg, seed, cfg.prompts)), "seed": seed}
    held = dataclasses.replace(cfg.dpo, dpo=dataclasses.replace(cfg.dpo.dpo, beta=beta))
    out = cfg.out / f"seed{seed}" / f"dpo-{beta:g}"
    run = cli.hand_down("dpo", held, out=out, **given, **study.shared(cfg))
    runs.once(dpo.main, run)
    sampled = cli.hand_down("ppo", cfg.ppo, **study.policy(cfg, seed, judge))
    return runs.once(place, Trained(out / "answers", sampled, out / "model", 8 * cfg.answered))


def place(trained: Trained) -> study.Point:
    """By samples."""
    said, gold = study.answers(trained.run, trained.model, trained.prompts)
    kl = np.sum(np.where(said.response_mask, said.logp - said.logp_ref, 0.0), axis=1)
    return {"kl": float(kl.mean()), "gold": float(gold.mean()), "proxy": float(said.score.mean())}


def report(cfg: Config, results: dict[str, list[list[study.Point]]]) -> None:
    """A row an algorithm: gold at each budget, and where it ends. One panel."""
    header = ["algorithm", *(f"gold at {budget:g} nats" for budget in cfg.budgets), "last gold", "at nats"]
    rows, drawn = [], {}
    for name, seeds in results.items():
        found = [study.interpolated(points, "gold", np.array(cfg.budgets)) for points in seeds]
        lasts = ([points[-1][measure] for points in seeds] for measure in ("gold", "kl"))
        rows.append([name, *map(study.mean_sd, [*np.transpose(found), *lasts])])
        where = np.linspace(0.0, max(point["kl"] for points in seeds for point in points), 25)
        drawn[name] = study.band([study.interpolated(points, "gold", where) for points in seeds], where)
    panels = {"gold (0 to 1)": drawn}
    draw = functools.partial(plots.lines, panels=panels, x="KL to the fine-tuned model (nats a response)")
    study.publish(cfg, NAME, study.table(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
