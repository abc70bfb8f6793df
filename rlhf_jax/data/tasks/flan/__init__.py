"""The 62 data sets of FLAN (arXiv:2109.01652, figure 3) by their TFDS names, in its 12 clusters.

The templates were written for this project.

Some sets come in parts that are tasks of their own, such as anli-r1: the name of a set ends before the hyphen.

    python -m rlhf_jax.data.tasks.flan          prints the table of them
"""

from rlhf_jax.data.tasks.flan import (
    closed_book,
    commonsense,
    coreference,
    entailment,
    miscellaneous,
    paraphrase,
    reading,
    sentiment,
    struct_to_text,
    summarization,
    translation,
)
from rlhf_jax.data.tasks.task import Task

TASKS: tuple[Task, ...] = (
    *entailment.TASKS,
    *reading.TASKS,
    *closed_book.TASKS,
    *commonsense.TASKS,
    *coreference.TASKS,
    *sentiment.TASKS,
    *paraphrase.TASKS,
    *struct_to_text.TASKS,
    *translation.TASKS,
    *summarization.TASKS,
    *miscellaneous.TASKS,
)


def set_of(task: Task) -> str:
    """The name of the data set that a task is, or is a part of."""
    return task.name.partition("-")[0]


def table() -> str:
    """All tasks as a table in Markdown; a part of a set has the number of its set."""
    sets = list(dict.fromkeys(map(set_of, TASKS)))
    lines = [
        "| set | task | cluster | TFDS name | learnt from | tested on | metric | templates | turned around |",
        "|---:|---|---|---|---|---|---|---:|---:|",
    ]
    for task in TASKS:
        turned = sum(template.turned for template in task.templates)
        lines.append(
            f"| {sets.index(set_of(task)) + 1} | {task.name} | {task.cluster} | `{task.data}` | `{task.train}` |"
            f" `{task.held_out}` | {task.metric} | {len(task.templates)} | {turned} |"
        )
    return "\n".join(lines) + "\n"
