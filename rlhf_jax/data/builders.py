"""Where rows come from: TFDS builders for local files and for the embedded world, and any TFDS data set by its name.

A row of each kind, as it stands in a JSON Lines file and as `source` returns it:

    text            {"text"}
    demonstrations  {"prompt", "completion"} or {"messages"}, which ends with the assistant's message
    rankings        {"prompt", "responses": [K], "ranks": [K]} (smaller is better, equal is a tie);
                    {"prompt", "chosen", "rejected"} is the same with K = 2
    prompts         {"prompt"}

A prompt is verbatim text or a list of messages, `tokenizer` says how each is rendered. A response to messages may also
be given as a list of one assistant message; `source` returns its content. Other fields are left out.

Builders store a checked row as one JSON string, because a prompt is a string or a list and TFDS features hold no
unions. They write ArrayRecord, keep the order of the rows, and need no TensorFlow. What is stored is found again by
what it was made of: the content of the file, or the parameters and the code of the world.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds
from absl import logging

from rlhf_jax.data.tokenizer import Message, Prompt
from rlhf_jax.devices import hosts
from rlhf_jax.types import InputError

Kind = Literal["text", "demonstrations", "rankings", "prompts"]
Row = dict[str, Any]

_ROLES = ("system", "user", "assistant")


class Rows:
    """The rows of one split: `len`, indexing and iteration (many times faster than one index after another).

    `counts` is what their builder counted, of the whole source, as {what: how many}. `folder` is for what is derived
    from these very rows and takes long to make again.
    """

    def __init__(
        self, records: Any, to_row: Callable[[dict[str, Any], int], Row], counts: dict[str, int], folder: Path
    ):
        self._records, self._to_row, self.counts, self.folder = records, to_row, counts, folder

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._to_row(self._records[index % len(self)], index % len(self))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1024):
            indices = range(start, min(start + 1024, len(self)))
            yield from map(self._to_row, self._records.__getitems__(indices), indices)


# -- checking rows -----------------------------------------------------------------------------------------------------


def check(kind: Kind, row: Any, where: str) -> Row:
    """The row in its canonical shape. InputError that begins with `where` and names the field if it has none."""
    row = json_object(row, where)
    if kind == "text":
        text = text_field(row, "text", where)
        if not text:
            raise InputError(f"{where}, field text: expected some text, got an empty string")
        return {"text": text}
    if kind == "demonstrations" and "messages" in row:
        messages = _messages(row["messages"], f"{where}, field messages")
        if messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
            raise InputError(f"{where}, field messages: expected a conversation that ends, not begins, with assistant")
        return {"messages": messages}
    prompt = _prompt(row, where)
    if kind == "prompts":
        return {"prompt": prompt}
    if kind == "demonstrations":
        return {
            "prompt": prompt,
            "completion": _response(field(row, "completion", where), prompt, where, "completion"),
        }
    if "responses" not in row and "chosen" in row:
        pair = [_response(field(row, name, where), prompt, where, name) for name in ("chosen", "rejected")]
        return {"prompt": prompt, "responses": pair, "ranks": [0, 1]}
    responses = field(row, "responses", where)
    if not isinstance(responses, list) or len(responses) < 2:
        raise InputError(f"{where}, field responses: expected a list of at least 2, got {short(responses)}")
    texts = [_response(response, prompt, where, f"responses[{k}]") for k, response in enumerate(responses)]
    ranks = field(row, "ranks", where)
    if (
        not isinstance(ranks, list)
        or len(ranks) != len(texts)
        or not all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks)
    ):
        raise InputError(
            f"{where}, field ranks: expected {len(texts)} integers from 0 up, one per response, got {short(ranks)}"
        )
    return {"prompt": prompt, "responses": texts, "ranks": ranks}


def json_object(value: Any, where: str) -> Row:
    """The value, if it is an object: this and the next two raise InputError that begins with `where`."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {short(value)}")
    return value


def field(row: Any, name: str, where: str) -> Any:
    """What the row has by that name."""
    if name not in json_object(row, where):
        raise InputError(f"{where}, field {name}: missing; the row has {short(sorted(row))}")
    return row[name]


def text_field(row: Any, name: str, where: str) -> str:
    """The text that the row has by that name."""
    text = field(row, name, where)
    if not isinstance(text, str):
        raise InputError(f"{where}, field {name}: expected text, got {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}, field {name}: expected Unicode text, got half of a surrogate pair") from error
    return text


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages, got {short(value)}")
    messages = []
    for n, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(f'{where}[{n}]: expected {{"role", "content"}}, got {short(message)}')
        role = text_field(message, "role", f"{where}[{n}]")
        if role not in _ROLES:
            raise InputError(f"{where}[{n}], field role: expected one of {', '.join(_ROLES)}, got {short(role)}")
        messages.append({"role": role, "content": text_field(message, "content", f"{where}[{n}]")})
    return messages


def _prompt(row: Row, where: str) -> Prompt:
    prompt = field(row, "prompt", where)
    if isinstance(prompt, str):
        return text_field(row, "prompt", where)
    if not isinstance(prompt, list):
        raise InputError(f"{where}, field prompt: expected text or a list of messages, got {short(prompt)}")
    messages = _messages(prompt, f"{where}, field prompt")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}, field prompt: expected its last message to come from the user, got assistant")
    return messages


def _response(value: Any, prompt: Prompt, where: str, name: str) -> str:
    if isinstance(value, list) and not isinstance(prompt, str):
        messages = _messages(value, f"{where}, field {name}")
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise InputError(f"{where}, field {name}: expected one assistant message, got {short(value)}")
        return messages[0]["content"]
    return text_field({name: value}, name, where)


def short(value: Any) -> str:
    """The value as an error message shows it."""
    try:
        text = repr(value)
    except RecursionError:  # JSON that is nested just not too deeply to be read
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- builders ----------------------------------------------------------------------------------------------------------


class Builder(tfds.core.GeneratorBasedBuilder):
    """Stores the rows that `rows` yields, in their order. A further reader is a subclass with `rows` and a config.

    What `rows` puts into `self.info.metadata`, as {what: how many}, is stored too, and printed whenever they are read.
    """

    VERSION = tfds.core.Version("1.0.0")  # raise it when the rows change though the config does not

    def rows(self) -> Iterator[Row]:
        """Canonical rows, as `check` returns them; InputError on a bad one."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"row": tfds.features.Text()})
        counts = tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True, metadata=counts)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for n, row in enumerate(self.rows()):
            yield n, {"row": json.dumps(row, ensure_ascii=False)}


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """Says, by its name too, all that the rows depend on. A data set has one split: no other is made in vain."""

    kind: Kind = "text"
    split: str = "train"


@dataclasses.dataclass(eq=False)
class FileConfig(Config):
    """`name` holds the hash of the file's content."""

    path: Path = Path()


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file that may be gzipped."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{path}, line {number + 1}: cannot be read ({error})") from error
            if not line:
                return
            number += 1
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}: expected UTF-8, got byte {line[error.start]:#x}") from error


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's value, or each element of the list that a .json file may hold, with where it stands."""
    lines = numbered_lines(path)
    if path.name.removesuffix(".gz").endswith(".json"):
        text = "".join(line for _, line in lines)
        if text.lstrip().startswith("["):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                line = getattr(error, "lineno", 1)
                raise InputError(f"{path}, line {line}: expected a list in JSON ({short(str(error))})") from error
            yield from ((f"{path}, row {n}", value) for n, value in enumerate(values, start=1))
            return
        lines = enumerate(text.split("\n"), start=1)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: expected a JSON object, got {short(line.strip())}") from error
        yield f"{path}, line {number}", value


def file_digest(path: Path) -> str:
    """What names the file's content."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name one that there is, or first run the experiment that writes it")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def stored(make: Callable[[], Builder], where: str, split: str) -> Rows:
    """The rows of a builder, prepared first if need be."""
    builder, records = open_records(make, where, split)
    counts = dict(builder.info.metadata or {})
    if counts:
        print(f"{where}: {'; '.join(f'{n} {what}' for what, n in counts.items())}")
    return Rows(records, lambda record, _: json.loads(record["row"]), counts, derived_folder(builder, split))


def derived_folder(builder: tfds.core.DatasetBuilder, split: str) -> Path:
    return Path(builder.data_dir) / "derived" / split


# -- TFDS --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps from the terminal what TFDS prints while it prepares."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def open_records(
    make: Callable[[], tfds.core.DatasetBuilder], where: str, split: str
) -> tuple[tfds.core.DatasetBuilder, Any]:
    """A builder and the records of a split, prepared first if need be.

    TFDS puts them in their place only when complete.
    """
    with hosts.first_before_others(), quiet():
        builder = make()
        if not builder.is_prepared():
            try:
                builder.download_and_prepare(file_format="array_record")
            except InputError:
                raise
            except Exception as error:
                # Another process may have been quicker with the same data.
                if not (builder := make()).is_prepared():
                    cause = str(error).strip().partition("\n")[0]
                    raise InputError(f"{where}: cannot be prepared ({type(error).__name__}: {cause})") from error
        try:
            records = builder.as_data_source(split)
            if not len(records):
                raise ValueError("an empty slice")
        except NotImplementedError as error:
            raise InputError(
                f"{where}: {builder.data_dir} holds it in a format without random access;"
                " delete it or choose another data directory"
            ) from error
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{where}: no rows in split {split!r}; there are {', '.join(builder.info.splits)}"
            ) from error
    return builder, records
