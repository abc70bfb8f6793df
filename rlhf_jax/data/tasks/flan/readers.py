"""Readers that most published data sets share: a record becomes an example, or None if it is of no use."""

from collections.abc import Callable, Iterable, Mapping

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.task import Example, Template

Reader = Callable[[Row], Example | None]


def example(fields: Mapping[str, str], answers: Iterable[str], options: Iterable[str] = ()) -> Example | None:
    """An example of these texts, stripped; None if one is empty, options are alike, or the answer is none of them."""
    fields = {name: text.strip() for name, text in fields.items()}
    options = tuple(option.strip() for option in options)
    answers = tuple(dict.fromkeys(filter(None, (answer.strip() for answer in answers))))
    if options:
        answers = tuple(answer for answer in answers if answer in options)
    if not answers or not all((*fields.values(), *options)) or len(set(options)) < len(options):
        return None
    return Example(fields, answers, options)


def labelled(
    fields: Mapping[str, str],
    options: tuple[str, ...],
    label: str = "label",
    clean: Callable[[str], str] = str.strip,
) -> Reader:
    """A reader of classification: `label` numbers the options; it is negative where the answer is kept secret.

    `fields` says, for each field of the example, which feature of the record holds its text.
    """

    def read(row: Row) -> Example | None:
        number = int(row[label])
        if not 0 <= number < len(options):
            return None
        return example({name: clean(row[feature]) for name, feature in fields.items()}, [options[number]], options)

    return read


def written(
    fields: Mapping[str, str], answer: str, others: str = "", clean: Callable[[str], str] = str.strip
) -> Reader:
    """A reader of free text: `answer` is learnt; those in the list `others`, if it is named, are right as well."""

    def read(row: Row) -> Example | None:
        texts = {name: clean(row[feature]) for name, feature in fields.items()}
        return example(texts, [row[answer], *(row[others] if others else ())])

    return read


def chosen(options: list[str], number: int) -> list[str]:
    """The option of that number, as the only answer; no answer if it is kept secret (negative)."""
    return options[number : number + 1] if number >= 0 else []


def asked(*prompts: str) -> tuple[Template, ...]:
    """Templates that ask for the answer."""
    return tuple(Template(prompt) for prompt in prompts)
