"""Tasks out of files: JSON Lines of one's own, or a published format of `formats.EXAMPLES`.

A file has one split. Its first fifth is held out, and the rest is to learn from and to draw examples from.
"""

from rlhf_jax.data import builders, formats
from rlhf_jax.data.tasks.task import Metric, Task, Template
from rlhf_jax.types import InputError

_TRAIN, _HELD_OUT = "train[20%:]", "train[:20%]"
_TEMPLATES = {
    "": Template("{question}{options}"),
    "cot": Template("{question}"),  # which lists its options
    "bbh": Template("Q: {question}\nA:"),
    "gsm8k": Template("Question: {question}\nAnswer:"),
    "sst": Template("Review: {question}\nIs this review negative or positive?"),
}


def is_file(spec: str) -> bool:
    """Whether a name is that of a file of questions, rather than of a task."""
    return spec.endswith((".jsonl", ".jsonl.gz")) or spec.partition(":")[0] in formats.EXAMPLES


def task(spec: str) -> Task:
    """The task that a file is: "PATH.jsonl", of rows of kind "examples", or such as "cot:PATH.tsv" or "bbh:PATH.json".

    Raises InputError for another name. The file itself is read later, but for the instruction of BIG-Bench Hard.
    """
    name, _, rest = spec.partition(":")
    if not is_file(spec):
        raise InputError(
            f"task {spec!r}: expected a .jsonl file, or {', '.join(f'{one}:PATH' for one in formats.EXAMPLES)}"
        )
    if name not in formats.EXAMPLES:
        name, rest = "", spec
    path = builders.file_path(rest)
    stem = path.name.partition(".")[0]
    metric: Metric = "number" if name == "gsm8k" else "accuracy"
    is_bbh = name == "bbh"
    return Task(
        name=stem,
        cluster={"sst": "sentiment", "gsm8k": "maths", "bbh": "bbh"}.get(name, stem),
        data=spec,
        templates=(_TEMPLATES[name],),
        metric=metric,
        train="train" if is_bbh else _TRAIN,  # of bbh there is none to learn from, which `formats.source` says
        held_out=formats.HELD_OUT if is_bbh else _HELD_OUT,
        shots=formats.SHOTS if is_bbh else "",
        preface=formats.bbh_instruction(path) if is_bbh else "",
    )
