"""The worth of every token of a run's answers: one HTML page of a run, or of two side by side.

The page needs no network and opens from disk. It has the curves, and the recorded answers token by token: log-ratio to
the reference, reward, value, advantage, ratio, entropy, probability, and what else the model might have said. Of a
reward model it has the ranked pairs with both scores.

Run:     python -m experiments.report runs/ppo
Parent:  none
Result:  of the quickstart's PPO run, a page of 0.2 MiB that Chromium paints after 0.3 s
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax import runs
from rlhf_jax.analysis import report
from rlhf_jax.runs import cli, log
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of the page."""

    run: tyro.conf.Positional[Path] = Path("runs/ppo")  # run directory
    other: tyro.conf.Positional[Path | None] = None  # run directory to compare it with
    out: Path | None = None  # the page; None: report.html in the (first) run directory
    most: Count = 2000  # answers of each run; of more, some are left out evenly


def main(cfg: Config) -> Path:
    """Write the page; returns its path."""
    directories = [cfg.run] if cfg.other is None else [cfg.run, cfg.other]
    settings = [runs.read_settings(directory) for directory in directories]
    names = _names(directories)
    records = [
        report.Record(
            name=name,
            settings=dict(_flat(found)),
            metrics=log.read(directory),
            episodes=_thinned(_episodes(directory), cfg.most, directory),
        )
        for name, directory, found in zip(names, directories, settings, strict=True)
    ]
    differences = runs.differences(*settings) if cfg.other else {}
    out = cfg.out or cfg.run / "report.html"
    if out.is_dir():
        raise InputError(f"--out {out}: expected a file such as report.html, got a folder")
    page = report.page(records, {name: said for name, said in differences.items() if name not in ("out", "data_dir")})
    runs.write(out, page)
    answers = sum(len(record.episodes) for record in records)
    print(f"{out}: {answers} answers, {len(page.encode()) / 2**20:.2f} MiB")
    return out


def _names(directories: list[Path]) -> list[str]:
    """The shortest ends of the directories that tell them apart, of two names at least."""
    parts = [directory.resolve().parts for directory in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return ["/".join(part[-max(2, count) :]) for part in parts]


def _episodes(directory: Path) -> list[dict[str, Any]]:
    """The rows of the run's tokens/; of a run that has none, those of samples.jsonl that are answers."""
    if found := log.read_tokens(directory):
        return found
    if not (directory / "samples.jsonl").is_file():
        return []
    return [row for row in log.read(directory, "samples.jsonl") if {"prompt", "response"} <= row.keys()]


def _thinned(rows: list[dict[str, Any]], most: int, directory: Path) -> list[dict[str, Any]]:
    if len(rows) <= most:
        return rows
    print(f"{directory}: {most} of {len(rows)} answers are on the page, evenly chosen; --most {len(rows)} takes all")
    return [rows[n * len(rows) // most] for n in range(most)]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if not before and name in ("contents", "environment"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", "none" if value is None else str(value)


if __name__ == "__main__":
    cli.run(main, Config())
