"""Published data are files that everybody keeps in a place of their own: a flag has to say where."""

from typing import Any

from rlhf_jax.types import InputError

GSM8K = "train.jsonl of github.com/openai/grade-school-math"


def check_given(cfg: Any, default: Any, file: str, *names: str) -> None:
    """Raises InputError for the first of these fields that still has its default, with PATH where a path belongs.

    `file` says which file that is, and where it is published.
    """
    for name in names:
        if (value := getattr(cfg, name)) == getattr(default, name):
            flag = f"--{name}".replace("_", "-")
            raise InputError(f'{flag} is required: {flag} "{value}", where PATH is {file}')
