"""What does a model score on tasks of EleutherAI's lm-evaluation-harness?

Run:     python -m experiments.lm_eval --model runs/sft/model --tasks tasks/mine.yaml --shots 5
Parent:  none
Result:  the same numbers as the harness's own backend for PyTorch: docs/evaluation.md

A task is the harness's own file (https://github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md), or the
name of a task in a folder of `--include` or among those that come with it. Data that a file names by `data_files` is
found from where the command runs. Nothing is downloaded, unless HF_HUB_OFFLINE=0 says so.
"""

import dataclasses
import json
import os
from pathlib import Path

from rlhf_jax import models, runs
from rlhf_jax.devices import parallel
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Whole
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the evaluation."""

    model: Path = Path("runs/sft/model")  # model directory to evaluate
    tasks: tuple[str, ...] = ()  # files of tasks, or names
    include: Path | None = None  # folder with files of tasks that are named
    shots: Whole | None = None  # examples in front of each question; None: as each task says
    limit: Count | None = None  # questions of each task; None: all
    chat: bool = False  # questions and examples are turns of a conversation, by the model's chat template
    batch: Count = 16  # rows of up to 256 tokens to compute at a time, over all devices; fewer where they are longer
    out: Path | None = None  # type: ignore[assignment]  # run directory, for results.json; None: print only


def main(cfg: Config) -> dict:
    """Evaluate, print the table, and write the result; returns the metrics of each task by name."""
    check(cfg)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when `datasets` is imported
    from rlhf_jax.evaluation import harness

    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.model, compute=cfg.compute, place=layout.sharding)
    results = harness.evaluate(
        harness.Harness(cfg.model, model, layout, cfg.batch, cfg.seed),
        cfg.tasks,
        include=cfg.include,
        shots=cfg.shots,
        limit=cfg.limit,
        chat=cfg.chat,
        seed=cfg.seed,
    )
    print(harness.table(results))
    if cfg.out:
        result = {"settings": runs.settings(cfg)} | results
        runs.write(cfg.out / "results.json", json.dumps(result, indent=2, default=str) + "\n")
    return results["results"]


def check(cfg: Config) -> None:
    """Raises InputError where no tasks are named, or files that there are not."""
    if not cfg.tasks:
        raise InputError("--tasks is missing: name tasks of lm-evaluation-harness, or files of such")
    for path in (*(Path(task) for task in cfg.tasks if task.endswith((".yaml", ".yml"))), cfg.include):
        if path is not None and not path.exists():
            raise InputError(f"{path}: no such file or folder of tasks")


if __name__ == "__main__":
    cli.run(main, Config())
