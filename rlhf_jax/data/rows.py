"""The shapes of rows, and what checks that a row has the shape of its kind.

A row of each kind, as it stands in a JSON Lines file and as `source` returns it:

    text            {"text"}
    demonstrations  {"prompt", "completion"} or {"messages"}, which ends with the assistant's message
    rankings        {"prompt", "responses": [K], "ranks": [K]} (smaller is better, equal is a tie), and, if there are
                    any, "ratings": [K] of objects {"helpful", "honest", "harmless"}, from 1 to 7 each;
                    "scores": [K] numbers, of which more is better, may stand in place of the ranks;
                    {"prompt", "chosen", "rejected"} is the same with K = 2, and so is {"chosen", "rejected"} of two
                    dialogues, lists of messages that differ in the last one; all perhaps with "ended": [K] booleans,
                    false for a response that was cut before its end
    thumbs          {"prompt", "completion", "label"}: whether this one response is good; "response" is "completion"
    steps           {"prompt", "steps": [N texts], "labels": [N of 1 right, 0 neither, -1 wrong]}; "completions" are
                    "steps", and true and false are 1 and -1
    prompts         {"prompt"}
    examples        {"question", "answer"} and, if there are any, "options" (texts to choose from) and "rationale" (the
                    reasoning); the answer is a text, or a list of texts that are all right, or the number of an option
                    from 0; `source` returns {"question", "answers", "options", "rationale"}
    records         any object, for a reader of one's own

A prompt is verbatim text or a list of messages, `tokenizer` says how each is rendered. A response to messages may also
be given as a list of one assistant message; `source` returns its content. The content of a message is a text, or a list
of parts {"type": "text", "text"}, which are joined. A message may have a "weight": 0 where it is not to be learnt, 1
otherwise. Other fields are left out, but for those that would change what is learnt or rendered,
such as "tool_calls", which are refused.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgpack

from rlhf_jax.data.tokenizer import Message, Prompt
from rlhf_jax.types import BEST_RATING, VIRTUES, InputError

Kind = Literal["text", "demonstrations", "rankings", "prompts", "thumbs", "steps", "examples", "records"]
Row = dict[str, Any]

_ROLES = ("system", "user", "assistant")
# Fields with which others say what this project does not read, or says otherwise; what to write instead.
_UNREAD = {
    "train": '"weight": 0 or 1',
    "tool_calls": "the call as text in content",
    "function_call": "the call as text in content",
    "tool_call_id": "messages without tools",
    "reasoning_content": "the reasoning as text in content",
    "thinking": "the reasoning as text in content",
}


class Rows:
    """The rows of one split: `len`, indexing and iteration (many times faster than one index after another).

    `counts` is what their builder counted, of the whole source, as {what: how many}. `folder` is for what is derived
    from these very rows and takes long to make again. `to_row` makes a row of a record and its index, and `where` names
    the place of such a record, for errors.
    """

    def __init__(
        self,
        records: Any,
        to_row: Callable[[Any, int], Row],
        counts: dict[str, int],
        folder: Path,
        where: Callable[[Any, int], str],
    ):
        self._records, self._to_row, self.counts, self.folder = records, to_row, counts, folder
        self._where = where

    def where(self, index: int) -> str:
        """The place of a row, as an error names it."""
        return self._where(self._records[index], index)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._to_row(self._records[index % len(self)], index % len(self))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1024):
            yield from self.take(range(start, min(start + 1024, len(self))))

    def take(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers, from 0 up."""
        return map(self._to_row, self._records.__getitems__(indices), indices)


# -- checking rows -----------------------------------------------------------------------------------------------------


def check(kind: Kind, row: Any, where: str) -> Row:
    """Return the row in its canonical shape; raise InputError, naming the place and the field, if it has none."""
    return _CHECKS[kind](json_object(row, where), where)


def _record(row: Row, where: str) -> Row:
    try:
        row = json.loads(json.dumps(row))
        msgpack.packb(row)  # as it is stored
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{where}: expected what JSON can hold, with integers of at most 64 bits, got {short(str(error))}"
        ) from error
    return row


def _text(row: Row, where: str) -> Row:
    text = text_field(row, "text", where)
    if not text:
        raise InputError(f"{where}, field text: expected some text, got an empty string")
    return {"text": text}


def _prompts(row: Row, where: str) -> Row:
    return {"prompt": _prompt(row, where)}


def _demonstration(row: Row, where: str) -> Row:
    if "messages" not in row:
        prompt = _prompt(row, where)
        completion = _response(field(row, "completion", where), prompt, where, "completion")
        return {"prompt": prompt, "completion": completion}
    _refuse_tools(row, where)
    messages = parse_messages(row["messages"], f"{where}, field messages")
    if messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
        raise InputError(f"{where}, field messages: expected a conversation that ends, not begins, with assistant")
    return {"messages": messages}


def _ranking(row: Row, where: str) -> Row:
    if "responses" not in row and "chosen" in row:
        if "prompt" not in row and isinstance(row["chosen"], list):
            prompt, pair = _dialogues(row, where)
        else:
            prompt = _prompt(row, where)
            pair = [_response(field(row, name, where), prompt, where, name) for name in ("chosen", "rejected")]
        return {"prompt": prompt, "responses": pair, "ranks": [0, 1]} | _ended(row, 2, where)
    prompt = _prompt(row, where)
    responses = field(row, "responses", where)
    if not isinstance(responses, list) or len(responses) < 2:
        raise InputError(f"{where}, field responses: expected a list of at least 2, got {short(responses)}")
    texts = [_response(response, prompt, where, f"responses[{k}]") for k, response in enumerate(responses)]
    if "ranks" not in row and "scores" in row:
        ranks = ranks_of(row["scores"], len(texts), f"{where}, field scores")
    else:
        ranks = field(row, "ranks", where)
    if (
        not isinstance(ranks, list)
        or len(ranks) != len(texts)
        or not all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks)
    ):
        raise InputError(
            f"{where}, field ranks: expected {len(texts)} integers from 0 up, one per response, got {short(ranks)}"
        )
    kept = {"prompt": prompt, "responses": texts, "ranks": ranks}
    return kept | _ended(row, len(texts), where) | _ratings(row, len(texts), where)


def _dialogues(row: Row, where: str) -> tuple[Prompt, list[str]]:
    """The messages that two dialogues share, and the last one of each, which is the assistant's."""
    _refuse_tools(row, where)
    chosen, rejected = (
        parse_messages(field(row, name, where), f"{where}, field {name}") for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise InputError(f"{where}, field rejected: expected the messages of chosen but for the last one")
    prompt = _prompt({"prompt": chosen[:-1]}, where)
    return prompt, [_response(dialogue[-1:], prompt, where, name)
                    for name, dialogue in (("chosen", chosen), ("rejected", rejected))]  # fmt: skip


def ranks_of(scores: Any, count: int, where: str) -> list[int]:
    """Ranks from 0 up for scores of which more is better; equal scores are a tie."""
    if not isinstance(scores, list) or len(scores) != count or not all(map(is_number, scores)):
        raise InputError(f"{where}: expected {count} numbers, one per response, got {short(scores)}")
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) for score in scores]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


_LABELS = {"true": True, "false": False, "1": True, "0": False}  # as a table without types spells them


def _thumb(row: Row, where: str) -> Row:
    prompt = _prompt(row, where)
    name = "response" if "response" in row and "completion" not in row else "completion"
    completion = _response(field(row, name, where), prompt, where, name)
    label = field(row, "label", where)
    found = _LABELS.get(str(label).lower()) if isinstance(label, bool | int | str) else None
    if found is None:
        raise InputError(f"{where}, field label: expected true or false, got {short(label)}")
    ended = row.get("ended")
    if ended is not None and type(ended) is not bool:
        raise InputError(f"{where}, field ended: expected true or false, got {short(ended)}")
    return {"prompt": prompt, "completion": completion, "label": found} | ({} if ended is None else {"ended": ended})


def _steps(row: Row, where: str) -> Row:
    prompt = _prompt(row, where)
    name = "completions" if "completions" in row and "steps" not in row else "steps"
    steps = _texts(field(row, name, where), name, where)
    labels = field(row, "labels", where)
    if (
        not isinstance(labels, list)
        or len(labels) != len(steps)
        or not all(type(label) is bool or (type(label) is int and -1 <= label <= 1) for label in labels)
    ):
        raise InputError(
            f"{where}, field labels: expected {len(steps)} of true or false, or of 1, 0 or -1, one per step,"
            f" got {short(labels)}"
        )
    if not steps or not all(map(str.strip, steps)):
        raise InputError(f"{where}, field {name}: expected steps that are not empty, got {short(steps)}")
    return {"prompt": prompt, "steps": steps, "labels": [2 * x - 1 if type(x) is bool else x for x in labels]}


def _example(row: Row, where: str) -> Row:
    """The row with all its fields; with options, each answer is one of them."""
    question, rationale = text_field(row, "question", where), text_field({"rationale": ""} | row, "rationale", where)
    options = _texts(row.get("options", []), "options", where)
    answer = field(row, "answer", where)
    if type(answer) is int and 0 <= answer < len(options):
        answer = options[answer]
    if not isinstance(answer, str | list):
        numbers = f", or the number of an option, 0 to {len(options) - 1}" if options else ""
        raise InputError(f"{where}, field answer: expected a text, a list of texts{numbers}; got {short(answer)}")
    answers = _texts([answer] if isinstance(answer, str) else answer, "answer", where)
    if not all(text.strip() for text in (question, *answers, *options)) or not answers:
        raise InputError(f"{where}: expected a question, an answer and options that are not empty")
    if options and not set(answers) <= set(options):
        raise InputError(f"{where}, field answer: expected one of the options, got {short(answer)}")
    if len(set(options)) < len(options):
        raise InputError(f"{where}, field options: expected different ones, got {short(options)}")
    return {"question": question, "answers": answers, "options": options, "rationale": rationale}


_CHECKS: dict[Kind, Callable[[Row, str], Row]] = {
    "text": _text,
    "demonstrations": _demonstration,
    "rankings": _ranking,
    "prompts": _prompts,
    "thumbs": _thumb,
    "steps": _steps,
    "examples": _example,
    "records": _record,
}


def _texts(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list):
        raise InputError(f"{where}, field {name}: expected a list of texts, got {short(value)}")
    return [text_field({name: text}, name, where) for text in value]


def _ended(row: Row, count: int, where: str) -> Row:
    """The field "ended" in a row of its own, which is empty where the row has none."""
    ended = row.get("ended")
    if ended is None:
        return {}
    if not isinstance(ended, list) or len(ended) != count or not all(type(one) is bool for one in ended):
        raise InputError(f"{where}, field ended: expected {count} booleans, one per response, got {short(ended)}")
    return {"ended": ended}


def _ratings(row: Row, count: int, where: str) -> Row:
    """The field "ratings" in a row of its own, with the virtues alone; it is empty where the row has none."""
    ratings = row.get("ratings")
    if ratings is None:
        return {}
    if not isinstance(ratings, list) or len(ratings) != count or not all(isinstance(one, dict) for one in ratings):
        raise InputError(f"{where}, field ratings: expected {count} objects, one per response, got {short(ratings)}")
    for k, one in enumerate(ratings):
        for virtue in VIRTUES:
            rating = one.get(virtue, 1)
            if type(rating) is not int or not 1 <= rating <= BEST_RATING:
                raise InputError(
                    f"{where}, field ratings[{k}].{virtue}: expected an integer from 1 to {BEST_RATING},"
                    f" got {short(rating)}"
                )
    return {"ratings": [{virtue: one[virtue] for virtue in VIRTUES if virtue in one} for one in ratings]}


def json_object(value: Any, where: str) -> Row:
    """Return the value if it is an object, else raise InputError (whose message, as below, begins with `where`)."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {short(value)}")
    return value


def field(row: Any, name: str, where: str) -> Any:
    """The value of a field; InputError if the row has no such field."""
    if name not in json_object(row, where):
        raise InputError(f"{where}, field {name}: missing; the row has {short(sorted(row))}")
    return row[name]


def text_field(row: Any, name: str, where: str) -> str:
    """The text of a field; InputError if it holds anything else."""
    text = field(row, name, where)
    if not isinstance(text, str):
        raise InputError(f"{where}, field {name}: expected text, got {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}, field {name}: expected Unicode text, got half of a surrogate pair") from error
    return text


def _refuse_tools(row: Row, where: str) -> None:
    if row.get("tools"):
        raise InputError(f"{where}, field tools: expected conversations without tools, got {short(row['tools'])}")


def parse_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages, got {short(value)}")
    messages: list[Message] = []
    for n, message in enumerate(value):
        message_where = f"{where}[{n}]"
        if not isinstance(message, dict):
            raise InputError(f'{message_where}: expected {{"role", "content"}}, got {short(message)}')
        for name, instead in _UNREAD.items():
            if message.get(name) not in (None, [], "") and (name, message[name]) != ("train", True):
                raise InputError(f"{message_where}, field {name}: expected {instead}, got {short(message[name])}")
        role = text_field(message, "role", message_where)
        if role not in _ROLES:
            raise InputError(f"{message_where}, field role: expected one of {', '.join(_ROLES)}, got {short(role)}")
        weight = message.get("weight", 1)
        if type(weight) is not int or weight not in (0, 1):
            raise InputError(f"{message_where}, field weight: expected 0 or 1, got {short(weight)}")
        messages.append({"role": role, "content": _content(message, message_where)})
        if weight == 0:
            messages[-1]["weight"] = 0
    return messages


def _content(message: Row, where: str) -> str:
    """The text of a message, joined if it comes in parts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return text_field(message, "content", where)
    texts = []
    for n, part in enumerate(parts):
        part_where = f"{where}, field content[{n}]"
        if (kind := field(part, "type", part_where)) != "text":
            raise InputError(f"{part_where}, field type: expected text, the only type that is read, got {short(kind)}")
        texts.append(text_field(part, "text", part_where))
    return "".join(texts)


def _prompt(row: Row, where: str) -> Prompt:
    _refuse_tools(row, where)
    prompt = field(row, "prompt", where)
    if isinstance(prompt, str):
        return text_field(row, "prompt", where)
    if not isinstance(prompt, list):
        raise InputError(f"{where}, field prompt: expected text or a list of messages, got {short(prompt)}")
    messages = parse_messages(prompt, f"{where}, field prompt")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}, field prompt: expected its last message to come from the user, got assistant")
    return messages


def _response(value: Any, prompt: Prompt, where: str, name: str) -> str:
    if isinstance(value, list) and not isinstance(prompt, str):
        messages = parse_messages(value, f"{where}, field {name}")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise InputError(f"{where}, field {name}: expected one assistant message, got {short(value)}")
        if "weight" in messages[0]:
            raise InputError(f"{where}, field {name}[0], field weight: expected 1, for a response that counts, got 0")
        return messages[0]["content"]
    return text_field({name: value}, name, where)


def short(value: Any) -> str:
    """The value as an error message shows it, at most 60 characters."""
    try:
        text = repr(value)
    except RecursionError:  # JSON that is nested just not too deeply to be read
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else f"{text[:57]}..."
