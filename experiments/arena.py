"""Which model do people prefer, when they compare answers without knowing whose they are?

Reads the verdicts of an arena out of the store that `scripts/people.sh --task arena` fills (docs/people.md), and writes
each model's win rate and strength. The administrator's page has the same table while people vote.

Run:     python -m experiments.arena --db runs/people/people.db --out runs/arena
Parent:  none
Result:  arena.json, arena.png and a table, in seconds; on 90 prompts three simulated labelers prefer the quickstart's
         PPO (win rate 71 %) to its SFT (48 %), and that to its pretrained model (31 %)
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlhf_jax import runs
from rlhf_jax.people import arena
from rlhf_jax.people.agreement import NORMAL_95
from rlhf_jax.people.exchange import Filter
from rlhf_jax.people.store import Store
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Settings
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of the experiment."""

    db: Path = Path("runs/people/people.db")  # the store
    filter: str = ""  # votes to count, as in "round=2&gold=0.8"; all that count if it is empty
    out: Path = Path("runs/arena")  # directory for arena.json and arena.png


def main(cfg: Config) -> dict[str, Any]:
    """Count, fit, print and draw; returns the table as it is written to arena.json."""
    with Store(cfg.db, create=False) as store, store.reader() as db:
        table = arena.table(arena.read(db, Filter.parse(cfg.filter)))
    if not table.votes:
        raise InputError(
            f"--db {cfg.db}: expected votes of an arena that count, got none; see scripts/people.sh --task"
        )
    print(arena.text(table))
    found = arena.as_json(table)
    runs.write(cfg.out / "arena.json", json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    path = plots.arena(
        cfg.out / "arena.png",
        {
            one.name: None
            if one.strength is None or one.standard_error is None
            else (one.strength, NORMAL_95 * one.standard_error)
            for one in table.standings
        },
        {
            one.name: {
                other.name: record.rate.value
                for other, record in zip(table.standings, row, strict=True)
                if record.rate is not None
            }
            for one, row in zip(table.standings, table.between, strict=True)
        },
        f"{table.votes} votes of {table.people} people",
    )
    print(f"{cfg.out / 'arena.json'}, {path}")
    return found


if __name__ == "__main__":
    cli.run(main, Config())
