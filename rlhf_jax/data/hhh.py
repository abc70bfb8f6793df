"""Comparisons by helpfulness, honesty and harmlessness, out of files of the shape of the HHH alignment set.

Two shapes are read:

    JSON Lines     {"prompt", "chosen", "rejected", "subset"}, where "subset" is a word such as "honest"
    BIG-bench      a .json file a subset, {"examples": [{"input", "target_scores": {text: 1, other text: 0}}]}, as in
                   the folder hhh_alignment of BIG-bench (arXiv:2206.04615); the subset is the name of the file, or of
                   its folder where that is called task.json. A folder of such files is read whole.

The input of BIG-bench is what a person says, perhaps a dialogue, in which "Human:" and "Assistant:" begin the turns.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf_jax.data import formats, json_lines
from rlhf_jax.data.rows import Row, check, field, json_object, short, text_field
from rlhf_jax.types import InputError

Subsets = dict[str, list[Row]]  # rows {"prompt", "responses": [chosen, rejected], "ranks": [0, 1]} of each


def read(path: Path) -> Subsets:
    """The comparisons of a file, or of a folder of BIG-bench's files, by subset; InputError on a bad one."""
    if path.is_dir():
        files = sorted({*path.glob("*.json"), *path.glob("*/task.json")})
        if not files:
            raise InputError(f"{path}: no comparisons here; expected files SUBSET.json or SUBSET/task.json")
    elif not path.is_file():
        raise InputError(f"{path}: no such file; name one of comparisons, or leave --data out for the world's own")
    else:
        files = [path]
    found: Subsets = {}
    for file in files:
        for where, subset, row in _big_bench(file) if file.suffix == ".json" else _json_lines(file):
            found.setdefault(subset, []).append(compared(row, where))
    if not found:
        raise InputError(f"{path}: expected comparisons, got an empty file")
    return found


def of_rankings(rankings: Iterable[Row], most: int) -> list[Row]:
    """The comparisons of rankings: each pair of responses of which one is better, in order; at most `most`."""
    pairs = (
        {"prompt": row["prompt"], "responses": [better, worse], "ranks": [0, 1]}
        for row in rankings
        for (better, first), (worse, second) in itertools.permutations(
            zip(row["responses"], row["ranks"], strict=True), 2
        )
        if first < second
    )
    return [*itertools.islice(pairs, most)]


def compared(row: Row, where: str) -> Row:
    """The canonical row of {"prompt", "chosen", "rejected"}; InputError if it is none."""
    checked = check("rankings", row, where)
    if len(checked["responses"]) != 2 or checked["ranks"] != [0, 1]:
        raise InputError(f"{where}: expected fields chosen and rejected")
    return checked


def _json_lines(file: Path) -> Iterator[tuple[str, str, Row]]:
    for where, value in json_lines.json_values(file):
        row = json_object(value, where)
        yield where, text_field(row, "subset", where), row


def _big_bench(file: Path) -> Iterator[tuple[str, str, Row]]:
    subset = file.parent.name if file.name == "task.json" else file.stem
    try:
        whole = json.loads("".join(line for _, line in json_lines.numbered_lines(file)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected JSON ({short(str(error))})") from error
    examples = field(whole, "examples", str(file))
    if not isinstance(examples, list):
        raise InputError(f"{file}, field examples: expected a list, got {short(examples)}")
    for n, example in enumerate(examples, start=1):
        where = f"{file}, example {n}"
        text = text_field(example, "input", where)
        scores = json_object(field(example, "target_scores", where), f"{where}, field target_scores")
        if sorted(scores.values(), key=str) != [0, 1]:
            shown = short(list(scores.values()))
            raise InputError(f"{where}, field target_scores: expected two answers, of 1 and of 0, got {shown}")
        rejected, chosen = sorted(scores, key=lambda answer: scores[answer])
        yield where, subset, {"prompt": _dialogue(text, where), "chosen": chosen, "rejected": rejected}


def _dialogue(text: str, where: str) -> list:
    """The messages of an input, whose first turn may lack its "Human:" and whose last is the person's."""
    begun = text if re.match(r"\s*Human:", text) else f"Human: {text}"
    messages = formats.read_dialogue(f"\n\n{begun.lstrip()}", f"{where}, field input")
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
