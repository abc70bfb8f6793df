"""Does a model prefer the more helpful, honest and harmless of two answers?

A language model ranks answers by their log-probability, a reward model by its score, a judge by its verdict on both, in
either order. The comparisons are the embedded world's own, in which the answers of a pair differ in one virtue alone,
or out of files: JSON Lines of {"prompt", "chosen", "rejected", "subset"}, BIG-bench's folder hhh_alignment, or rankings
of any kind that a reward model learns from, such as hh:PATH.

Run:     python -m experiments.hhh --model runs/sft/model --reward runs/reward/model
Parent:  evaluate
Result:  the table of docs/evaluation.md: the quickstart's reward model is right in 72 % of cases, its PPO
         in 62 %
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from rlhf_jax import models, runs
from rlhf_jax.data import hhh as data
from rlhf_jax.data import sources
from rlhf_jax.data.world import World
from rlhf_jax.data.world import hhh as world_hhh
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.evaluation import hhh
from rlhf_jax.rollouts import judge as judge_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Seed
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    model: Path | None = None  # model directory that ranks by log-probability
    reward: Path | None = None  # model directory of a reward model, which ranks by score
    judge: judge_lib.Config = judge_lib.Config()  # language model that says which of two answers is better
    data: str | None = None  # file or folder of comparisons, or rankings such as hh:PATH; None: the world's own
    out: Path = Path("runs/hhh")  # run directory, for all results
    pairs: Count = 300  # comparisons of each subset of the world's own, or of rankings, at most
    world: Seed = 0  # seed of the world that the model was trained on
    batch: Count = 64  # comparisons to compute at a time, over all devices


def main(cfg: Config) -> dict[str, dict[str, hhh.Accuracy]]:
    """Compare, print a table, and write hhh.json and hhh.png; returns accuracies by measure and subset."""
    if not cfg.model and not cfg.reward and not cfg.judge.given:
        raise InputError(
            "nothing to evaluate: name a model by --model, a reward model by --reward, or a judge by --judge.model or"
            " --judge.url"
        )
    subsets = comparisons(cfg)
    layout = parallel.layout(cfg.devices)
    margins: dict[str, hhh.Margins] = {}
    if cfg.model:
        model = models.load(cfg.model, compute=cfg.compute, place=layout.sharding)
        margins |= hhh.by_likelihood(model, subsets, batch=cfg.batch, layout=layout)
    if cfg.reward:
        reward = models.load_reward(cfg.reward, compute=cfg.compute, place=layout.sharding)
        margins |= hhh.by_reward(reward, subsets, batch=cfg.batch, layout=layout)
    if judge := judge_lib.load(cfg.judge, layout, cfg.compute, cfg.seed):
        margins |= hhh.by_judge(judge, subsets, batch=cfg.batch)
    found = {measure: hhh.accuracies(one) for measure, one in margins.items()}
    if hosts.first():
        print(table(found))
    _write(cfg, found)
    return found


def table(found: Mapping[str, Mapping[str, hhh.Accuracy]]) -> str:
    """The accuracies as a table in Markdown, a row a subset, with the pairs and ties below."""
    names = list(next(iter(found.values())))
    lines = [f"| accuracy (standard error), % | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    for name in names:
        cells = [f"{100 * one[name].score.value:.1f} ({100 * one[name].score.error:.1f})" for one in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ends = [(measure, list(one.values())[-1]) for measure, one in found.items()]
    return "\n".join([*lines, *(f"{measure}: {one.pairs} pairs, {one.ties} ties" for measure, one in ends)])


def comparisons(cfg: Config) -> data.Subsets:
    """The comparisons of a file, a folder or rankings; or the world's own, about what no stage was asked."""
    if cfg.data is None:
        subsets: data.Subsets = {}
        for n, row in enumerate(world_hhh.comparisons(World.generate(cfg.world), cfg.pairs, cfg.seed)):
            subsets.setdefault(row["subset"], []).append(data.compared(row, f"world, comparison {n}"))
        return subsets
    if ":" not in cfg.data or Path(cfg.data).exists():
        return data.read(Path(cfg.data))
    found = data.of_rankings(sources.rows(cfg.data, "rankings", data_dir=cfg.data_dir), cfg.pairs)
    if not found:
        raise InputError(f"{cfg.data}: all responses to a prompt are ranked alike, so there is nothing to compare")
    return {cfg.data: found}


def _write(cfg: Config, found: Mapping[str, Mapping[str, hhh.Accuracy]]) -> None:
    """Write all files of the run directory."""
    runs.write_config(cfg.out, cfg)
    written = {
        measure: {subset: dataclasses.asdict(accuracy) for subset, accuracy in one.items()}
        for measure, one in found.items()
    }
    runs.write(cfg.out / "hhh.json", json.dumps(written, indent=2) + "\n")
    points = {
        measure: {
            subset: (100 * one.score.value, 100 * one.score.low, 100 * one.score.high) for subset, one in each.items()
        }
        for measure, each in found.items()
    }
    plots.intervals(cfg.out / "hhh.png", points, "accuracy (%), 95 % intervals", 50.0)


if __name__ == "__main__":
    cli.run(main, Config())
