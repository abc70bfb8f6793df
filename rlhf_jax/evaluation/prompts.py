"""From a task's questions to what a model reads: the template, examples in front (arXiv:2005.14165), the chat template.

Examples come from the rows to learn from, in an order drawn by seed, and are the same for all questions, so that their
part of the prompt is read once; a question is never its own example. Where a prompt would not fit the model's context,
the last examples are left out, which is counted.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Rows, short
from rlhf_jax.data.tasks import Example, Task, in_words, shots, with_reasoning
from rlhf_jax.data.tokenizer import Ids, Tokenizer
from rlhf_jax.settings import Count, Seed, Settings, Whole
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Form(Settings):
    """How questions are put."""

    shots: Whole = 0  # examples in front of a question
    reasoning: bool = False  # ask for a chain of thought, and show those of the examples (arXiv:2201.11903)
    chat: bool = True  # as messages, by the tokenizer's chat template; False: as text
    template: Whole | None = 0  # number of the task's template; None: each question takes the next one
    same_shots: bool = True  # all questions have the same examples; False: each draws its own
    seed: Seed = 0  # of the examples


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as a model reads it."""

    row: int  # number in the held-out rows
    example: Example
    shots: int  # examples in front of it
    prompt: tokenizers.Prompt
    ids: Ids  # of the prompt
    # Of each option, or of the right answer where there are none, as it follows the prompt; () if answers are written.
    options: tuple[Ids, ...]


@dataclasses.dataclass(frozen=True)
class Room:
    """The columns for prompts and answers."""

    context: Count  # for a prompt with its answer
    answer: Whole  # for a written answer


Asked = tuple[list[Question], Counter[str]]
# How questions are answered: the likeliest option; the same with the EOS after each answer, and without options the
# right answer, token by token; or in writing.
By = Literal["rank", "read", "write"]


def held_out(task: Task, rows: Rows, limit: int | None) -> Iterator[tuple[int, Example]]:
    """Yield the usable held-out examples, with their numbers; InputError for one with an empty answer or option."""
    found = ((n, task.read(row)) for n, row in enumerate(rows))
    for n, example in itertools.islice(((n, one) for n, one in found if one is not None), limit):
        if not example.answers or not all(text.strip() for text in (*example.answers, *example.options)):
            raise InputError(
                f"task {task.name}: {rows.where(n)}: an answer or option is empty: no model could give it; have the"
                " task's reader leave such rows out"
            )
        yield n, example


def write(
    task: Task,
    questions: Sequence[tuple[int, Example]],
    tokenizer: Tokenizer,
    form: Form,
    room: Room,
    pool: Rows | None,
    by: By,
    spare: Iterable[tuple[int, Example]] = (),
) -> Asked:
    """The questions as a model reads them, and counts of what was left out, as {what: how many}.

    `pool` has the rows that examples are drawn from; None if there are to be none. Questions of `spare` take the places
    of those that do not fit. Raises InputError for a template that there is not, for one that names a field that a
    question lacks, and if no question fits.
    """
    templates = _templates(task, form)
    drawn = {n: _Examples(task, form, n, pool) for n in templates}
    written: dict[int, Question] = {}
    tried, refused = list[_Try](), Counter[str]()

    def begin(row: int, example: Example) -> _Try:
        template = templates[len(tried) % len(templates)]
        words, pairs = _in_words(task, example, form, template, ""), drawn[template].of(row, example)
        tried.append(_Try(len(tried), row, example, words, pairs, len(pairs)))
        return tried[-1]

    others = iter(spare)
    left = [begin(*question) for question in questions]
    while left:
        prompts = [_prompt(task, one.pairs[: one.shots], one.words, form) for one in left]
        answers = [[] if by == "write" else _answers(one.example, one.words[0], form.chat) for one in left]
        ended = [[by == "read"] * len(some) for some in answers]
        ids, options = tokenizers.render(tokenizer, prompts, answers, ended)
        again = []
        for one, prompt, start, ends in zip(left, prompts, ids, options, strict=True):
            if len(start) + max(map(len, ends), default=room.answer) <= room.context:
                written[one.number] = Question(one.row, one.example, one.shots, prompt, start, tuple(ends))
            elif one.shots:
                one.shots -= 1
                again.append(one)
            else:
                refused[f"questions refused, of more than {room.context} tokens with the answer"] += 1
                again += [begin(*question) for question in itertools.islice(others, 1)]
        left = again
    if not written:
        answer = f" with {room.answer} for the answer: lower --max-new-tokens," if room.answer else ":"
        raise InputError(
            f"task {task.name}: none of {len(tried)} questions fits into {room.context} tokens{answer} raise --length,"
            " or take a model with a longer context"
        )
    if short_of := form.shots - max(len(one.pairs) for one in tried):
        refused[f"examples missing in every prompt: there are no more{' with a rationale' * form.reasoning}"] = short_of
    if fewer := sum(len(tried[n].pairs) > one.shots for n, one in written.items()):
        refused[f"questions with fewer than {form.shots} examples, as many as fit the context"] = fewer
    return [written[n] for n in sorted(written)], refused


@dataclasses.dataclass
class _Try:
    """A question that is being fitted into the context."""

    number: int
    row: int
    example: Example
    words: tuple[str, str]
    pairs: list[shots.Pair]
    shots: int  # of the pairs, how many stand in front of it


def check_options(task: Task, rows: Rows, questions: Sequence[Question]) -> None:
    """Raise InputError for a question of which two options are the same tokens."""
    for question in questions:
        seen: dict[bytes, str] = {}
        for option, ids in zip(_texts(question.example), question.options, strict=True):
            other = seen.setdefault(ids.tobytes(), option)
            if other != option or not len(ids):
                raise InputError(
                    f"task {task.name}: {rows.where(question.row)}: the options {short(other)} and {short(option)} are"
                    " the same tokens to this model, so they cannot be ranked: spell them differently"
                )


def empty(tokenizer: Tokenizer, chat: bool) -> Ids:
    """The prompt that asks nothing, at whose end an option is only as likely as it is by itself."""
    prompt: tokenizers.Prompt = [{"role": "user", "content": ""}] if chat else ""
    ids = tokenizers.render(tokenizer, [prompt], [[]])[0][0]
    return ids if len(ids) else np.array([tokenizer.eos_token_id], np.int32)


def shown(tokenizer: Tokenizer, question: Question) -> str:
    """The whole prompt as the model reads it, with its control tokens."""
    return tokenizer.decode(question.ids, skip_special_tokens=False)


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a chat template that is not the one of ours for those without."""
    return not str(tokenizer.chat_template).endswith(tokenizers.CHAT_TEMPLATE)


def _templates(task: Task, form: Form) -> list[int]:
    """The numbers of the templates in which questions are put, all of which ask for the answer."""
    asking = [n for n, template in enumerate(task.templates) if not template.turned]
    if form.template is None:
        if not asking:
            raise InputError(
                f"task {task.name}: no template asks for the answer; give it one whose target is {{answer}}"
            )
        return asking
    if form.template >= len(task.templates):
        last = len(task.templates) - 1
        raise InputError(f"task {task.name} has templates 0 to {last}, and no template {form.template}: choose another")
    if form.template not in asking:
        raise InputError(f"task {task.name}: template {form.template} asks for something other than the answer")
    return [form.template]


def _in_words(task: Task, example: Example, form: Form, number: int, where: str) -> tuple[str, str]:
    """The prompt and the answer of an example, which in a question's own prompt need have no rationale."""
    template, place = task.templates[number], f"task {task.name}, template {number}{where}"
    if not form.reasoning:
        return in_words(example, template, place)
    known = example if example.rationale else dataclasses.replace(example, rationale="none")
    return with_reasoning(known, template, task.hint, place)


class _Examples:
    """The examples in front of questions, in one template."""

    def __init__(self, task: Task, form: Form, template: int, pool: Rows | None):
        self._task, self._form, self._template, self._pool = task, form, template, pool
        self._shared: list[tuple[Example, shots.Pair]] | None = None

    def of(self, row: int, asked: Example) -> list[shots.Pair]:
        """The examples in front of a question, fewer where there are no more."""
        if self._pool is None or not self._form.shots:
            return []
        if self._form.same_shots:
            if self._shared is None:  # with spares, for questions that are among them
                self._shared = list(itertools.islice(self._drawn(self._form.seed), 2 * self._form.shots + 8))
            drawn: Iterator = iter(self._shared)
        else:
            drawn = self._drawn(int(np.random.SeedSequence([self._form.seed, row]).generate_state(1)[0]))
        others = (pair for example, pair in drawn if example.fields != asked.fields)
        return list(itertools.islice(others, self._form.shots))

    def _drawn(self, seed: int) -> Iterator[tuple[Example, shots.Pair]]:
        assert self._pool is not None
        numbers = range(len(self._pool)) if self._task.shots else shots.order(len(self._pool), seed)
        for n in numbers:
            example = self._task.read(self._pool[n])
            if example is not None and (example.rationale or not self._form.reasoning):
                where = f", {self._pool.where(n)}"
                yield example, _in_words(self._task, example, self._form, self._template, where)


def _prompt(task: Task, pairs: Sequence[shots.Pair], words: tuple[str, str], form: Form) -> tokenizers.Prompt:
    """The examples and the question, as messages or as text, with the task's preface."""
    preface = f"{task.preface}\n\n" if task.preface else ""
    if not form.chat:
        return preface + shots.text(pairs, words[0])
    first, *others = shots.messages(pairs, words[0])
    return [{**first, "content": preface + first["content"]}, *others]


def _answers(example: Example, prompt: str, chat: bool) -> list[str]:
    """The options, or the right answer if there are none, as they follow the prompt."""
    return list(_texts(example)) if chat else [shots.answered(prompt, text) for text in _texts(example)]


def _texts(example: Example) -> tuple[str, ...]:
    return example.options or example.answers[:1]
