"""The words on the pages, in each language, out of `pages/words.json`: {name: [English, Chinese]}."""

import functools
import json
from pathlib import Path

LANGUAGES = {"en": "English", "zh": "中文"}


@functools.cache
def of(language: str) -> dict[str, str]:
    """The words of a language, by name."""
    table = json.loads((Path(__file__).parent / "pages" / "words.json").read_text(encoding="utf-8"))
    return {name: said[list(LANGUAGES).index(language)] for name, said in table.items()}
