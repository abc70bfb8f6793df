"""The samplings of answers for people to judge, on record in the store, so that a restart finishes them."""

import dataclasses
import json
from pathlib import Path

from rlhf_jax.people import beside, forms
from rlhf_jax.people.store import Store


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings of `experiments.answers`."""

    model: tuple[str, ...]  # model directories; none: people write the answers
    data: str
    prompts: int
    k: int
    task: forms.Task | None
    overlap: int
    overlap_share: float
    pairs: int
    seed: int

    def command(self, db: Path, number: int) -> list[str]:
        """The command that samples into a store, on record there under a number."""
        flags = ["--db", db, "--data", self.data, "--model", *self.model, "--prompts", self.prompts, "--k", self.k]
        flags += ["--seed", self.seed, "--overlap", self.overlap, "--overlap-share", self.overlap_share]
        flags += ["--pairs", self.pairs, "--record", number, *(["--task", self.task] if self.task else [])]
        return beside.command("experiments.answers", *map(str, flags))


def unfinished(store: Store) -> Sampling | None:
    """The sampling that was begun last, unless it has been finished."""
    row = store.one("SELECT body, finished FROM samplings ORDER BY id DESC LIMIT 1")
    if row is None or row["finished"] is not None:
        return None
    body = json.loads(row["body"])
    return Sampling(**body | {"model": tuple(body["model"])})


def progress(store: Store) -> dict[str, int] | None:
    """How many prompts models have answered, and of how many, while they do; None if they do not."""
    wanted = unfinished(store)
    if wanted is None or not wanted.model:
        return None
    row = store.one("SELECT done FROM samplings ORDER BY id DESC LIMIT 1")
    return {"done": row["done"] if row else 0, "prompts": wanted.prompts}


def begin(store: Store, wanted: Sampling) -> int:
    """The number under which it is on record; what goes on with what was begun last has its number."""
    with store.writer() as db:
        if wanted == unfinished(store):
            return db.execute("SELECT MAX(id) FROM samplings").fetchone()[0]
        values = (json.dumps(dataclasses.asdict(wanted)), store.now())
        number = db.execute("INSERT INTO samplings (body, created) VALUES (?, ?)", values).lastrowid
        assert number is not None
        return number


def done(store: Store, number: int) -> int:
    """The number of prompts that were answered already; 0 without a record."""
    row = store.one("SELECT done FROM samplings WHERE id = ?", number)
    return row["done"] if row else 0


def note(store: Store, number: int, prompts: int) -> None:
    """Record how many prompts were answered."""
    with store.writer() as db:
        db.execute("UPDATE samplings SET done = ? WHERE id = ?", (prompts, number))


def finish(store: Store, number: int) -> None:
    """Record that all were."""
    with store.writer() as db:
        db.execute("UPDATE samplings SET finished = ? WHERE id = ?", (store.now(), number))
