"""People of tests: some come in by themselves, others rank in a thread what is asked, as simulated labelers did."""

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.people import access
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store

RULES = Rules(ratings="none", gold_share=0.0, repeat_share=0.0)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def known(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rankings by what they are asked of, and by labeler."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(about(row["prompt"], row["responses"]), {})[str(row["labeler"])] = row
    return found


def about(prompt: Any, responses: Iterable[str]) -> str:
    """The name of a prompt with its responses, in whichever order they are shown."""
    return json.dumps([prompt, sorted(responses)])


def answer(store: Store, people: dict[str, int], rankings: dict[str, dict[str, dict[str, Any]]]) -> int:
    """Let each person answer all tasks as their ranking says, and skip where they have none; returns how many."""
    count = 0
    for name, person in people.items():
        while task := store.task(person):
            row = rankings[about(task.prompt, task.responses)].get(name)
            given: dict[str, Any] = {"skip": "other"}
            if row:  # equal responses have equal ranks
                place = [row["responses"].index(text) for text in task.responses]
                given = {field: [row[field][k] for k in place] for field in ("ranks", "ratings")}
            store.submit(person, task.id, f"submission {person} {task.id}", given, 1.0)
            count += bool(row)
    return count


def person(store: Store, name: str, role: access.Role = "labeler") -> int:
    """The number of a person, who has come in if they are new."""
    if row := store.one("SELECT id FROM people WHERE name = ? AND role = ?", name, role):
        return row["id"]
    found = access.person(store, access.enter(store, access.invite(store, name, role)) or "")
    assert found and (found.name, found.role) == (name, role)
    return found.id


def invite(store: Store, names: Iterable[Any]) -> dict[str, int]:
    """The numbers of new people."""
    store.set_rules(RULES)
    return {str(name): person(store, str(name)) for name in names}


@contextlib.contextmanager
def working(db: Path, names: Iterable[Any], rows: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Within, people answer whatever is asked, in a thread."""
    rankings, ended, failed = known(rows), threading.Event(), list[BaseException]()
    with Store(db) as store:
        people = invite(store, names)

    def work() -> None:
        try:
            with Store(db) as store:
                while not ended.is_set():
                    answer(store, people, rankings)
                    time.sleep(0.02)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not failed, failed
