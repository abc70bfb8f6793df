"""Does instruction tuning help on clusters of tasks that were never seen, and what does that depend on?

`instruct` on the tasks of the assistant world, always tested on the same unseen clusters: with more and more training
clusters, with more and more templates a task, and with models of three sizes. A seed is that of the mixture, and of
which clusters come first; all seeds of a size start from the same pretrained model.

Run:     python -m experiments.studies.instruct
Parent:  pretrain, instruct
Result:  docs/instruct.md
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import instruct, pretrain
from experiments.studies import study, tables
from rlhf_jax import runs
from rlhf_jax.data.tasks import catalog, mixture
from rlhf_jax.models import PRESETS
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count
from rlhf_jax.types import InputError

NAME = "instruct"
GROUPS = {"unseen": True, "seen": False}
MEASURES = ("chance", "before", "after")


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Sizes with which four seeds take one CPU core about a quarter of an hour."""

    clusters: tuple[Count, ...] = (1, 4)  # numbers of training clusters, beside all
    templates: tuple[Count, ...] = (1, 3)  # numbers of templates a task, beside all
    presets: tuple[str, ...] = ("llama-micro", "llama-mini")  # sizes of models, beside that of `pretrain`
    pretrain: "pretrain.Config" = pretrain.Config(preset="llama-tiny")
    instruct: "instruct.Config" = instruct.Config(
        held_out=("entailment", "comparison", "classification"),
        held_out_every=0,
        batch=8,
        steps=300,
    )


@dataclasses.dataclass(frozen=True)
class Arm:
    """The settings in which the runs of a seed differ; None: as the others."""

    clusters: int | None = None
    templates: int | None = None
    preset: str | None = None

    @property
    def name(self) -> str:
        """The folder of the run."""
        parts = [f"{self.clusters}-clusters"] * bool(self.clusters) + [f"{self.templates}-templates"] * bool(
            self.templates
        )
        return "-".join([*parts, *([self.preset] if self.preset else [])]) or "all"


def arms(cfg: Config) -> list[Arm]:
    """The runs of a seed; the first one has all."""
    return [
        Arm(),
        *(Arm(clusters=count) for count in cfg.clusters),
        *(Arm(templates=count) for count in cfg.templates),
        *(Arm(preset=preset) for preset in cfg.presets),
    ]


def training_clusters(cfg: Config) -> list[str]:
    """All clusters to learn from."""
    split = mixture.leave_out(catalog.select(cfg.instruct.tasks), cfg.instruct.held_out)
    return [*dict.fromkeys(task.cluster for task in split.train)]


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run what has not been run, then write table and plot; returns the accuracies of each arm at each seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    known = training_clusters(cfg)
    if wrong := [count for count in cfg.clusters if count >= len(known)]:
        raise InputError(f"clusters={wrong[0]}: expected fewer than all {len(known)} that can be learnt from")
    for preset in (None, *cfg.presets):
        pretrained(cfg, preset)
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {arm.name: [found[arm.name] for found in seeds] for arm in arms(cfg)}
    report(cfg, results)
    return results


def pretrained(cfg: Config, preset: str | None) -> Path:
    """The pretrained model of this size, by default the study's; returns its model directory."""
    sized = dataclasses.replace(cfg.pretrain, preset=preset or cfg.pretrain.preset)
    base = cli.hand_down(
        "pretrain", sized, study.shared_settings(cfg, cfg.seed), out=cfg.out / sized.preset / "pretrain"
    )
    runs.once(pretrain.main, base)
    return base.out / "model"


def run_seed(cfg: Config, seed: int) -> dict[str, dict[str, float]]:
    """The accuracies of each arm at one seed."""
    return {arm.name: run_arm(cfg, seed, arm) for arm in arms(cfg)}


def run_arm(cfg: Config, seed: int, arm: Arm) -> dict[str, float]:
    """Tune a model; returns its mean accuracy before and after on unseen tasks and on those of the training clusters.

    The clusters of few are the first ones of an order drawn by seed, so that those of more contain them.
    """
    held_out = cfg.instruct.held_out
    order = np.random.default_rng(seed).permutation(training_clusters(cfg)).tolist()
    tuning = cfg.instruct
    if arm.clusters:
        tuning = dataclasses.replace(tuning, tasks=(*order[: arm.clusters], *held_out))
    if arm.templates:
        tuning = dataclasses.replace(tuning, mixture=dataclasses.replace(tuning.mixture, templates=arm.templates))
    run = cli.hand_down(
        "instruct",
        tuning,
        study.shared_settings(cfg, seed),
        out=cfg.out / f"seed{seed}" / f"instruct-{arm.name}",
        init=pretrained(cfg, arm.preset),
    )
    rows = runs.once(instruct.main, run)
    found: dict[str, float] = {}
    for group, unseen in GROUPS.items():
        for measure in MEASURES:
            found[f"{group}/{measure}"] = float(
                np.mean([row[measure] for row in rows["tasks"] if row["unseen"] == unseen])
            )
    return found


def report(cfg: Config, results: dict[str, list[dict]]) -> None:
    """Publish a row for each arm, and a panel for each of what differs."""
    columns = {name: {key: [seed[key] for seed in seeds] for key in seeds[0]} for name, seeds in results.items()}
    shown = ("unseen/chance", "unseen/before", "unseen/after", "seen/before", "seen/after")
    clusters, templates = len(training_clusters(cfg)), cfg.instruct.mixture.templates
    every = f"all: {clusters} clusters, {templates} templates, {cfg.pretrain.preset}"
    rows = [
        [every if name == "all" else name.replace("-", " ") if name[0].isdigit() else name]
        + [tables.mean_sd(values[key]) for key in shown]
        for name, values in columns.items()
    ]
    width = lambda preset: PRESETS[preset].d_model
    panels = {
        "accuracy by training clusters": points(
            columns, {count: f"{count}-clusters" for count in cfg.clusters} | {clusters: "all"}
        ),
        "accuracy by templates a task": points(
            columns, {count: f"{count}-templates" for count in cfg.templates} | {templates: "all"}
        ),
        "accuracy by width of the model": points(
            columns,
            {width(preset): preset for preset in cfg.presets} | {width(cfg.pretrain.preset): "all"},
        ),
    }
    header = ["run", *(key.replace("/", ", ") for key in shown)]
    draw = functools.partial(plots.lines, panels=panels, x="")
    study.publish(cfg, NAME, tables.markdown(header, rows), draw)


def points(columns: dict[str, dict[str, list[float]]], arms: dict) -> dict[str, Sequence[tuple[float, ...]]]:
    """The series of a panel: accuracy on unseen tasks after tuning, before and by chance, and on seen ones."""
    series = {
        "unseen, tuned": "unseen/after",
        "unseen, before": "unseen/before",
        "unseen, by chance": "unseen/chance",
        "seen, tuned": "seen/after",
    }
    return {
        label: [
            (float(x), float(np.mean(columns[name][key])), tables.spread(columns[name][key]))
            for x, name in arms.items()
        ]
        for label, key in series.items()
    }


if __name__ == "__main__":
    cli.run(main, Config())
