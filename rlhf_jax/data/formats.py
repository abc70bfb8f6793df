"""Formats in which preferences and demonstrations are published, read as they come.

    spec                      data                                           rows
    hh:PATH                   Anthropic HH (arXiv:2204.05862)                rankings
    tldr:PATH                 OpenAI's TL;DR comparisons (arXiv:2009.01325)  rankings
    webgpt:PATH               WebGPT comparisons (arXiv:2112.09332)          rankings
    finegrained:PATH          Fine-grained RLHF, K = 4 (arXiv:2306.01693)    rankings
    alpaca:PATH               Stanford Alpaca                                demonstrations
    dolly:PATH                Databricks Dolly                               demonstrations
    gsm8k:PATH                GSM8K (arXiv:2110.14168)                       demonstrations
    p3:PATH                   P3 (arXiv:2110.08207)                          demonstrations
    template:TEMPLATES:PATH   fields put into templates (arXiv:2109.01652)   demonstrations

Each gives prompts too, those of gsm8k with their "answer". PATH ends in .json (lines, or one list), .jsonl, or either
with .gz. TEMPLATES is such a file, of {"prompt", "target"} in which {name} stands for the field of that name; the rows
take the templates in turn.

A row that is not of its format is an InputError, as everywhere. What is of its format but of no use is refused and
counted: dialogues that differ before the last turn, responses that are empty or all alike. `Rows.counts` has the
counts, and they are printed.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data import builders, gsm8k
from rlhf_jax.data.builders import Kind, Row, Rows, field, json_object, short, text_field
from rlhf_jax.data.tokenizer import Message
from rlhf_jax.types import InputError

FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

# (row, where, counts) to a ranking or demonstration, or to None, counted.
Reader = Callable[[Any, str, Counter[str]], Row | None]

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PAIRS = tuple(itertools.combinations(range(4), 2))  # 12, 13, 14, 23, 24, 34


def read(kind: Kind, reader: Reader, path: Path, counts: Counter[str]) -> Iterator[tuple[str, Row]]:
    """Yield the places and canonical rows of a file; InputError on a row of another format, and if no row is usable."""
    kept = 0
    for where, value in builders.json_values(path):
        row = reader(value, where, counts)
        if row is None:
            continue
        if kind == "prompts":
            row = {name: row[name] for name in ("prompt", "answer") if name in row}
        elif kind == "demonstrations":
            row = {name: row[name] for name in ("prompt", "completion")}
        elif not all(response.strip() for response in row["responses"]):
            counts["rows refused, a response is empty"] += 1
            continue
        elif len(set(row["responses"])) == 1:
            counts["rows refused, the responses are the same"] += 1
            continue
        kept += 1
        yield builders.place(path, where), row
    if not kept:
        refused = "; ".join(f"{n} {what}" for what, n in counts.items())
        raise InputError(f"{path}: expected rows of {kind}, got {refused or 'an empty file'}")


# -- rankings ----------------------------------------------------------------------------------------------------------


def hh(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read two dialogues, which share all but the assistant's last turn: the prompt."""
    chosen, rejected = (
        _turns(text_field(row, name, where), f"{where}, field {name}") for name in ("chosen", "rejected")
    )
    for turns in (chosen, rejected):
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            counts["rows refused, speakers do not take turns"] += 1
            return None
    if chosen[:-1] != rejected[:-1]:
        counts["rows refused, dialogues differ before the last turn"] += 1
        return None
    return {"prompt": chosen[:-1], "responses": [chosen[-1]["content"], rejected[-1]["content"]], "ranks": [0, 1]}


def _turns(text: str, where: str) -> list[Message]:
    before, *rest = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not rest:
        raise InputError(f"{where}: expected a dialogue that begins with an empty line and Human:, got {short(text)}")
    return [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(rest[::2], rest[1::2], strict=True)
    ]


def tldr(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a Reddit post, or a news article, and two summaries, rendered as in the paper.

    A summary begins with one space: the published ones do or do not, by who wrote them.
    """
    part_where = f"{where}, field info"
    info = json_object(field(row, "info", where), part_where)
    if info.get("article") is not None:
        prompt = f"Article:\n\n{text_field(info, 'article', part_where)}\n\nTL;DR:"
    else:
        subreddit, title, post = (text_field(info, name, part_where) for name in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    summaries = _list(field(row, "summaries", where), 2, f"{where}, field summaries")
    texts = []
    for k, summary in enumerate(summaries):
        part_where = f"{where}, field summaries[{k}]"
        texts.append(" " + text_field(summary, "text", part_where).strip())
    choice = _label(field(row, "choice", where), 2, f"{where}, field choice")
    return {"prompt": prompt, "responses": texts, "ranks": [choice, 1 - choice]}


def webgpt(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a question and two answers, of which the one with the higher score is better; equal scores are a tie.

    OpenAI's file has a list of two records a row, Hugging Face's copy has one object.
    """
    if isinstance(row, list):
        records = [(record, f"{where}[{k}]", "") for k, record in enumerate(_list(row, 2, where))]
    else:
        records = [(row, where, "_0"), (row, where, "_1")]
    first, part_where, _ = records[0]
    question = text_field(field(first, "question", part_where), "full_text", f"{part_where}, field question")
    answers = [text_field(record, f"answer{suffix}", part_where) for record, part_where, suffix in records]
    scores = []
    for record, part_where, suffix in records:
        score = field(record, f"score{suffix}", part_where)
        if type(score) not in (int, float) or not -1 <= score <= 1:
            raise InputError(f"{part_where}, field score{suffix}: expected a number from -1 to 1, got {short(score)}")
        scores.append(score)
    ranks = [int(score < max(scores)) for score in scores]
    return {"prompt": [{"role": "user", "content": question}], "responses": answers, "ranks": ranks}


def finegrained(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a question about passages, four answers, and a label for each pair of them.

    The ranks are by Copeland's score, the number of wins less that of losses. Where the labels are transitive, that is
    their order, ties included. Where they are not, no ranks agree with all of them: such rows are kept, and counted.
    """
    question = text_field(row, "question", where)
    passages = []
    for n, passage in enumerate(_list(field(row, "passages", where), None, f"{where}, field passages")):
        part_where = f"{where}, field passages[{n}]"
        if not _list(passage, None, part_where):
            raise InputError(f"{part_where}: expected a title and sentences, got an empty list")
        title, *sentences = (text_field({f"[{k}]": part}, f"[{k}]", part_where) for k, part in enumerate(passage))
        passages.append(f"{title}\n{' '.join(sentences)}\n\n")
    labels = _list(field(row, "preference", where), 6, f"{where}, field preference")
    won = [[0] * 4 for _ in range(4)]  # 1 over a worse one, -1 over a better one
    for n, ((i, j), label) in enumerate(zip(_PAIRS, labels, strict=True)):
        won[i][j] = (0, 1, -1)[_label(label, 3, f"{where}, field preference[{n}]")]
        won[j][i] = -won[i][j]
    if broken := sum(_intransitive(won, *triple) for triple in itertools.combinations(range(4), 3)):
        counts["rows with intransitive labels, ranked by wins less losses"] += 1
        counts["triples of responses with intransitive labels"] += broken
    score = [sum(row) for row in won]
    levels = sorted(set(score), reverse=True)
    return {
        "prompt": [{"role": "user", "content": "".join(passages) + question}],
        "responses": [text_field(row, f"prediction {k}", where) for k in (1, 2, 3, 4)],
        "ranks": [levels.index(x) for x in score],
    }


def _intransitive(won: list[list[int]], i: int, j: int, k: int) -> bool:
    """Whether no ranks of the three, ties allowed, agree with all of their labels."""
    first, second, both = won[i][j], won[j][k], won[i][k]
    return first * second >= 0 and both != max(-1, min(1, first + second))


# -- demonstrations ----------------------------------------------------------------------------------------------------


def alpaca(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read an instruction, its input (which may be empty), and the output."""
    return _instruction(row, where, "input", "output")


def dolly(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read an instruction, its context (which may be empty), and the response."""
    return _instruction(row, where, "context", "response")


def _instruction(row: Any, where: str, about: str, answer: str) -> Row:
    instruction, context, completion = (text_field(row, name, where) for name in ("instruction", about, answer))
    content = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {"prompt": [{"role": "user", "content": content}], "completion": completion}


def p3(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read an input and a target, made for an encoder and a decoder, as a message and its answer."""
    prompt, target = (text_field(row, f"{name}_pretokenized", where).strip() for name in ("inputs", "targets"))
    return {"prompt": [{"role": "user", "content": prompt}], "completion": target}


def templates(path: Path) -> Reader:
    """A reader that puts the fields of a row, text or integers, verbatim into the next of the file's templates."""
    pairs = []
    for where, value in builders.json_values(path):
        pairs.append((text_field(value, "prompt", where), text_field(value, "target", where)))
    if not pairs:
        raise InputError(f'{path}: expected templates, {{"prompt", "target"}}, got an empty file')
    turn = itertools.cycle(pairs)

    def reader(row: Any, where: str, counts: Counter[str]) -> Row:
        def fill(match: re.Match[str]) -> str:
            name = match[1]
            value = field(row, name, where)
            return str(value) if type(value) is int else text_field(row, name, where)

        prompt, target = (re.sub(r"\{(\w+)\}", fill, template) for template in next(turn))
        return {"prompt": prompt, "completion": target}

    return reader


def _list(value: Any, length: int | None, where: str) -> list:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise InputError(f"{where}: expected a list{f' of {length}' if length else ''}, got {short(value)}")
    return value


def _label(value: Any, number: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < number:
        raise InputError(f"{where}: expected {' or '.join(map(str, range(number)))}, got {short(value)}")
    return value


# -- sources -----------------------------------------------------------------------------------------------------------

RANKINGS: dict[str, Reader] = {"hh": hh, "tldr": tldr, "webgpt": webgpt, "finegrained": finegrained}
DEMONSTRATIONS: dict[str, Reader] = {"alpaca": alpaca, "dolly": dolly, "gsm8k": gsm8k.read, "p3": p3}
NAMES = (*RANKINGS, *DEMONSTRATIONS, "template")


@dataclasses.dataclass(eq=False)
class FormatConfig(builders.FileConfig):
    """`name` holds the hashes of the files' contents."""

    format: str = ""
    templates: Path | None = None


class FormatFile(builders.Builder):
    """Rows of a local file in a published format."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the usable rows."""
        config, counts = self.builder_config, Counter[str]()
        reader = templates(config.templates) if config.templates else (RANKINGS | DEMONSTRATIONS)[config.format]
        yield from read(config.kind, reader, config.path, counts)
        self.info.metadata.update(counts)


def source(spec: str, kind: Kind, data_dir: Path, split: str) -> Rows:
    """The rows of a published format; `sources.rows` calls this."""
    name, _, rest = spec.partition(":")
    own_kind = "rankings" if name in RANKINGS else "demonstrations"
    if kind not in (own_kind, "prompts"):
        raise InputError(f"data {spec!r}: {name} has {own_kind} and prompts, no {kind}")
    first, colon, last = rest.partition(":") if name == "template" else ("", "", rest)
    if name == "template" and not colon:
        raise InputError(f"data {spec!r}: expected template:TEMPLATES:PATH")
    paths = [builders.file_path(file) for file in (first, last) if file]
    config = FormatConfig(
        name="-".join([name, kind, *map(builders.file_digest, paths)]),
        kind=kind,
        path=paths[-1],
        format=name,
        templates=paths[0] if first else None,
    )
    return builders.stored(lambda: FormatFile(config=config, data_dir=data_dir), str(paths[-1]), split)
