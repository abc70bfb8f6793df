"""Which of the usual things go wrong in a run? A short list of checks over its records, each with where to read on.

Run:     python -m experiments.diagnose runs/ppo
Parent:  none
Result:  names the planted fault first in 13 of 13 runs of `studies.symptoms`, and nothing in 5 healthy ones
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax import runs
from rlhf_jax.analysis import symptoms
from rlhf_jax.data.world import World
from rlhf_jax.devices.compute import Compute
from rlhf_jax.runs import cli, log
from rlhf_jax.settings import Settings

PAGE = "docs/troubleshooting.md"


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The run to look at."""

    run: tyro.conf.Positional[Path] = Path("runs/ppo")  # run directory


def main(cfg: Config) -> dict[str, Any]:
    """Print the symptoms; returns {"symptoms": their names}."""
    found = symptoms.findings(read(cfg.run))
    for finding in found:
        print(f"{finding.name}: {finding.evidence}. See {PAGE}#{symptoms.anchor(finding.name)}")
    if not found:
        print(f"{cfg.run}: none of {len(symptoms.CHECKS)} symptoms; {PAGE} has what to look at besides")
    return {"symptoms": [finding.name for finding in found]}


def read(directory: Path) -> symptoms.Course:
    """The records of the run in `directory`; answers to prompts of the world are graded by it."""
    metrics, settings = log.read(directory), runs.read_settings(directory)
    is_of_world = str(settings.get("data", "")).startswith("world")
    world = World.generate(settings.get("world", 0)) if is_of_world else None
    answers = [
        symptoms.Graded(
            step=row["step"],
            prompt=f"{row.get('ranking', '')} {row['prompt']}",  # ranks are comparable within one ranking
            score=row["score"],
            length=len(row["tokens"]),
            gold=world.gold(row["prompt"], row["response"]).score if world and row["part"] == "watched" else None,
            rank=row.get("rank"),
        )
        for row in log.read_tokens(directory)
        if row["part"] in ("watched", "ranked")
    ]
    saved, default = settings.get("compute", {}), Compute()  # an older run has fewer settings
    compute = dataclasses.replace(
        default,
        dtype=saved.get("dtype", default.dtype),
        rollout=saved.get("rollout", default.rollout),
        cache=saved.get("cache", default.cache),
    )
    return symptoms.Course(metrics=metrics, answers=answers, compute=compute)


if __name__ == "__main__":
    cli.run(main, Config())
