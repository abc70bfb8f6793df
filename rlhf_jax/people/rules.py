"""The rules by which tasks are given out and people are set aside; the former ones stay on record."""

import dataclasses
import json
import sqlite3

from rlhf_jax.people import forms
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Rate, Settings


@dataclasses.dataclass(frozen=True)
class Rules(Settings):
    """How tasks are given out and what is expected of people; a change holds from the next task on."""

    ratings: forms.Ratings = "all"  # that each response of a ranking needs before it can be ranked
    lease: Positive = 1800.0  # seconds without a sign of life after which a task goes to somebody else
    gold_share: Rate = 0.05  # of tasks, that have a known answer
    repeat_share: Rate = 0.05  # of tasks, that the person has answered before
    gold_least: Fraction = 0.0  # gold accuracy below which a person gets no more tasks; 0 turns this off
    gold_count: Count = 5  # gold answers before that is decided
    self_least: Fraction = 0.0  # agreement with oneself below which a person gets no more tasks; 0 turns this off
    self_count: Count = 5  # repeated answers before that is decided
    turns: Count = 3  # that a conversation has at least
    reading: NonNegative = 15.0  # words a second; who answers sooner than in words / reading is noted as too fast


def newest(db: sqlite3.Connection) -> Rules:
    """The rules that hold now."""
    row = db.execute("SELECT body FROM rules ORDER BY id DESC LIMIT 1").fetchone()
    return Rules(**json.loads(row["body"])) if row else Rules()


def difference(before: Rules, after: Rules) -> str:
    """The changes from one set of rules to another, in a line."""
    former = dataclasses.asdict(before)
    changed = ((name, former[name], value) for name, value in dataclasses.asdict(after).items())
    return ", ".join(f"{name} {old} → {new}" for name, old, new in changed if old != new)


def add(db: sqlite3.Connection, rules: Rules, now: float) -> None:
    """Let `rules` hold from now on."""
    body = json.dumps(dataclasses.asdict(rules))
    db.execute("INSERT INTO rules (body, created) VALUES (?, ?)", (body, now))
