"""Accuracy on tasks while a model trains: questions are tokenised once, and asked again after any number of steps.

A question with options is answered by the likeliest of them; one without is answered where each token of the right
answer is the likeliest. `experiments.evaluate_tasks` measures a finished model in more ways.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.builders import short
from rlhf_jax.data.tasks import Task, in_words, shots
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.evaluation.likelihood import Reader, Request
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How tasks are asked."""

    questions: Count = 64  # of each task, the first held-out ones
    length: Count = 128  # most tokens of a question with an answer; longer ones are left out
    chat: bool = True  # as turns of the chat template; otherwise as plain text


class Question(NamedTuple):
    """A question, and what may follow it."""

    task: int
    requests: tuple[Request, ...]  # one an option; of a question without options, the right answer
    right: tuple[bool, ...]  # of each option; () if there are none


@dataclasses.dataclass(frozen=True)
class Answered:
    """How a task was answered."""

    accuracy: float  # 0 to 1
    chance: float  # accuracy of a guess among the options, 0 without any
    questions: int

    @property
    def error(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Questions of tasks, ready to be asked."""

    tasks: tuple[Task, ...]
    questions: tuple[Question, ...]

    def ask(self, reader: Reader, params: Params) -> dict[str, Answered]:
        """How each task is answered with these parameters, which are placed; by its name."""
        found = iter(reader([request for question in self.questions for request in question.requests], params))
        scores: list[list[float]] = [[] for _ in self.tasks]
        chance: list[list[float]] = [[] for _ in self.tasks]
        for question in self.questions:
            likelihoods = [next(found) for _ in question.requests]
            if question.right:
                score = float(question.right[int(np.argmax([one.total for one in likelihoods]))])
            else:
                score = float(likelihoods[0].greedy)
            scores[question.task].append(score)
            chance[question.task].append(float(np.mean(question.right)) if question.right else 0.0)
        return {
            task.name: Answered(float(np.mean(scores[n])), float(np.mean(chance[n])), len(scores[n]))
            for n, task in enumerate(self.tasks)
        }


def prepare(tasks: Sequence[Task], tokenizer: Tokenizer, cfg: Config, *, data_dir: str | Path) -> Probe:
    """The held-out questions of tasks; each takes the next of the task's templates that ask for the answer.

    Prints how many are too long. Raises InputError for a task without usable held-out rows, or without such a template.
    """
    questions: list[Question] = []
    too_long = 0
    for number, task in enumerate(tasks):
        asked, longer = _questions(number, task, tokenizer, cfg, data_dir)
        questions += asked
        too_long += longer
    if too_long:
        print(f"questions left out, of more than {cfg.length} tokens: {too_long}")
    return Probe(tuple(tasks), tuple(questions))


def _questions(
    number: int, task: Task, tokenizer: Tokenizer, cfg: Config, data_dir: str | Path
) -> tuple[list[Question], int]:
    """The questions of a task, and how many are too long."""
    templates = [(n, template) for n, template in enumerate(task.templates) if not template.turned]
    if not templates:
        raise InputError(f"task {task.name}: no template asks for the answer; give it one whose target is {{answer}}")
    try:
        rows = task.rows(task.held_out, data_dir=data_dir)
    except InputError as error:
        raise InputError(f"task {task.name} has no held-out rows: {error}") from error
    questions: list[Question] = []
    too_long = 0
    for row in rows:
        if len(questions) == cfg.questions:
            break
        if (example := task.read(row)) is None:
            continue
        place, template = templates[(len(questions) + too_long) % len(templates)]
        words, _ = in_words(example, template, f"task {task.name}, template {place}")
        prompt = shots.messages((), words) if cfg.chat else words
        texts = [text if cfg.chat else f" {text}" for text in example.options or example.answers[:1]]
        (start,), (ends,) = tokenizers.render(tokenizer, [prompt], [texts])
        if len(start) + max(map(len, ends)) > cfg.length:
            too_long += 1
            continue
        requests = tuple(Request(start.tolist(), end.tolist()) for end in ends)
        questions.append(Question(number, requests, tuple(option in example.answers for option in example.options)))
    if not questions:
        raise InputError(
            f"task {task.name}: none of its {len(rows)} held-out rows in {short(task.data)} can be asked with"
            f" {cfg.length} tokens ({too_long} are too long): use longer rows, or leave its cluster out"
        )
    return questions, too_long
