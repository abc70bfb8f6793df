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
    cot:PATH.tsv              the chains of thought of FLAN (arXiv:2301.13688): question, answer and rationale,
                              between tabs                                   examples
    bbh:PATH.json             BIG-Bench Hard (arXiv:2210.09261)              examples, to evaluate by alone
    gsm8k:PATH                GSM8K                                          examples
    sst:PATH.csv              Stanford Sentiment Treebank: label, sentence   examples

Rankings and demonstrations give prompts too, those of gsm8k with their "answer". PATH ends in .json (lines, or one
list) or .jsonl, or as above, or any with .gz. TEMPLATES is such a file, of {"prompt", "target"} in which {name} stands
for the field of that name; the rows take the templates in turn. The options of cot and bbh stand in the question,
behind "Options:", and stay there: their templates need no {options}. bbh has the splits "held_out" and, for prompts,
"shots": the examples of the file PATH.cot.txt beside it.

A row that is not of its format is an InputError, as everywhere. What is of its format but of no use is refused and
counted: dialogues that differ before the last turn, responses that are empty or all alike. `Rows.counts` has the
counts, and they are printed.
"""

import csv
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data import builders, gsm8k
from rlhf_jax.data.builders import Kind, Row, Rows, field, json_object, short, text_field
from rlhf_jax.data.tokenizer import Message
from rlhf_jax.types import InputError

FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TABLES = {"cot": (".tsv", ".tsv.gz"), "sst": (".csv", ".csv.gz")}  # in place of JSON

# (row, where, counts) to a ranking or demonstration, or to None, counted.
Reader = Callable[[Any, str, Counter[str]], Row | None]

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PAIRS = tuple(itertools.combinations(range(4), 2))  # 12, 13, 14, 23, 24, 34


def read(
    kind: Kind,
    reader: Reader,
    path: Path,
    counts: Counter[str],
    values: Iterable[tuple[str, Any]] | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield the places and canonical rows of a file, or of `values`, each with its place in it.

    InputError on a row of another format, and if no row is usable.
    """
    kept = 0
    for where, value in values_of(path) if values is None else values:
        row = reader(value, where, counts)
        if row is None:
            continue
        if kind == "examples":
            row = builders.check(kind, row, where)
        elif kind == "prompts":
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


def values_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with where it stands: JSON, the fields of a .tsv, an object of those of a .csv."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".tsv"):
        for number, line in builders.numbered_lines(path):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\r\n").split("\t")
    elif name.endswith(".csv"):
        table = csv.DictReader((line for _, line in builders.numbered_lines(path)), strict=True)
        try:
            for row in table:
                where = f"{path}, line {table.line_num}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: expected {len(table.fieldnames or ())} fields, as in the first line")
                yield where, row
        except csv.Error as error:
            raise InputError(f"{path}, line {table.line_num}: expected a table in CSV ({error})") from error
    else:
        yield from builders.json_values(path)


# -- rankings ----------------------------------------------------------------------------------------------------------


def hh(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read two dialogues, which share all but the assistant's last turn: the prompt."""
    chosen, rejected = (
        turns(text_field(row, name, where), f"{where}, field {name}") for name in ("chosen", "rejected")
    )
    for turns in (chosen, rejected):
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            counts["rows refused, speakers do not take turns"] += 1
            return None
    if chosen[:-1] != rejected[:-1]:
        counts["rows refused, dialogues differ before the last turn"] += 1
        return None
    return {"prompt": chosen[:-1], "responses": [chosen[-1]["content"], rejected[-1]["content"]], "ranks": [0, 1]}


def turns(text: str, where: str) -> list[Message]:
    """The messages of a dialogue in the format of HH-RLHF; InputError if it has none."""
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


# -- examples ----------------------------------------------------------------------------------------------------------


def cot(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a question, its answer and a person's reasoning; line breaks are spelled \\n."""
    if not isinstance(row, list) or len(row) != 3:
        raise InputError(f"{where}: expected question, answer and rationale between tabs, got {short(row)}")
    question, answer, rationale = (text.replace("\\n", "\n").strip() for text in row)
    return _chosen({"question": question, "answer": answer, "rationale": rationale}, counts)


def bbh(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read an input and its target."""
    question, answer, rationale = (text_field({"rationale": ""} | json_object(row, where), name, where).strip()
                                   for name in ("input", "target", "rationale"))  # fmt: skip
    return _chosen({"question": question, "answer": answer, "rationale": rationale}, counts)


def sst(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a sentence, and whether it is positive, 1, or negative, 0."""
    label, options = text_field(row, "label", where), ["negative", "positive"]
    if label not in ("0", "1"):
        raise InputError(f"{where}, field label: expected 0 or 1, got {short(label)}")
    return {"question": text_field(row, "sentence", where), "answer": int(label), "options": options}


def gsm8k_example(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a question, the number that is its answer, and the worked answer before it as the rationale."""
    read = gsm8k.read(row, where, counts)
    worked = read["completion"].rpartition(gsm8k.MARK)[0].strip()
    return {"question": row["question"], "answer": read["answer"], "rationale": worked}


def _chosen(row: Row, counts: Counter[str]) -> Row | None:
    """The row with the options that its question lists: the lines, or their labels if the answer is one of these.

    A question that lists none, and whose answer is yes or no, has these two.
    """
    _, listed, text = row["question"].rpartition("\nOptions:\n")
    if not listed:
        return row | {"options": ["yes", "no"]} if row["answer"] in ("yes", "no") else row
    options = [line.strip().removeprefix("- ") for line in text.split("\n") if line.strip()]
    labels = [match[0] for option in options if (match := re.match(r"\([A-Z]\)|[^:]+(?=:)", option))]
    if row["answer"] not in options and len(labels) == len(options):
        options = labels
    if len(set(options)) < len(options):
        counts["rows refused, two options are the same"] += 1
        return None
    if row["answer"] not in options:
        counts["rows refused, the answer is none of the options"] += 1
        return None
    return row | {"options": options}


_SHOT = re.compile(r"Q: (.*?)\nA: Let's think step by step\.\n(.*?) So the answer is (.*?)\.?(?=\n\nQ: |\s*\Z)", re.S)


def bbh_values(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the examples in a file of BIG-Bench Hard or, as the split `SHOTS`, in the prompt file beside it."""
    if split == SHOTS:
        prompt, _ = _bbh_prompt(path)
        for n, (question, rationale, answer) in enumerate(_SHOT.findall(prompt), start=1):
            yield f"{path}, shot {n}", {"input": question, "target": answer, "rationale": rationale}
        return
    try:
        whole = json.loads("".join(line for _, line in builders.numbered_lines(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected an object in JSON ({short(str(error))})") from error
    examples = _list(field(whole, "examples", str(path)), None, f"{path}, field examples")
    yield from ((f"{path}, example {n}", example) for n, example in enumerate(examples, start=1))


def bbh_instruction(path: Path) -> str:
    """The instruction at the head of the prompt file beside a file of BIG-Bench Hard; "" if there is no such file."""
    return _bbh_prompt(path)[1] if _bbh_file(path).is_file() else ""


def _bbh_prompt(path: Path) -> tuple[str, str]:
    """The prompt beside a file of BIG-Bench Hard, without the note at its head, and the instruction in it."""
    file = _bbh_file(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; put the chain-of-thought prompt there, or ask without examples")
    text = "".join(line for _, line in builders.numbered_lines(file))
    prompt = re.split(r"^-+$", text, maxsplit=1, flags=re.M)[-1].strip()
    if not _SHOT.search(prompt):
        raise InputError(
            f"{file}: expected examples, each Q: ... A: Let's think step by step. ... So the answer is ..."
        )
    return prompt, prompt[: prompt.index("Q: ")].strip()


def _bbh_file(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.json')}.cot.txt")


# -- sources -----------------------------------------------------------------------------------------------------------

RANKINGS: dict[str, Reader] = {"hh": hh, "tldr": tldr, "webgpt": webgpt, "finegrained": finegrained}
DEMONSTRATIONS: dict[str, Reader] = {"alpaca": alpaca, "dolly": dolly, "gsm8k": gsm8k.read, "p3": p3}
EXAMPLES: dict[str, Reader] = {"cot": cot, "bbh": bbh, "gsm8k": gsm8k_example, "sst": sst}
NAMES = tuple(dict.fromkeys((*RANKINGS, *DEMONSTRATIONS, *EXAMPLES, "template")))
HELD_OUT, SHOTS = "held_out", "shots"  # the splits of what is there to evaluate by alone


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
        readers = EXAMPLES if config.kind == "examples" else RANKINGS | DEMONSTRATIONS
        reader = templates(config.templates) if config.templates else readers[config.format]
        is_bbh = config.format == "bbh"
        values = bbh_values(config.path, config.split) if is_bbh else values_of(config.path)
        yield from read(config.kind, reader, config.path, counts, values)
        self.info.metadata.update(counts)


def is_one(spec: str) -> bool:
    """Whether a spec names a format and a file of it."""
    name, _, rest = spec.partition(":")
    return name in NAMES and rest.endswith(TABLES.get(name, FILES))


def kinds(name: str) -> tuple[Kind, ...]:
    """The kinds of rows that a format has."""
    other: tuple[Kind, ...] = ("rankings", "prompts") if name in RANKINGS else ("demonstrations", "prompts")
    own = other if name in (*RANKINGS, *DEMONSTRATIONS, "template") else ()
    return (*own, "examples") if name in EXAMPLES else own


def source(spec: str, kind: Kind, data_dir: Path, split: str) -> Rows:
    """The rows of a published format; `sources.rows` calls this."""
    name, _, rest = spec.partition(":")
    base = split.partition("[")[0]
    if name == "bbh" and (kind != "examples" or base not in (HELD_OUT, SHOTS)):
        raise InputError(f"data {spec!r}: BIG-Bench Hard is there to evaluate by alone: leave it out of training")
    if kind not in kinds(name):
        raise InputError(f"data {spec!r}: {name} has {' and '.join(kinds(name))}, no {kind}")
    first, colon, last = rest.partition(":") if name == "template" else ("", "", rest)
    if name == "template" and not colon:
        raise InputError(f"data {spec!r}: expected template:TEMPLATES:PATH")
    paths = [builders.file_path(file) for file in (first, last) if file]
    read = paths
    if name == "bbh" and base == SHOTS:
        _bbh_prompt(paths[0])
        read = [*paths, _bbh_file(paths[0])]
    config = FormatConfig(
        name="-".join([name, kind, *map(builders.file_digest, read)]),
        kind=kind,
        split=base if name == "bbh" else "train",
        path=paths[-1],
        format=name,
        templates=paths[0] if first else None,
    )
    return builders.stored(lambda: FormatFile(config=config, data_dir=data_dir), str(paths[-1]), split)
