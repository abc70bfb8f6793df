"""Grade-school maths (GSM8K, arXiv:2110.14168): worked answers that end in "#### number", and a reward that checks it.

`score_text(rows)` scores the responses of PPO by the answers that the rows of prompts carry:

    rows = sources.rows("gsm8k:train.jsonl", "prompts", data_dir=cfg.data_dir)
    ppo.main(cfg, gsm8k.score_text(rows))
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from rlhf_jax.data.rows import Row, short, text_field
from rlhf_jax.data.tokenizer import Prompt, prompt_text
from rlhf_jax.types import InputError

MARK = "####"
# A minus is a sign where nothing stands before it that one could subtract from.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)%])[-\N{MINUS SIGN}]\$?|\$[-\N{MINUS SIGN}]?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)",
    re.ASCII,
)


def read(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read the question, the worked answer without its calculator annotations, and the reference answer."""
    question, text = (text_field(row, name, where) for name in ("question", "answer"))
    _, mark, answer = text.rpartition(MARK)
    if not mark or final_number(answer) is None:
        raise InputError(f"{where}, field answer: expected {MARK} and a number at its end, got {short(text[-30:])}")
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": re.sub(r"<<[^<>]*>>", "", text),
        "answer": answer.strip(),
    }


def final_number(text: str) -> Decimal | None:
    """The first number after the last "####" or, where there is no such mark, the last number of the text."""
    _, mark, tail = text.rpartition(MARK)
    found = list(_NUMBER.finditer(tail))
    if not found:
        return None
    number = found[0 if mark else -1]
    value = Decimal(number["digits"].replace(",", ""))
    return -value if (number["sign"] or "").strip("$") else value


def reward(answer: str, response: str) -> float:
    """1.0 if the final numbers of the response and of the reference answer are equal, however spelled, else 0.0."""
    number = final_number(response)
    return float(number is not None and number == final_number(answer))


def score_text(rows: Iterable[dict[str, Any]]) -> Callable[[Prompt, str], float]:
    """`reward` as a function of prompt and response; `rows` are prompts with their answers, or InputError."""
    rows = list(rows)
    if any("answer" not in row for row in rows):
        raise InputError("the prompts come without answers to check responses by: name them as gsm8k:PATH")
    answers = {prompt_text(row["prompt"]): row["answer"] for row in rows}
    return lambda prompt, response: reward(answers[prompt_text(prompt)], response)
