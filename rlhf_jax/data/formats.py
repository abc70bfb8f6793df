"""Formats in which preferences and demonstrations are published, read as they come.

    spec                      data                                              rows
    hh:PATH                   Anthropic HH (arXiv:2204.05862)                   rankings
    tldr:PATH                 OpenAI's TL;DR comparisons (arXiv:2009.01325)     rankings
    webgpt:PATH               WebGPT comparisons (arXiv:2112.09332)             rankings
    finegrained:PATH          Fine-grained RLHF, K = 4 (arXiv:2306.01693)       rankings
    ultrafeedback:PATH        UltraFeedback, K = 4, or pairs (arXiv:2310.01377) rankings
    helpsteer:PATH            HelpSteer 1 and 2 (arXiv:2406.08673)              rankings
    helpsteer3:PATH           HelpSteer3 preferences (arXiv:2505.11475)         rankings
    rewardbench:PATH          RewardBench 1 and 2 (arXiv:2403.13787)            rankings
    nectar:PATH               Nectar, K = 7                                     rankings
    alpaca:PATH               Stanford Alpaca                                   demonstrations
    dolly:PATH                Databricks Dolly                                  demonstrations
    gsm8k:PATH                GSM8K (arXiv:2110.14168)                          demonstrations, examples
    p3:PATH                   P3 (arXiv:2110.08207)                             demonstrations
    sharegpt:PATH             ShareGPT, {"conversations"}                       demonstrations
    template:TEMPLATES:PATH   fields put into templates (arXiv:2109.01652)      demonstrations
    prm800k:PATH              PRM800K (arXiv:2305.20050)                        steps
    cot:PATH.tsv              the chains of thought of FLAN (arXiv:2301.13688): question, answer and rationale,
                              between tabs                                      examples
    bbh:PATH.json             BIG-Bench Hard (arXiv:2210.09261)                 examples, to evaluate by alone
    sst:PATH.csv              Stanford Sentiment Treebank: label, sentence      examples

All but examples give prompts too, those of gsm8k with their "answer". PATH is a file, or a pattern of files, of any
kind that `files` reads, or a data set of the Hub, as in nectar:hub:berkeley-nest/Nectar. TEMPLATES is such a file, of
{"prompt", "target"} in which {name} stands for the field of that name; the rows take the templates in turn. The
options of cot and bbh stand in the question, behind "Options:", and stay there: their templates need no {options}. bbh
has the splits "held_out" and, for prompts, "shots": the examples of the file PATH.cot.txt beside it.

A row that is not of its format is an InputError, as everywhere. What is of its format but of no use is refused and
counted: dialogues that differ before the last turn, responses that are empty or all alike. `Rows.counts` has the
counts, and they are printed.
"""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.data import builders, files, gsm8k, hub, json_lines
from rlhf_jax.data import rows as rows_lib
from rlhf_jax.data.files import Origin, Values
from rlhf_jax.data.rows import Kind, Row, Rows, field, json_object, short, text_field
from rlhf_jax.data.tokenizer import Message
from rlhf_jax.types import InputError

# (row, where, counts) to a ranking or demonstration, or to None, counted.
Reader = Callable[[Any, str, Counter[str]], Row | None]

_SPEAKERS = {"Human": "user", "User": "user", "Assistant": "assistant"}
_PAIRS = tuple(itertools.combinations(range(4), 2))  # 12, 13, 14, 23, 24, 34


def read(kind: Kind, reader: Reader, title: object, counts: Counter[str], values: Values) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of each usable row of `values`, in canonical form; the place names `title` and the row in it.

    Raises InputError for a row of another format, and if no row is usable.
    """
    kept = 0
    for where, value in values:
        row = reader(value, where, counts)
        if row is not None:
            row = _AS[kind](row, where, counts)
        if row is not None:
            kept += 1
            yield builders.place(title, where), row
    if not kept:
        refused = "; ".join(f"{n} {what}" for what, n in counts.items())
        raise InputError(f"{title}: expected rows of {kind}, got {refused or 'an empty file'}")


def _ranking(row: Row, where: str, counts: Counter[str]) -> Row | None:
    if not all(response.strip() for response in row["responses"]):
        counts["rows refused, a response is empty"] += 1
        return None
    if len(set(row["responses"])) == 1:
        counts["rows refused, the responses are the same"] += 1
        return None
    return row


def _demonstration(row: Row, where: str, counts: Counter[str]) -> Row:
    return {name: row[name] for name in ("messages", "prompt", "completion") if name in row}


def _prompt(row: Row, where: str, counts: Counter[str]) -> Row:
    if "messages" in row:
        return {"prompt": row["messages"][:-1]}
    return {name: row[name] for name in ("prompt", "answer") if name in row}


def _example(row: Row, where: str, counts: Counter[str]) -> Row:
    return rows_lib.check("examples", row, where)


def _whole(row: Row, where: str, counts: Counter[str]) -> Row:
    return row


_AS: dict[Kind, Reader] = {  # what the rows of a format become as rows of a kind
    "rankings": _ranking,
    "demonstrations": _demonstration,
    "prompts": _prompt,
    "steps": _whole,
    "examples": _example,
}


# -- rankings ----------------------------------------------------------------------------------------------------------


def hh(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read two dialogues, which share all but the assistant's last turn: the prompt."""
    chosen, rejected = (
        read_dialogue(text_field(row, name, where), f"{where}, field {name}") for name in ("chosen", "rejected")
    )
    for dialogue in (chosen, rejected):
        if [turn["role"] for turn in dialogue] != ["user", "assistant"] * (len(dialogue) // 2):
            counts["rows refused, speakers do not take turns"] += 1
            return None
    if chosen[:-1] != rejected[:-1]:
        counts["rows refused, dialogues differ before the last turn"] += 1
        return None
    return {"prompt": chosen[:-1], "responses": [chosen[-1]["content"], rejected[-1]["content"]], "ranks": [0, 1]}


def read_dialogue(text: str, where: str) -> list[Message]:
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


def ultrafeedback(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read an instruction and its completions, ranked by the mean of their fine-grained scores; equal scores are a tie.

    The overall score stands in where a row has no fine-grained ones. The binarised form is read too: two dialogues,
    "chosen" and "rejected".
    """
    if "completions" not in json_object(row, where):
        return _pair(row, where, counts)
    instruction, texts, scores = text_field(row, "instruction", where), [], []
    for k, completion in enumerate(_list(field(row, "completions", where), None, f"{where}, field completions")):
        part_where = f"{where}, field completions[{k}]"
        texts.append(text_field(completion, "response", part_where))
        score = next((completion[name] for name in ("fine-grained_score", "overall_score")
                      if completion.get(name) is not None), None)  # fmt: skip
        if score is None:
            counts["rows refused, a response has no score"] += 1
            return None
        scores.append(_number(score, f"{part_where}, field fine-grained_score"))
    if len(texts) < 2:
        counts["rows refused, fewer than two responses"] += 1
        return None
    ranks = rows_lib.ranks_of(scores, len(scores), f"{where}, field completions")
    return {"prompt": _asked(instruction), "responses": texts, "ranks": ranks}


def _pair(row: Row, where: str, counts: Counter[str]) -> Row | None:
    """Read two dialogues in messages, which share all but the last one."""
    chosen, rejected = (rows_lib.parse_messages(field(row, name, where), f"{where}, field {name}")
                        for name in ("chosen", "rejected"))  # fmt: skip
    if chosen[:-1] != rejected[:-1]:
        counts["rows refused, dialogues differ before the last turn"] += 1
        return None
    return rows_lib.check("rankings", {"chosen": chosen, "rejected": rejected}, where)


def helpsteer(rows: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read the responses to one prompt, ranked by their helpfulness.

    In the file each has a row of its own. `rows` are pairs (place, row), which `grouped` has put together.
    """
    texts, scores, prompt = [], [], ""
    for row_where, row in rows:
        prompt = text_field(row, "prompt", row_where)
        texts.append(text_field(row, "response", row_where))
        scores.append(_number(field(row, "helpfulness", row_where), f"{row_where}, field helpfulness"))
    if len(texts) < 2:
        counts["rows refused, the only response to its prompt"] += 1
        return None
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n", prompt)
    turns = ["User", first, *rest]
    messages = [{"role": _SPEAKERS[speaker], "content": text}
                for speaker, text in zip(turns[::2], turns[1::2], strict=True)]  # fmt: skip
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    if [one["role"] for one in messages] != (["user", "assistant"] * len(messages))[: len(messages)]:
        counts["rows refused, speakers do not take turns"] += 1
        return None
    if messages[-1]["role"] != "user":
        counts["rows refused, the user does not have the last word"] += 1
        return None
    ranks = rows_lib.ranks_of(scores, len(scores), f"{where}, field helpfulness")
    return {"prompt": messages, "responses": texts, "ranks": ranks}


def grouped(values: Values) -> Values:
    """Yield the pairs (place, row) of consecutive rows of one prompt as a list, behind the first one's place."""
    for _, group in itertools.groupby(values, lambda pair: pair[1].get("prompt") if isinstance(pair[1], dict) else 0):
        rows = list(group)
        yield rows[0][0], rows


def helpsteer3(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a conversation and two responses, with a preference from -3, the first is much better, to 3."""
    name = "overall_preference"
    preference = field(row, name, where)
    if type(preference) is not int or not -3 <= preference <= 3:
        raise InputError(f"{where}, field {name}: expected an integer from -3 to 3, got {short(preference)}")
    responses = [text_field(row, name, where) for name in ("response1", "response2")]
    ranks = [int(preference > 0), int(preference < 0)]
    context = {"prompt": field(row, "context", where), "responses": responses, "ranks": ranks}
    if not isinstance(context["prompt"], list):
        raise InputError(f"{where}, field context: expected a list of messages, got {short(context['prompt'])}")
    return rows_lib.check("rankings", context, where)


def rewardbench(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read a prompt, what was chosen and what was rejected: a text each or, in RewardBench 2, a list of texts each."""
    prompt, texts, ranks = text_field(row, "prompt", where), [], []
    for rank, name in enumerate(("chosen", "rejected")):
        value = field(row, name, where)
        some = _list(value, None, where) if isinstance(value, list) else [value]
        if not some:
            raise InputError(f"{where}, field {name}: expected some text, got an empty list")
        texts += [text_field({name: text}, name, where) for text in some]
        ranks += [rank] * len(some)
    return {"prompt": _asked(prompt), "responses": texts, "ranks": ranks}


def nectar(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a dialogue in the format of HH, which ends with the user's turn, and two or more answers to it.

    Their ranks are whole numbers from 1 up, perhaps written as floats. Nectar has seven answers.
    """
    turns = read_dialogue(text_field(row, "prompt", where), f"{where}, field prompt")
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        counts["rows refused, speakers do not take turns"] += 1
        return None
    texts, ranks = [], []
    for k, answer in enumerate(_list(field(row, "answers", where), None, f"{where}, field answers")):
        part_where = f"{where}, field answers[{k}]"
        texts.append(text_field(answer, "answer", part_where))
        rank = _number(field(answer, "rank", part_where), f"{part_where}, field rank")
        if rank != int(rank) or not 1 <= rank < 2**31:
            raise InputError(f"{part_where}, field rank: expected a whole number from 1 up, got {short(rank)}")
        ranks.append(int(rank) - 1)
    if len(texts) < 2:
        counts["rows refused, fewer than two responses"] += 1
        return None
    return {"prompt": turns, "responses": texts, "ranks": ranks}


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


_FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOOLS = ("function_call", "function_response", "observation", "tool", "tool_call", "tool_response")


def sharegpt(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a conversation of {"from", "value"}, with a "system" message beside it if there is one."""
    turns = _list(field(row, "conversations", where), None, f"{where}, field conversations")
    system = row.get("system") or ""
    messages = [{"role": "system", "content": text_field(row, "system", where)}] if system else []
    for n, turn in enumerate(turns):
        turn_where = f"{where}, field conversations[{n}]"
        speaker = text_field(turn, "from", turn_where)
        if speaker in _TOOLS:
            counts["rows refused, a tool speaks"] += 1
            return None
        if speaker not in _FROM:
            raise InputError(f"{turn_where}, field from: expected one of {', '.join(_FROM)}, got {short(speaker)}")
        message = {"role": _FROM[speaker], "content": text_field(turn, "value", turn_where)}
        messages.append(message | ({} if turn.get("weight") is None else {"weight": turn["weight"]}))
    said = [message["role"] for message in messages if message["role"] != "system"]
    if not said or said[0] != "user" or said[-1] != "assistant" or messages[-1]["role"] == "system":
        counts["rows refused, the user does not begin or the assistant does not end"] += 1
        return None
    return rows_lib.check("demonstrations", {"messages": messages, "tools": row.get("tools")}, where)


def p3(row: Any, where: str, counts: Counter[str]) -> Row:
    """Read an input and a target, made for an encoder and a decoder, as a message and its answer."""
    prompt, target = (text_field(row, f"{name}_pretokenized", where).strip() for name in ("inputs", "targets"))
    return {"prompt": [{"role": "user", "content": prompt}], "completion": target}


def templates(path: Path) -> Reader:
    """A reader that puts the fields of a row, text or integers, verbatim into the next of the file's templates."""
    pairs = []
    for where, value in files.values(path):
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


def _number(value: Any, where: str) -> int | float:
    if not rows_lib.is_number(value):
        raise InputError(f"{where}: expected a number, got {short(value)}")
    return value


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _label(value: Any, number: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < number:
        raise InputError(f"{where}: expected {' or '.join(map(str, range(number)))}, got {short(value)}")
    return value


# -- steps -------------------------------------------------------------------------------------------------------------


def prm800k(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a problem and the steps of its solution, each with a rating of 1, 0 or -1, along the path that was taken.

    A step that a person wrote counts as right. Where no step was chosen, the path ends with the first that was rated,
    which is wrong. Other steps that were rated beside those of the path are left out, and counted.
    """
    question = field(row, "question", where)
    problem = text_field(question, "problem", f"{where}, field question")
    label_where = f"{where}, field label"
    labelled = _list(field(field(row, "label", where), "steps", label_where), None, f"{label_where}, field steps")
    texts, labels = [], []
    for n, step in enumerate(labelled):
        step_where = f"{label_where}, field steps[{n}]"
        text, rating, others = _taken(step, step_where)
        if others:
            counts["rated steps left out, beside the path"] += others
        if rating is None:
            counts["solutions that end early, before a step without a rating"] += 1
            break
        texts.append(text)
        labels.append(rating)
        if rating < 0:
            break
    if not texts:
        counts["rows refused, no step has a rating"] += 1
        return None
    return rows_lib.check("steps", {"prompt": _asked(problem), "steps": texts, "labels": labels}, where)


def _taken(step: Any, where: str) -> tuple[str, int | None, int]:
    """The text of the step that the path takes, its rating, and how many others were rated."""
    found = []
    completions = json_object(step, where).get("completions") or []
    for k, one in enumerate(_list(completions, None, f"{where}, field completions")):
        part_where = f"{where}, field completions[{k}]"
        rating = json_object(one, part_where).get("rating")
        if rating is not None and (type(rating) is not int or not -1 <= rating <= 1):
            raise InputError(f"{part_where}, field rating: expected -1, 0 or 1, got {short(rating)}")
        found.append((text_field(one, "text", part_where), rating))
    rated = sum(rating is not None for _, rating in found)
    chosen, own = step.get("chosen_completion"), step.get("human_completion")
    if chosen is None and own is not None:
        text = own if isinstance(own, str) else text_field(own, "text", f"{where}, field human_completion")
        return text_field({"human_completion": text}, "human_completion", where), 1, rated
    if chosen is None:
        chosen = next((k for k, (_, rating) in enumerate(found) if rating is not None), 0)
    if type(chosen) is not int or not 0 <= chosen < max(len(found), 1):
        raise InputError(f"{where}, field chosen_completion: expected one of {len(found)}, got {short(chosen)}")
    if not found:
        return "", None, 0
    text, rating = found[chosen]
    return text, rating, rated - (rating is not None)


# -- examples ----------------------------------------------------------------------------------------------------------


def cot(row: Any, where: str, counts: Counter[str]) -> Row | None:
    """Read a question, its answer and a person's reasoning; line breaks are spelled \\n."""
    if not isinstance(row, list) or len(row) != 3 or not all(isinstance(text, str) for text in row):
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

    A question that lists none, and whose answer is yes or no, or True or False, has these two.
    """
    _, listed, text = row["question"].rpartition("\nOptions:\n")
    if not listed:
        return row | {"options": next(([*pair] for pair in _PAIRED if row["answer"] in pair), [])}
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


_PAIRED = ("yes", "no"), ("True", "False")
_SHOT = re.compile(r"Q: (.*?)\nA: Let's think step by step\.\n(.*?) So the answer is (.*?)\.?(?=\n\nQ: |\s*\Z)", re.S)


def bbh_values(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the examples in a file of BIG-Bench Hard or, as the split `SHOTS`, in the prompt file beside it."""
    if split == SHOTS:
        prompt, _ = _bbh_prompt(path)
        for n, (question, rationale, answer) in enumerate(_SHOT.findall(prompt), start=1):
            yield f"{path}, shot {n}", {"input": question, "target": answer, "rationale": rationale}
        return
    try:
        whole = json.loads("".join(line for _, line in json_lines.numbered_lines(path)))
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
    text = "".join(line for _, line in json_lines.numbered_lines(file))
    prompt = re.split(r"^-+$", text, maxsplit=1, flags=re.M)[-1].strip()
    if not _SHOT.search(prompt):
        raise InputError(
            f"{file}: expected examples, each Q: ... A: Let's think step by step. ... So the answer is ..."
        )
    return prompt, prompt[: prompt.index("Q: ")].strip()


def _bbh_file(path: Path) -> Path:
    return path.with_name(f"{json_lines.uncompressed(path).removesuffix('.json')}.cot.txt")


# -- sources -----------------------------------------------------------------------------------------------------------

RANKINGS: dict[str, Reader] = {
    "hh": hh,
    "tldr": tldr,
    "webgpt": webgpt,
    "finegrained": finegrained,
    "ultrafeedback": ultrafeedback,
    "helpsteer": helpsteer,
    "helpsteer3": helpsteer3,
    "rewardbench": rewardbench,
    "nectar": nectar,
}
DEMONSTRATIONS: dict[str, Reader] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "gsm8k": gsm8k.read,
    "p3": p3,
    "sharegpt": sharegpt,
}
STEPS: dict[str, Reader] = {"prm800k": prm800k}
EXAMPLES: dict[str, Reader] = {"cot": cot, "bbh": bbh, "gsm8k": gsm8k_example, "sst": sst}
READERS: dict[Kind, dict[str, Reader]] = {
    "rankings": RANKINGS,
    "demonstrations": DEMONSTRATIONS,
    "steps": STEPS,
    "prompts": RANKINGS | DEMONSTRATIONS | STEPS,
    "examples": EXAMPLES,
}
NAMES = (*dict.fromkeys(name for readers in READERS.values() for name in readers), "template")
HELD_OUT, SHOTS = "held_out", "shots"  # the splits of what is there to evaluate by alone


# How the values of a format are found in its source, from the source and the split, where they are not its very rows.
_VALUES: dict[str, Callable[[Origin, str], Values]] = {
    "bbh": lambda origin, split: (value for path in origin.paths for value in bbh_values(path, split)),
    "cot": lambda origin, split: (value for path in origin.paths for value in files.lines(path)),
    "helpsteer": lambda origin, split: grouped(origin.values()),
}
_ENDINGS = {"bbh": ".json", "cot": ".tsv"}  # of the files that these formats are of; they are nothing else


@dataclasses.dataclass(eq=False)
class FormatConfig(builders.Config):
    """`name` holds the hashes of the files' contents."""

    origin: Origin | None = None
    format: str = ""
    templates: Path | None = None


class FormatFile(builders.Builder):
    """Rows of a source in a published format."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the usable rows."""
        config, counts = self.builder_config, Counter[str]()
        reader = templates(config.templates) if config.templates else READERS[config.kind][config.format]
        find = _VALUES.get(config.format)
        values = find(config.origin, config.split) if find else config.origin.values()
        yield from read(config.kind, reader, config.origin.title, counts, values)
        self.info.metadata.update(counts)


def kinds(name: str) -> tuple[Kind, ...]:
    """The kinds of rows that a format has."""
    like = "alpaca" if name == "template" else name
    return tuple(kind for kind, readers in READERS.items() if like in readers)


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
    beside = builders.file_path(first) if first else None
    origin = find(last)
    ending = _ENDINGS.get(name, "")
    if ending and not (origin.paths and all(json_lines.uncompressed(path).endswith(ending) for path in origin.paths)):
        raise InputError(f"data {spec!r}: {name} is read from {ending} files")
    read = [beside] if beside else []
    for path in origin.paths if base == SHOTS and name == "bbh" else ():
        _bbh_prompt(path)
        read.append(_bbh_file(path))
    digests = [*map(builders.file_digest, read), origin.digest]
    config = FormatConfig(
        name="-".join(filter(None, [name, kind, *digests])),
        kind=kind,
        split=base if name == "bbh" else "train",
        origin=origin,
        format=name,
        templates=beside,
    )
    return builders.stored(lambda: FormatFile(config=config, data_dir=data_dir / origin.store), origin.title, split)


def reads(spec: str) -> bool:
    """Whether a name is that of a format and of a source that it may be in."""
    name, _, rest = spec.partition(":")
    rest = rest.partition(":")[2] if name == "template" and not rest.startswith(hub.PREFIX) else rest
    return name in NAMES and (rest.startswith(hub.PREFIX) or files.is_named(rest or spec))


def find(spec: str) -> Origin:
    """The file, the files or the data set of the Hub that a name stands for, once its format is cut off."""
    return hub.find(spec) if spec.startswith(hub.PREFIX) else files.find(spec)
