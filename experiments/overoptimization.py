"""How far can a reward model be followed? Gold against distance, after Gao et al. 2022 (arXiv:2210.10760).

Reward models that learnt from fewer labels, or are smaller, are maximised by PPO without a KL penalty and by best-of-n.
Gold is what each answer is worth (rlhf_jax/data/world.py); the proxy is the reward model's score. Distance d is the
square root of the KL from the fine-tuned model. The curves of the paper are fitted to the gain in gold.

Run:     python -m experiments.overoptimization
Parent:  rank, reward, ppo
Result:  docs/overoptimization.md
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import ppo, study
from rlhf_jax import best_of_n, cli, models, overoptimization, parallel, plots, rollout, scores
from rlhf_jax.types import InputError, check_positive


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    labels: tuple[int, ...] = (150, 600)  # prompts to learn from, beside all
    epochs: tuple[int, ...] = (4, 2)  # passes over each of them, so that few labels do not mean few steps
    sizes: tuple[str, ...] = ("llama-micro", "llama-tiny")  # presets of smaller reward models, with all labels
    answers: int = 64  # to each prompt, of which best-of-n takes n at most
    answered: int = 128  # prompts of best-of-n

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "answers", "answered")
        if len(self.epochs) != len(self.labels):
            raise InputError(f"epochs={self.epochs}: expected a number for each of labels={self.labels}")


@dataclasses.dataclass(frozen=True)
class Pool:
    """Answers of the fine-tuned model, and the reward models that pick among them."""

    out: Path
    run: ppo.Config  # how they are sampled
    judges: dict[str, Path]
    answers: int
    answered: int


def main(cfg: Config) -> dict[str, Any]:
    """Run what has not been run, then write table and plot; returns the points of each seed and reward model."""
    results: dict[str, list] = {"accuracy": [], "best_of_n": [], "ppo": []}
    for seed in range(cfg.seeds):
        judged = {name: study.judge(cfg, seed, **settings) for name, settings in judges(cfg).items()}
        results["accuracy"].append({name: found["accuracy"] for name, found in judged.items()})
        results["best_of_n"].append(picked(cfg, seed, {name: found["model"] for name, found in judged.items()}))
        results["ppo"].append({name: policy(cfg, seed, found["model"]) for name, found in judged.items()})
    report(cfg, results)
    return results


def judges(cfg: Config) -> dict[str, dict[str, Any]]:
    """The reward models by name, with what sets each apart."""
    fewer = {f"{n} prompts": {"prompts": n, "epochs": e} for n, e in zip(cfg.labels, cfg.epochs, strict=True)}
    smaller = {f"{cfg.prompts} prompts, {size}": {"preset": size} for size in cfg.sizes}
    return fewer | {f"{cfg.prompts} prompts": {}} | smaller


def policy(cfg: study.Config, seed: int, judge: Path) -> list[study.Point]:
    """PPO against the reward model, without a KL penalty."""
    out = cfg.out / f"seed{seed}" / f"ppo-{judge.parent.name}"
    free = dataclasses.replace(cfg.ppo.ppo, kl_coef=0.0)
    study.once(ppo.main, dataclasses.replace(cfg.ppo, ppo=free, out=out, **study.unheld(cfg, seed, judge)))
    return study.course(out)


def picked(cfg: Config, seed: int, judges: dict[str, Path]) -> dict[str, list[study.Point]]:
    """The best of 1, 2, 4, .. `cfg.answers` answers, by each reward model."""
    run = dataclasses.replace(cfg.ppo, init=study.tuned(cfg), seed=seed, **study.shared(cfg))
    out = cfg.out / f"seed{seed}" / "best_of_n"
    return study.once(best_of, Pool(out, run, judges, cfg.answers, cfg.answered))


def best_of(pool: Pool) -> dict[str, list[study.Point]]:
    """See `picked`."""
    model, sampled, worth = study.answers(pool.run, pool.run.init, pool.answered, pool.answers)
    curves = {}
    for name, path in pool.judges.items():
        reward = models.load_reward(path, compute=pool.run.compute)
        source = scores.reward_models([reward], models.tokenizer_of(model).eos_token_id)
        parts = [
            parallel.gather(source(parallel.shard(part))).score for _, part in rollout.chunks(sampled, study.BATCH)
        ]
        scored = sampled.replace(score=np.concatenate(parts)[: len(sampled.index)])
        by, proxy, gold = (x.reshape(-1, pool.answers) for x in (best_of_n.picking(scored), scored.score, worth))
        curves[name] = [
            {
                "n": n,
                "kl": best_of_n.kl(n),
                "gold": best_of_n.expected(by, gold, n),
                "proxy": best_of_n.expected(by, proxy, n),
            }
            for n in (2**k for k in range(pool.answers.bit_length()))
        ]
    return curves


def fitted(curve: overoptimization.Curve, points: Sequence[study.Point], start: float) -> tuple[float, float]:
    """alpha and beta of the gain in gold over `start`; nan where the policy has not left."""
    d = np.sqrt([max(point["kl"], 0.0) for point in points])
    if len(set(d[d > 0])) < 2:
        return math.nan, math.nan
    return overoptimization.fit(curve, d, np.array([point["gold"] for point in points]) - start)


def report(cfg: Config, results: dict[str, list]) -> None:
    """A row a reward model; a line each in the panels."""
    header = ["reward model from", "held-out accuracy", f"gold of the best of {cfg.answers}", "alpha", "beta"]
    header += ["PPO: best gold", "at d", "last gold", "at d", "alpha", "beta"]
    rows = []
    kinds = [f"{kind}: {measure}" for kind in ("best-of-n", "PPO") for measure in ("gold (0 to 1)", "proxy")]
    panels: dict[str, dict] = {kind: {} for kind in kinds}
    for name in judges(cfg):
        picked = [seed[name] for seed in results["best_of_n"]]
        starts = [points[0] for points in picked]  # n = 1: the fine-tuned model
        learnt = [[start, *seed[name]] for start, seed in zip(starts, results["ppo"], strict=True)]
        fits = [
            fitted(curve, points, start["gold"])
            for curve, runs in ((overoptimization.best_of_n, picked), (overoptimization.reinforcement, learnt))
            for points, start in zip(runs, starts, strict=True)
        ]
        (alpha, beta), (alpha_rl, beta_rl) = (np.transpose(part) for part in (fits[: cfg.seeds], fits[cfg.seeds :]))
        peaks = [max(points, key=lambda point: point["gold"]) for points in learnt]
        far = [[math.sqrt(max(point["kl"], 0.0)) for point in found] for found in (peaks, [r[-1] for r in learnt])]
        columns = [
            [accuracy[name] for accuracy in results["accuracy"]],
            [points[-1]["gold"] for points in picked],
            alpha,
            beta,
            [peak["gold"] for peak in peaks],
            far[0],
            [points[-1]["gold"] for points in learnt],
            far[1],
            alpha_rl,
            beta_rl,
        ]
        rows.append([name, *(study.mean_sd(column) for column in columns)])
        for kind, runs in (("best-of-n", picked), ("PPO", learnt)):
            reached = max(math.sqrt(max(point["kl"], 0.0)) for points in runs for point in points)
            where = np.linspace(0.0, reached, 13)
            for measure, label in (("gold", "gold (0 to 1)"), ("proxy", "proxy")):
                values = [study.at(points, measure, where, of=math.sqrt) for points in runs]
                panels[f"{kind}: {label}"][name] = study.band(values, where)
    draw = functools.partial(plots.lines, panels=panels, x="d, square root of the KL (nats)")
    study.publish(cfg, "overoptimization", study.table(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
