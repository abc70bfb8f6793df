"""A task (after FLAN, arXiv:2109.01652), and how a template puts one of its questions into words.

    task = Task(
        name="opposites",
        cluster="words",
        data="opposites.jsonl",
        templates=(
            Template("What is the opposite of {question}?{options}"),
            Template("Name a word whose opposite is {answer}.", target="{question}"),  # turned around
        ),
    )

`{options}` stands for the answers to choose from: an empty line, "OPTIONS:", and a line "- ..." for each; for nothing
where there are none.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from rlhf_jax.data import sources
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.types import InputError

# accuracy: the option chosen; exact: the text, normalised; f1: the words in common; number: the last number of the
# text; rouge (the longest common subsequence) and bleu: of texts, against any of the answers.
Metric = Literal["accuracy", "exact", "f1", "number", "rouge", "bleu"]

_FIELD = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question, with all that is known about it."""

    fields: Mapping[str, str]  # texts that templates name, such as {"premise": ..., "hypothesis": ...}
    answers: tuple[str, ...]  # all that are right, at least one; the first is learnt
    options: tuple[str, ...] = ()  # the answers to choose from; none: the answer is free text
    rationale: str = ""  # the reasoning of a person that leads to the answer; "": none is known

    @property
    def answer(self) -> str:
        """The answer that is learnt."""
        return self.answers[0]


@dataclasses.dataclass(frozen=True)
class Template:
    """A phrasing of a question: texts in which `{name}` stands for a field, `{answer}`, or `{options}`."""

    prompt: str
    target: str = "{answer}"

    @property
    def turned(self) -> bool:
        """Whether the template is turned around: something other than the answer is asked for."""
        return self.target != "{answer}"

    @property
    def names(self) -> frozenset[str]:
        """The names of the fields that the template uses."""
        return frozenset(_FIELD.findall(self.prompt + self.target)) - {"answer", "options"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of questions, how they are put, and how answers are measured."""

    name: str
    cluster: str  # tasks of one kind; a model is tested on clusters from which it has learnt nothing
    data: str  # source, as `sources.rows` takes it
    templates: tuple[Template, ...]
    metric: Metric = "accuracy"
    # A record of the source as an example, or None if it is of no use; no reader: rows are of kind "examples".
    reader: Callable[[Row], Example | None] | None = None
    train: str = "train"  # split to learn from
    held_out: str = "validation"  # split to be tested on
    hint: str = "Let's think step by step."  # asks for a chain of thought before the answer
    shots: str = ""  # split of fixed examples for prompts, in their order; "": they are drawn from `train` by seed
    preface: str = ""  # stands once in a prompt, before its examples

    def rows(self, split: str, *, data_dir: str | Path) -> Rows:
        """The rows of a split of the source, for `read`; InputError as of `sources.rows`."""
        return sources.rows(self.data, "records" if self.reader else "examples", data_dir=data_dir, split=split)

    def read(self, row: Row) -> Example | None:
        """The example in a row; None if it is of no use here, which callers count."""
        if self.reader:
            return self.reader(row)
        return Example(
            fields={"question": row["question"]},
            answers=tuple(row["answers"]),
            options=tuple(row["options"]),
            rationale=row["rationale"],
        )


def in_words(example: Example, template: Template, where: str = "template") -> tuple[str, str]:
    """The prompt and the target that a template makes of an example.

    Raises InputError if the template names a field that the example does not have; `where` says whose template it is.
    """
    choices = "\n\nOPTIONS:\n" + "\n".join(f"- {option}" for option in example.options) if example.options else ""
    known = {**example.fields, "answer": example.answer, "options": choices}

    def fill(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise InputError(f"{where}: no field {{{match[1]}}}; there are {', '.join(sorted(known))}")
        return known[match[1]]

    return _FIELD.sub(fill, template.prompt).strip(), _FIELD.sub(fill, template.target).strip()


def with_reasoning(example: Example, template: Template, hint: str, where: str = "template") -> tuple[str, str]:
    """`in_words` where the rationale comes before the answer: the form in which chains of thought are learnt and asked.

    Raises InputError if the example has no rationale.
    """
    if not example.rationale:
        raise InputError(f"{where}: this example has no rationale, so there is no chain of thought to show")
    prompt, target = in_words(example, template, where)
    return f"{prompt}\n{hint}", f"{example.rationale} So the answer is {target}."
