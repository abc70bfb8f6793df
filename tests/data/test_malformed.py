"""Ten thousand malformed rows for each reader: an error of one line, or a refusal that is counted, and nothing else."""

import copy
import importlib
import io
import itertools
import json
import random
import sys
from collections import Counter

import pyarrow as pa
import pytest
from tensorflow_datasets.core import registered

from rlhf_jax import data
from rlhf_jax.types import InputError
from tests.data import test_formats


def unchecked(*names):
    """Modules of `rlhf_jax.data` once more, without the checks of types in tests, which make them ten times slower."""
    full = [f"rlhf_jax.data.{name}" for name in names]
    before = {name: sys.modules.pop(name) for name in full if name in sys.modules}
    finders = sys.meta_path
    try:
        sys.meta_path = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
        with registered.skip_registration():
            return [importlib.import_module(name) for name in full]
    finally:
        sys.meta_path = finders
        for name, module in before.items():
            sys.modules[name] = module
            setattr(data, name.rpartition(".")[2], module)


NAMES = "rows", "json_lines", "files", "gsm8k", "hub", "formats"
rows_lib, json_lines, files, gsm8k, hub, formats = unchecked(*NAMES)

ROWS = 10_000
PLAIN = {
    "text": {"text": "t"},
    "demonstrations": {"prompt": "p", "completion": "c"},
    "rankings": {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 2, 1]},
    "rankings/scores": {"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1.5]},
    "rankings/pairs": {"prompt": test_formats.user("p"), "chosen": "a", "rejected": "b"},
    "rankings/dialogues": {
        "chosen": [*test_formats.user("p"), {"role": "assistant", "content": "a"}],
        "rejected": [*test_formats.user("p"), {"role": "assistant", "content": "b"}],
    },
    "prompts": {"prompt": test_formats.user("p")},
    "demonstrations/messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "p"}]},
            {"role": "assistant", "content": "a", "weight": 1},
        ]
    },
    "thumbs": {"prompt": "p", "completion": "c", "label": True},
    "steps": {"prompt": "p", "steps": ["a", "b"], "labels": [1, -1]},
    "examples": {"question": "q", "answer": "a", "options": ["a", "b"], "rationale": "r"},
}
EXAMPLES = {
    "cot": ["Which?\\nOptions:\\n- a\\n- b", "a", "It is a."],
    "bbh": {"input": "Is it?\nOptions:\n- Yes\n- No", "target": "No"},
    "sst": {"sentence": "It is good.", "label": "1"},
    "gsm8k": test_formats.GSM8K,
}
# None of these is right in any place of a row but those of numbers, of which -2 and 2**63 may be.
JUNK = [None, -2, 2**63, 10**400, float("inf"), float("nan"), {}, {"text": 5}, {"": []}, [[]], [None], [0.5] * 6,
        "\ud800", "", " ", b"\xff"]  # fmt: skip


def readers():
    for name, row in PLAIN.items():
        kind = name.partition("/")[0]
        yield name, lambda row, where, counts, kind=kind: rows_lib.check(kind, row, where), row
    for kind, named in formats.READERS.items():
        for name, reader in named.items():
            if kind == "examples":
                yield f"{name}/examples", as_kind(kind, reader), EXAMPLES[name]
            elif kind != "prompts" and name != "helpsteer":
                yield name, as_kind(kind, reader), test_formats.ROWS[name]
    yield "ultrafeedback/pairs", as_kind("rankings", formats.ultrafeedback), test_formats.DIALOGUES
    placed = lambda rows, where, counts: formats.helpsteer([(where, row) for row in rows], where, counts)
    yield "helpsteer", as_kind("rankings", placed), test_formats.HELPSTEER


def as_kind(kind, reader):
    """The reader with what `formats.read` does to each of its rows."""

    def read(row, where, counts):
        found = reader(row, where, counts)
        return found and formats._AS[kind](found, where, counts)

    return read


READERS = {name: rest for name, *rest in readers()}


def places(row):
    """The places of all values of a row, each as what holds it and its key there."""
    items = row.items() if isinstance(row, dict) else enumerate(row) if isinstance(row, list) else ()
    for key, value in list(items):
        yield row, key
        yield from places(value)


@pytest.mark.parametrize("name", READERS)
def test_rows(name):
    reader, good = READERS[name]
    row = copy.deepcopy(good)
    spots = [*places(row)]
    assert reader(row, "row 0", Counter()) is not None
    rng, seen, counts = random.Random(name), Counter(), Counter()
    for n in range(ROWS):
        holder, key = spots[int(rng.random() * len(spots))]
        kept, junk = holder[key], JUNK[n % len(JUNK)]
        as_list = isinstance(holder, list)
        if n % 5 == 0:
            del holder[key]
        else:
            holder[key] = junk
        before = counts.total()
        try:
            found = reader(row, "row 7", counts)
        except InputError as error:
            message = str(error)
            assert message.startswith("row 7") and "\n" not in message
            seen["errors"] += 1
        else:
            assert found or counts.total() > before  # the place is of no account, or the row is refused
        if n % 5 == 0 and as_list:
            holder.insert(key, kept)
        else:
            holder[key] = kept
    assert row == good or isinstance(good, list)
    assert seen["errors"] > ROWS / 20


@pytest.mark.parametrize("name", READERS)
def test_rows_of_another_shape(name):
    reader, _ = READERS[name]
    for row in (None, True, 5, 1.5, "row", [], [1], {}, {"a": 1}, [{}], [[]]):
        if name == "helpsteer" and not isinstance(row, list):
            continue  # `grouped` gives lists
        counts = Counter()
        try:
            assert reader(row, "row 7", counts) is None and counts.total()
        except InputError as error:
            assert str(error).startswith("row 7") and "\n" not in str(error)


def lines_of(make):
    """Ten thousand broken lines, each made of a good one by changes at some places."""
    rng = random.Random("lines")
    for _ in range(ROWS):
        line = make
        for _ in range(1 + int(rng.random() * 3)):
            at = int(rng.random() * len(line))
            line = line[:at] + ('"', "]", "{", ",", "\n", "\t", "\x00", "7")[int(rng.random() * 8)] + line[at + 1 :]
        yield line


def test_json_lines(tmp_path):
    good = json.dumps(PLAIN["demonstrations/messages"])
    seen, path = Counter(), tmp_path / "data.jsonl"
    for line in lines_of(good):
        try:
            for where, value in json_lines.values_of_lines(path, enumerate(line.split("\n"), start=1)):
                rows_lib.check("demonstrations", value, where)
        except InputError as error:
            assert str(error).startswith(f"{path}, line ") and "\n" not in str(error)
            seen["errors"] += 1
    assert seen["errors"] > ROWS / 2


@pytest.mark.parametrize("separator", [",", "\t"])
def test_tables_of_text(separator):
    header, seen = separator.join(("prompt", "completion", "label")) + "\n", Counter()
    for line in lines_of(separator.join(('"a, ""b"""', "c\td" if separator == "," else '"c\td"', "true")) + "\n"):
        try:
            for where, row in files.cells(itertools.chain([header], io.StringIO(line, newline="")), separator, "table"):
                rows_lib.check("thumbs", row, where)
        except InputError as error:
            assert str(error).startswith("table, line ") and "\n" not in str(error)
            seen["errors"] += 1
    assert seen["errors"] > ROWS / 4


def test_tables_of_arrow():
    """A column of each type that is not the right one, and cells without a value."""
    rng = random.Random("arrow")
    types = {
        "int": lambda: int(rng.random() * 9),
        "bytes": lambda: b"\xff\xfe",
        "struct": lambda: {"role": "user", "content": None if rng.random() < 0.5 else "a"},
        "list": lambda: [{"role": "user", "content": None}],
        "null": lambda: None,
        "time": lambda: __import__("datetime").datetime(2024, 1, 1),
        "decimal": lambda: __import__("decimal").Decimal("1.50"),
        "float": lambda: float("nan"),
    }
    seen = Counter()
    for prompt, completion in itertools.product(types, types):
        count = ROWS // len(types) ** 2 + 1
        columns = {
            "prompt": [types[prompt]() for _ in range(count)],
            "completion": [types[completion]() for _ in range(count)],
        }
        table = pa.table(columns)
        for n in range(count):
            try:
                for where, row in files.batches_values(
                    lambda n=n, table=table: iter(table.slice(n, 1).to_batches()), "t"
                ):
                    rows_lib.check("demonstrations", row, where)
            except InputError as error:
                assert str(error).startswith("t, row 1") and "\n" not in str(error)
                seen["errors"] += 1
    assert seen["errors"] >= ROWS * 0.7
