"""Which way to use the same labels buys most gold for the distance? PPO, RLOO, GRPO, DPO and best-of-n.

All learn from the labels of one seed: PPO, RLOO, GRPO and best-of-n through the same reward model, DPO directly. The
first three go without a KL penalty, and their distance grows along the run; DPO is run once for each beta.

Run:     python -m experiments.frontier
Parent:  overoptimization, grpo, rloo, dpo
Result:  docs/frontier.md
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from experiments import dpo, grpo, overoptimization, ppo, rloo, study
from rlhf_jax import cli, plots


# The types of the experiments are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(overoptimization.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    budgets: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # nats, at which the table compares
    betas: tuple[float, ...] = (0.5, 0.1, 0.02)  # of DPO, one run each
    grpo: "grpo.Config" = grpo.Config()
    rloo: "rloo.Config" = rloo.Config()
    dpo: "dpo.Config" = dpo.Config()


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of a model to prompts that nobody has labelled."""

    out: Path
    run: ppo.Config  # how they are sampled
    model: Path
    prompts: int


def main(cfg: Config) -> dict[str, list]:
    """Run what has not been run, then write table and plot; returns the points of each algorithm and seed."""
    results: dict[str, list[list[study.Point]]] = {}
    for seed in range(cfg.seeds):
        everyone = {
            name: study.judge(cfg, seed, **given)["model"] for name, given in overoptimization.judges(cfg).items()
        }
        judge = study.judge(cfg, seed)["model"]
        picked = overoptimization.picked(cfg, seed, everyone)[f"{cfg.prompts} prompts"]
        runs = {
            "PPO": overoptimization.policy(cfg, seed, judge),
            "RLOO": grouped(cfg, "rloo", seed, judge),
            "GRPO": grouped(cfg, "grpo", seed, judge),
            "DPO": [preferred(cfg, seed, beta) for beta in cfg.betas],
        }
        for name, points in ({"best-of-n": picked} | {name: [picked[0], *run] for name, run in runs.items()}).items():
            results.setdefault(name, []).append(points)
    report(cfg, results)
    return results


def grouped(cfg: Config, name: str, seed: int, judge: Path) -> list[study.Point]:
    """GRPO or RLOO against the reward model, without a KL penalty."""
    experiment, own = {"rloo": (rloo.main, cfg.rloo), "grpo": (grpo.main, cfg.grpo)}[name]
    free = dataclasses.replace(own.algorithm, kl_coef=0.0)
    out = cfg.out / f"seed{seed}" / name
    run = dataclasses.replace(own, algorithm=free, out=out, **study.unheld(cfg, seed, judge))
    study.once(experiment, run)
    return study.course(run.out)


def preferred(cfg: Config, seed: int, beta: float) -> study.Point:
    """DPO from the same labels, and where it ends."""
    home = cfg.out / f"seed{seed}"
    data = home / "rank" / f"first{cfg.prompts}.jsonl"
    given = {"init": study.tuned(cfg), "data": str(data), "seed": seed, **study.shared(cfg)}
    run = dataclasses.replace(
        cfg.dpo, dpo=dataclasses.replace(cfg.dpo.dpo, beta=beta), out=home / f"dpo-{beta:g}", **given
    )
    study.once(dpo.main, run)
    sampling = dataclasses.replace(cfg.ppo, init=run.init, seed=seed, **study.shared(cfg))
    return study.once(answered, Answers(run.out / "answers", sampling, run.out / "model", 4 * cfg.answered))


def answered(asked: Answers) -> study.Point:
    """KL and gold of sampled answers."""
    _, said, gold = study.answers(asked.run, asked.model, asked.prompts)
    kl = np.sum(np.where(said.response_mask, said.logp - said.logp_ref, 0.0), axis=1)
    return {"kl": float(kl.mean()), "gold": float(gold.mean())}


def report(cfg: Config, results: dict[str, list[list[study.Point]]]) -> None:
    """Gold at each budget, a row an algorithm."""
    header = ["algorithm", *(f"gold at {budget:g} nats" for budget in cfg.budgets), "most gold", "at nats"]
    rows, drawn = [], {}
    for name, runs in results.items():
        peaks = [max(points, key=lambda point: point["gold"]) for points in runs]
        found = [study.at(points, "gold", np.array(cfg.budgets)) for points in runs]
        columns = [*np.transpose(found), [peak["gold"] for peak in peaks], [peak["kl"] for peak in peaks]]
        rows.append([name, *(study.mean_sd(column) for column in columns)])
        where = np.linspace(0.0, max(point["kl"] for points in runs for point in points), 25)
        drawn[name] = study.band([study.at(points, "gold", where) for points in runs], where)
    panels = {"gold (0 to 1)": drawn}
    draw = functools.partial(plots.lines, panels=panels, x="KL to the fine-tuned model (nats a response)")
    study.publish(cfg, "frontier", study.table(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
