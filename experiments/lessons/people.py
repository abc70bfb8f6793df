"""Labels of reviews by way of the store of the people's pages: the reader gives them in a browser, or a rule does."""

import contextlib
import functools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.lessons import language, pages
from experiments.lessons.models import Ranks
from rlhf_jax.people import access
from rlhf_jax.people.asking import Asked
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from rlhf_jax.types import Rankings

Ask = Callable[[Sequence[Sequence[str]], int], Rankings]  # reviews of the same opening, and the round, to ranks
RULES = Rules(ratings="none", gold_share=0.0, repeat_share=0.0)  # people only rank, and each task once
DB = pages.ROOT / "runs" / "lessons" / "people.db"


@contextlib.contextmanager
def simulated(seed: int, ranks: Ranks = language.rank) -> Iterator[Ask]:
    """A person who follows a rule, and a store that lasts as long as the context."""
    rng = random.Random(f"person/{seed}")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "people.db") as store:
        store.set_rules(RULES)
        session = access.enter(store, access.invite(store, "simulated")) or ""
        person = access.person(store, session)
        assert person is not None

        def label() -> None:
            while task := store.task(person.id):
                given = {"ranks": ranks([f"{task.prompt} {answer}" for answer in task.responses], rng)}
                store.submit(person.id, task.id, f"simulated-{task.id}", given, seconds=1.0)

        yield functools.partial(ask, store, label)


@contextlib.contextmanager
def reader(seed: int, db: Path = DB) -> Iterator[Ask]:
    """You: the tasks wait on the page of this store. Run again, it goes on with what you have ranked already."""
    db.parent.mkdir(parents=True, exist_ok=True)
    with Store(db) as store:
        store.set_rules(RULES)  # before anybody opens the page, which asks for what they say
        print("Run this in a terminal, open the link that it prints, choose Label, and rank:")
        print(f"  scripts/people.sh --db {db} --prompts 0")
        yield functools.partial(ask, store, lambda: None)


def ask(store: Store, label: Callable[[], None], texts: Sequence[Sequence[str]], number: int) -> Rankings:
    """The ranks of reviews, K of the same opening a row, once all are in the store; they are the tasks of a round."""
    items = [_item(row, number, place) for place, row in enumerate(texts)]
    asked = Asked(store, {f"round {number}": items}, tell=lambda line: None)
    label()
    while not asked.ready(share=1.0):
        pass
    (rows,) = asked.rows().values()
    found = [[f"{row['prompt']} {answer}" for answer in row["responses"]] for row in rows]
    return jax.tree.map(jnp.asarray, language.rankings(found, [row["ranks"] for row in rows]))


def _item(texts: Sequence[str], number: int, place: int) -> Item:
    """The task of ranking these reviews."""
    opening = " ".join(texts[0].split()[: language.OPENING])
    answers = tuple(" ".join(text.split()[language.OPENING :]) for text in texts)
    return Item(prompt=opening, responses=answers, round=number, number=place)
