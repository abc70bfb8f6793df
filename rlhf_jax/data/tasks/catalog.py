"""The tasks that there are, by name: collections of them, their clusters, each of them, and files of questions."""

import collections
import difflib
from collections.abc import Sequence

from rlhf_jax.data.tasks import files, flan, world
from rlhf_jax.data.tasks.task import Task
from rlhf_jax.types import InputError

COLLECTIONS: dict[str, tuple[Task, ...]] = {"world": world.TASKS, "flan": flan.TASKS}


def select(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that the names stand for, each once: a collection, a cluster, a task, or a file as of `files.task`.

    A cluster or a task that several collections have is that of the first one, or of the one named before a slash:
    "flan/entailment". Raises InputError for a name that stands for none.
    """
    found = tuple(dict.fromkeys(task for name in names for task in _find(name)))
    if not found:
        raise InputError(
            f"no tasks: name collections ({', '.join(COLLECTIONS)}), clusters, tasks, or files of questions"
        )
    twice = [name for name, count in collections.Counter(task.name for task in found).items() if count > 1]
    if twice:
        raise InputError(f"several tasks have the name {twice[0]!r}: leave all but one of them out")
    return found


def _find(name: str) -> Sequence[Task]:
    if files.is_file(name):
        return [files.task(name)]
    collection, slash, rest = name.partition("/")
    if not slash and name in COLLECTIONS:
        return COLLECTIONS[name]
    for tasks in [COLLECTIONS.get(collection, ())] if slash else COLLECTIONS.values():
        wanted = rest if slash else name
        if some := [task for task in tasks if task.cluster == wanted] or [
            task for task in tasks if task.name == wanted
        ]:
            return some
    every = [task for tasks in COLLECTIONS.values() for task in tasks]
    clusters = dict.fromkeys(task.cluster for task in every)
    near = difflib.get_close_matches(name, [*COLLECTIONS, *clusters, *(task.name for task in every)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"no task {name!r}{hint}: expected a file of questions, one of {', '.join(COLLECTIONS)}, a task, or a cluster:"
        f" {', '.join(clusters)}"
    )
