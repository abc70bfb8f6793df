"""Translation from English, and, turned around, into it.

As many pairs of languages as the paper counts (eight): those of the code that its authors published.
"""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import Reader, asked, example
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "translation"
_TEMPLATES = (
    *asked(
        "Translate into {language}: {english}",
        "{english}\n\nHow does one say this in {language}?",
        "English: {english}\n{language}:",
        "Write the following sentence in {language}.\n\n{english}\n\nTranslation:",
        "A friend who speaks nothing but {language} would like to understand this: {english}\n\nIn {language} it"
        " reads:",
        '"{english}"\n\nWhat is the {language} for that?',
        "Give a {language} translation of the text.\n\nText: {english}\n\n{language} text:",
    ),
    Template("Translate from {language} into English: {answer}", target="{english}"),
    Template("{answer}\n\nWhat does this {language} sentence mean in English?", target="{english}"),
    Template("{language}: {answer}\nEnglish:", target="{english}"),
)


def _reader(code: str, language: str) -> Reader:
    def read(row: Row) -> Example | None:
        return example({"english": row["en"], "language": language}, [row[code]])

    return read


def _wmt(year: int, code: str, language: str) -> Task:
    return Task(
        name=f"wmt{year}_en_{code}",
        cluster=CLUSTER,
        data=f"wmt{year}_translate/{code}-en",
        templates=_TEMPLATES,
        metric="bleu",
        reader=_reader(code, language),
        held_out="test",
    )


TASKS = (
    Task(
        name="para_crawl_en_es",
        cluster=CLUSTER,
        data="para_crawl/enes",
        templates=_TEMPLATES,
        metric="bleu",
        reader=_reader("es", "Spanish"),
        train="train[:-1000]",  # all of its rows are in the one split "train"
        held_out="train[-1000:]",
    ),
    _wmt(14, "fr", "French"),
    _wmt(16, "cs", "Czech"),
    _wmt(16, "de", "German"),
    _wmt(16, "fi", "Finnish"),
    _wmt(16, "ro", "Romanian"),
    _wmt(16, "ru", "Russian"),
    _wmt(16, "tr", "Turkish"),
)
