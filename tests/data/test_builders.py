"""Tests of rlhf_jax.data.builders: each kind of source, what is prepared anew and what is not, and every bad row."""

import errno
import functools
import gzip
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhf_jax.data import builders, json_lines, sources
from rlhf_jax.data.rows import check
from rlhf_jax.types import InputError

USER = [{"role": "user", "content": "ask"}]
REPLY = {"role": "assistant", "content": "say"}


def write(path, *rows):
    """A JSON Lines file of rows, or of lines as they are."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def load(path, kind, **options):
    return list(sources.rows(str(path), kind, data_dir=path.parent / "store", **options))


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " Ümläut\n", "id": 3}, {"text": " Ümläut\n"}),
        ("demonstrations", {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": ""}),
        ("demonstrations", {"prompt": USER, "completion": "c"}, {"prompt": USER, "completion": "c"}),
        ("demonstrations", {"prompt": USER, "completion": [REPLY]}, {"prompt": USER, "completion": "say"}),
        ("demonstrations", {"messages": [*USER, REPLY] * 2, "n": 1}, {"messages": [*USER, REPLY] * 2}),
        (
            "rankings",
            {"prompt": "p", "responses": ["a", "b", ""], "ranks": [1, 0, 1]},
            {"prompt": "p", "responses": ["a", "b", ""], "ranks": [1, 0, 1]},
        ),
        (
            "rankings",
            {"prompt": USER, "chosen": [REPLY], "rejected": "b"},
            {"prompt": USER, "responses": ["say", "b"], "ranks": [0, 1]},
        ),
        (
            "rankings",
            {"prompt": "p", "chosen": "a", "rejected": "b", "ended": [True, False]},
            {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "ended": [True, False]},
        ),
        (
            "demonstrations",
            {
                "messages": [
                    USER[0] | {"weight": 1},
                    REPLY | {"weight": 0, "train": True, "tool_calls": None},
                    *USER,
                    REPLY,
                ]
            },
            {"messages": [*USER, REPLY | {"weight": 0}, *USER, REPLY]},
        ),
        ("prompts", {"prompt": "", "answer": 4}, {"prompt": ""}),
        (
            "demonstrations",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                    REPLY,
                ]
            },
            {"messages": [*USER, REPLY]},
        ),
        (
            "rankings",
            {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [1, -0.5, 2.5, 1.0]},
            {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 0, 1]},
        ),
        (
            "rankings",
            {"chosen": [*USER, REPLY, *USER, REPLY], "rejected": [*USER, REPLY, *USER, REPLY | {"content": "no"}]},
            {"prompt": [*USER, REPLY, *USER], "responses": ["say", "no"], "ranks": [0, 1]},
        ),
        (
            "thumbs",
            {"prompt": USER, "completion": [REPLY], "label": False, "ended": True},
            {"prompt": USER, "completion": "say", "label": False, "ended": True},
        ),
        (
            "thumbs",
            {"prompt": "p", "response": "c", "label": "True"},
            {"prompt": "p", "completion": "c", "label": True},
        ),
        ("thumbs", {"prompt": "p", "completion": "c", "label": 0}, {"prompt": "p", "completion": "c", "label": False}),
        ("steps", {"prompt": "p", "steps": ["a", "b", "c"], "labels": [1, 0, -1]}, None),
        (
            "steps",
            {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
            {"prompt": "p", "steps": ["a", "b"], "labels": [1, -1]},
        ),
        ("prompts", {"prompt": [{"role": "system", "content": "s"}, *USER]}, None),
    ],
)
def test_rows_come_back_in_their_canonical_shape(tmp_path, kind, row, expected):
    write(tmp_path / "data.jsonl", row)
    assert load(tmp_path / "data.jsonl", kind) == [expected or row]


def test_rows_keep_their_order_and_are_random_access(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"row {n}"}) + "\n\n" for n in range(2500))
    rows = sources.rows(str(path), "text", data_dir=tmp_path)
    assert len(rows) == 2500
    assert [row["text"] for row in rows] == [f"row {n}" for n in range(2500)]
    assert rows[7] == {"text": "row 7"} and rows[-1] == {"text": "row 2499"}
    with pytest.raises(IndexError):
        rows[2500]
    part = sources.rows(str(path), "text", data_dir=tmp_path, split="train[80%:]")
    assert [row["text"] for row in part] == [f"row {n}" for n in range(2000, 2500)]


def test_text_file_of_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert load(path, "text") == [{"text": "One.\n\nStill one."}, {"text": "Two."}]
    path.write_text("One.\nStill one.\n\n \nTwo.\n")
    assert load(path, "text") == [{"text": "One.\nStill one."}, {"text": "Two."}]
    with pytest.raises(InputError, match=r"stories\.txt: prompts are read from a \.jsonl"):
        load(path, "prompts")


def test_unchanged_file_is_reused_and_a_changed_one_prepared_anew(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    write(path, {"text": "a"})
    prepared = []
    rows = sources.PlainRows.rows
    monkeypatch.setattr(sources.PlainRows, "rows", lambda self: prepared.append(1) or rows(self))
    assert load(path, "text") == load(path, "text") == [{"text": "a"}]
    assert len(prepared) == 1
    write(path, {"text": "b"})
    assert load(path, "text") == [{"text": "b"}]
    assert len(prepared) == 2


def test_nothing_is_left_behind_in_the_temporary_folder(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    write(tmp_path / "a.jsonl", {"text": "some"})
    load(tmp_path / "a.jsonl", "text")
    sources.rows("world:rows=8", "text", data_dir=tmp_path)
    assert not list(temporary.iterdir())


def test_preparing_is_quiet_and_writes_array_record(tmp_path, capfd):
    write(tmp_path / "data.jsonl", {"text": "a"})
    load(tmp_path / "data.jsonl", "text")
    assert capfd.readouterr() == ("", "")
    assert len(list((tmp_path / "store").rglob("*.array_record*"))) == 1


BAD = [
    ("text", "{", "line 2: expected a JSON object, got '{'"),
    ("text", "[" * 100_000, "line 2: expected a JSON object, got '\\[\\["),
    ("text", [1, 2], r"line 2: expected a JSON object, got \[1, 2\]"),
    ("text", {"txt": "a"}, r"line 2, field text: missing; the row has \['txt'\]"),
    ("text", {"text": 5}, "line 2, field text: expected text, got 5"),
    ("text", {"text": None}, "line 2, field text: expected text, got None"),
    ("text", {"text": ""}, "line 2, field text: expected some text, got an empty string"),
    ("text", '{"text": "\\ud800"}', "line 2, field text: expected Unicode text"),
    ("prompts", {"prompt": 5}, "line 2, field prompt: expected text or a list of messages, got 5"),
    ("prompts", {"prompt": []}, "line 2, field prompt: expected a list of messages"),
    ("prompts", {"prompt": ["hi"]}, r"line 2, field prompt\[0\]: expected .* got 'hi'"),
    ("prompts", {"prompt": [*USER, {"role": "bot", "content": ""}]}, r"prompt\[1\], field role: .* got 'bot'"),
    ("prompts", {"prompt": [{"role": "user"}]}, r"line 2, field prompt\[0\], field content: missing"),
    ("prompts", {"prompt": [*USER, REPLY]}, "line 2, field prompt: expected its last message to come from the user"),
    ("demonstrations", {"prompt": "p"}, "line 2, field completion: missing"),
    ("demonstrations", {"completion": "c"}, "line 2, field prompt: missing"),
    ("demonstrations", {"prompt": "p", "completion": [REPLY]}, "line 2, field completion: expected text, got"),
    ("demonstrations", {"prompt": USER, "completion": USER}, "line 2, field completion: expected one assistant"),
    ("demonstrations", {"messages": USER}, "line 2, field messages: expected a conversation that ends"),
    ("demonstrations", {"messages": [REPLY]}, "line 2, field messages: expected a conversation that ends, not begins"),
    ("rankings", {"prompt": "p", "chosen": "a"}, "line 2, field rejected: missing"),
    ("rankings", {"prompt": "p"}, "line 2, field responses: missing"),
    ("rankings", {"prompt": "p", "responses": ["a"], "ranks": [0]}, r"field responses: .* at least 2, got \['a'\]"),
    ("rankings", {"prompt": "p", "responses": "ab", "ranks": [0, 1]}, "field responses: .* at least 2, got 'ab'"),
    ("rankings", {"prompt": "p", "responses": ["a", 1], "ranks": [0, 1]}, r"field responses\[1\]: expected text"),
    ("rankings", {"prompt": "p", "responses": ["a", "b"]}, "line 2, field ranks: missing"),
    *[
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": ranks}, "field ranks: expected 2 integers")
        for ranks in ([0], [0, 1, 2], [0, 1.0], [True, 0], ["0", "1"], [-1, 0], 0, [0, 2**31], [10**400, 0])
    ],
    *[
        (
            "rankings",
            {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "ended": ended},
            "line 2, field ended: expected 2 booleans, one per response",
        )
        for ended in ([True], [1, 0], True, ["true", "false"], [None, True])
    ],
    *[
        (
            "rankings",
            {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1], "ratings": ratings},
            rf"line 2, field ratings{message}",
        )
        for ratings, message in (
            ([{}], ": expected 2 objects, one per response"),
            ({"helpful": [1, 2]}, ": expected 2 objects"),
            ([7, 6], ": expected 2 objects"),
            ([{}, {"honest": 8}], r"\[1\].honest: expected an integer from 1 to 7, got 8"),
            ([{"harmless": 2.0}, {}], r"\[0\].harmless: expected an integer from 1 to 7, got 2.0"),
            ([{"helpful": True}, {}], r"\[0\].helpful: expected an integer from 1 to 7, got True"),
        )
    ],
    *[
        (
            "rankings",
            {"prompt": "p", "responses": ["a", "b"], "scores": scores},
            "field scores: expected 2 numbers, one per response, got",
        )
        for scores in ([1], [1, "2"], [True, 1], 5, [None, 1])
    ],
    (
        "rankings",
        {"chosen": [*USER, REPLY], "rejected": [*USER, *USER, REPLY]},
        "field rejected: expected the messages of chosen but for the last one",
    ),
    (
        "rankings",
        {"chosen": [*USER, *USER], "rejected": [*USER, *USER]},
        "field chosen: expected one assistant message",
    ),
    ("rankings", {"chosen": [REPLY], "rejected": [REPLY]}, "field rejected: expected the messages of chosen"),
    *[
        ("thumbs", {"prompt": "p", "completion": "c", "label": label}, "field label: expected true or false, got")
        for label in (None, 2, -1, 0.5, "yes", [True], 1.0)
    ],
    ("thumbs", {"prompt": "p", "completion": "c"}, "field label: missing"),
    ("thumbs", {"prompt": "p", "label": True}, "field completion: missing"),
    ("thumbs", {"prompt": "p", "completion": "c", "label": True, "ended": 1}, "field ended: expected true or false"),
    *[
        ("steps", {"prompt": "p", "steps": ["a", "b"], "labels": labels}, "field labels: expected 2 of true or false")
        for labels in ([1], [1, 2], [1, 0.5], [1, None], 1, ["1", "1"])
    ],
    ("steps", {"prompt": "p", "steps": ["a", " "], "labels": [1, 1]}, "field steps: expected steps that are not empty"),
    ("steps", {"prompt": "p", "steps": [], "labels": []}, "field steps: expected steps that are not empty"),
    *[
        ("prompts", {"prompt": [USER[0] | {"weight": weight}]}, r"prompt\[0\], field weight: expected 0 or 1, got")
        for weight in (0.5, 2, -1, True, "0", None, [0], 1.0)
    ],
    *[
        (
            "demonstrations",
            {"messages": [*USER, REPLY | extra]},
            rf"line 2, field messages\[1\], field {name}: (expected|missing)",
        )
        for name, extra in {
            "train": {"train": False},
            "tool_calls": {"tool_calls": [{"id": 1}]},
            "reasoning_content": {"reasoning_content": "hm"},
            "content": {"content": None},
            r"content\[0\], field type": {"content": [{"type": "image_url", "image_url": {"url": "a"}}]},
            r"content\[1\], field text": {"content": [{"type": "text", "text": "say"}, {"type": "text"}]},
            r"content\[0\], field type ": {"content": [{"text": "say"}]},
            r"content\[0\]": {"content": ["say"]},
            "role": {"role": "tool"},
            "role ": {"role": "function"},
        }.items()
        for name in [name.strip()]
    ],
    (
        "demonstrations",
        {"prompt": USER, "completion": [REPLY | {"weight": 0}]},
        r"completion\[0\], field weight: expected 1",
    ),
    ("prompts", {"prompt": USER, "tools": [{"name": "f"}]}, "line 2, field tools: expected conversations without"),
    ("text", '{"text": "a", "text": "b"}', "line 2, field text: given twice"),
    ("text", '{"text": "a", "n": NaN}', "line 2, field n: expected a finite number, got nan"),
    ("text", '{"text": "a", "n": [0, -Infinity]}', r"line 2, field n\[1\]: expected a finite number, got -inf"),
    ("text", '{"text": "a", "n": {"m": 1e999}}', "line 2, field n, field m: expected a finite number, got inf"),
    (
        "prompts",
        '{"prompt": [{"role": "user", "role": "user"}]}',
        r"line 2, field prompt\[0\], field role: given twice",
    ),
    ("text", '{"a\\ud800": 1, "a\\ud800": 1}', r"line 2, field 'a.ud800': given twice"),
    ("text", "NaN", "line 2: expected a finite number, got nan"),
    ("text", '{"text": "a", "n": 1' + "0" * 5000 + "}", "line 2: expected a JSON object, got"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_bad_row_is_named_in_one_line_and_nothing_is_prepared(tmp_path, kind, row, message):
    good = {"text": "t", "prompt": "p", "completion": "c", "chosen": "a", "rejected": "b", "label": True}
    good |= {"steps": ["a"], "labels": [1]}
    path = tmp_path / "data.jsonl"
    write(path, good, row)
    for _ in range(2):  # the second time it must not be taken for prepared
        with pytest.raises(InputError, match=message) as error:
            load(path, kind)
        assert str(error.value).startswith(f"{path}, line 2") and "\n" not in str(error.value)
    assert not list((tmp_path / "store").rglob("*.array_record*"))


def test_rows_nested_as_deeply_as_can_be_read(tmp_path):
    path = tmp_path / "data.jsonl"
    for depth in range(800, 1000, 2):
        write(path, f'{{"text": {"[" * depth}{"]" * depth}}}')
        with pytest.raises(InputError, match=r"line 1.*: expected (text|a JSON object), got"):
            [check("text", row, where) for where, row in json_lines.json_values(path)]


def test_unreadable_files(tmp_path):
    path = tmp_path / "data.jsonl"
    with pytest.raises(InputError, match=r"data\.jsonl: no such file"):
        load(path, "text")
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="expected rows of text, got an empty file"):
            load(path, "text")
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(InputError, match="line 2: expected UTF-8, got byte 0xe9"):
        load(path, "text")
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert load(path, "text") == [{"text": "a"}]
    packed = tmp_path / "data.jsonl.gz"
    for content in (b'{"text": "a"}', gzip.compress(b'{"text": "a"}\n' * 999)[:-9]):
        packed.write_bytes(content)
        with pytest.raises(InputError, match=r"line \d+: cannot be read"):
            load(packed, "text")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./data.pickle", "expected world, hub:NAME, a TFDS name, or a path that ends in"),
        ("no_such_data_set", r"neither world nor a known TFDS name, nor does it end in \.jsonl, .*\.parquet"),
        ("glue/no_such_config", "glue/no_such_config"),
        ("world:rows=many", "expected, for instance, world:seed=3,rows=1000, got 'rows=many'"),
        ("world:lines=3", "got 'lines=3'"),
        ("world:rows=0", "at least 1 row"),
    ],
)
def test_unknown_spec(tmp_path, spec, message):
    with pytest.raises(InputError, match=message) as error:
        sources.rows(spec, "text", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_thumbs_of_the_world(tmp_path):
    rows = [*sources.rows("world:rows=20", "thumbs", data_dir=tmp_path)]
    assert [row["label"] for row in rows] == [True, False] * 10
    ranked = [*sources.rows("world:rows=20", "rankings", data_dir=tmp_path)]
    assert not {str(row["prompt"]) for row in rows} <= {str(row["prompt"]) for row in ranked}


def test_steps_of_the_world_end_with_the_first_wrong_one(tmp_path):
    rows = [*sources.rows("world:rows=40", "steps", data_dir=tmp_path)]
    assert all(set(row) == {"prompt", "steps", "labels"} and -1 not in row["labels"][:-1] for row in rows)
    assert {row["labels"][-1] for row in rows} == {1, -1}


def test_unknown_split(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, {"text": "a"})
    for split in ("test", "train[", "train[5:2]", "train[1:]"):
        with pytest.raises(InputError, match=r"no rows in split '.*'; there are train \(1 rows\): name another"):
            load(path, "text", split=split)
    with pytest.raises(InputError, match="there are train, held_out"):
        sources.rows("world", "text", data_dir=tmp_path, split="test")


def test_a_slice_of_a_source(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, *({"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"}
                  for n in range(10)))  # fmt: skip
    asked = lambda part: [
        int(row["prompt"][0]["content"]) for row in sources.rows(f"hh:{path}{part}", "prompts", data_dir=tmp_path)
    ]
    assert (asked("[:80%]"), asked("[8:]"), asked("")) == ([*range(8)], [8, 9], [*range(10)])
    assert len(sources.rows("world:rows=20[:5]", "prompts", data_dir=tmp_path, split="held_out")) == 5
    with pytest.raises(InputError, match=r"no rows in split 'train\[12:\]'"):
        asked("[12:]")
    with pytest.raises(InputError, match=r"\[:5\]': rows of 'train\[:9\]' are a slice already"):
        sources.rows(f"hh:{path}[:5]", "prompts", data_dir=tmp_path, split="train[:9]")


@pytest.mark.parametrize("kind", ["text", "demonstrations", "rankings", "prompts"])
def test_world(tmp_path, kind):
    def rows(spec, split="train"):
        return list(sources.rows(spec, kind, data_dir=tmp_path, split=split))

    train = rows("world:rows=20,seed=1")
    assert len(train) == 20
    assert all(check(kind, row, "row") == row for row in train)
    assert rows("world:rows=20,seed=1") == train
    assert rows("world:rows=20,seed=2") != train
    assert len(rows("world:rows=20,seed=1", "held_out[:50%]")) == 10
    assert all(row not in train for row in rows("world:rows=20,seed=1", "held_out") if kind == "prompts")


class Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set as others publish them, known to TFDS by its files alone."""

    VERSION = tfds.core.Version("2.0.0")
    name = "published"
    FEATURES = None
    ROWS = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.ROWS)


@pytest.fixture
def publish(tmp_path):
    def make(features, *rows, file_format="array_record"):
        new = type("Published", (Published,), {"FEATURES": features, "ROWS": rows}, skip_registration=True)
        with builders.quiet():
            new(data_dir=tmp_path).download_and_prepare(file_format=file_format)

    return make


TEXT = tfds.features.Text()


def test_published_text(tmp_path, publish):
    publish({"text": TEXT, "title": TEXT, "label": tfds.features.ClassLabel(num_classes=2)},
            {"text": "naïve", "title": "t", "label": 1})  # fmt: skip
    for spec in ("published", "published:2.0.0", "published:text"):
        assert list(sources.rows(spec, "text", data_dir=tmp_path, split="test")) == [{"text": "naïve"}]
    assert sources.rows("published:title", "prompts", data_dir=tmp_path)[0] == {"prompt": "t"}
    with pytest.raises(InputError, match=r"name the text field, as in published:text; there are text, title"):
        sources.rows("published:label", "text", data_dir=tmp_path)
    with pytest.raises(InputError, match=r"no rows in split .*; there are (train|test) \(1 rows\), (train|test)"):
        sources.rows("published", "text", data_dir=tmp_path, split="validation")
    with pytest.raises(InputError, match="split train, row 0, field prompt: missing"):
        sources.rows("published", "demonstrations", data_dir=tmp_path)[0]["prompt"]


def test_published_field_is_detected_or_asked_for(tmp_path, publish):
    publish({"sentence": TEXT, "n": tfds.features.Scalar(np.int64)}, {"sentence": "s", "n": 1})
    assert list(sources.rows("published", "text", data_dir=tmp_path)) == [{"text": "s"}]


def test_published_with_two_strings(tmp_path, publish):
    publish({"left": TEXT, "right": TEXT}, {"left": "l", "right": ""})
    with pytest.raises(InputError, match="as in published:left; there are left, right"):
        sources.rows("published", "text", data_dir=tmp_path)
    assert list(sources.rows("published:right", "text", data_dir=tmp_path)) == [{"text": ""}]


def test_published_rankings(tmp_path, publish):
    publish(
        {
            "prompt": tfds.features.Sequence({"role": TEXT, "content": TEXT}),
            "responses": tfds.features.Sequence(TEXT),
            "ranks": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
        },
        {"prompt": USER, "responses": ["a", "b"], "ranks": [1, 0]},
    )
    assert list(sources.rows("published", "rankings", data_dir=tmp_path)) == [
        {"prompt": USER, "responses": ["a", "b"], "ranks": [1, 0]}
    ]


def test_published_name_that_cannot_be_fetched(tmp_path, monkeypatch):
    def fail(self, **_):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"'glue/sst2': cannot be .* \(ConnectionError: no route to host\): pre.*copy"):
        sources.rows("glue/sst2", "text", data_dir=tmp_path)


def test_published_name_without_a_network(tmp_path, monkeypatch, capfd):
    """It says at once what it does, and ends soon, whatever the number of trials that TFDS has in mind."""
    asked = []

    def refuse(address, *_, **__):
        asked.append(address)
        raise ConnectionRefusedError("no way out")

    monkeypatch.setattr("urllib3.util.connection.create_connection", refuse)
    monkeypatch.setenv("NO_PROXY", "*")
    start = time.monotonic()
    with pytest.raises(
        InputError, match=r"'imdb_reviews': cannot be prepared \(ConnectionError: .*ai\.stanford\.edu"
    ) as error:
        sources.rows("imdb_reviews", "text", data_dir=tmp_path)
    assert time.monotonic() - start < 30 and 0 < len(asked) < 5 and "\n" not in str(error.value)
    out, err = capfd.readouterr()
    line = f"data 'imdb_reviews': fetching it from ai.stanford.edu into {tmp_path / 'imdb_reviews'}"
    assert out == "" and err.startswith(line)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Failed to finalize writing: write() failed: No space left on device; writing x"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_no_mistake_of_the_users(tmp_path, monkeypatch, error, wrapped):
    def fill(self, **_):
        if wrapped:
            raise RuntimeError("while preparing") from error
        raise error

    write(tmp_path / "data.jsonl", {"text": "a"})
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fill)
    with pytest.raises(OSError) as caught:
        load(tmp_path / "data.jsonl", "text")
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)


def test_the_place_of_a_row(tmp_path, publish):
    path = tmp_path / "data.jsonl"
    write(path, "", *({"text": f"t{n}"} for n in range(4)))
    rows = sources.rows(f"{path}[2:]", "text", data_dir=tmp_path / "store")
    assert (rows[0], rows.where(0), rows.where(1)) == ({"text": "t2"}, f"{path}, line 4", f"{path}, line 5")
    publish({"text": TEXT}, {"text": "a"}, {"text": "b"})
    rows = sources.rows("published[1:]", "text", data_dir=tmp_path)
    assert rows.where(0) == "data 'published', split train[1:], row 0"
    assert sources.rows("world:rows=3", "prompts", data_dir=tmp_path).where(2) == "data 'world:rows=3', row 2"


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "en_US.ISO-8859-1"}])
def test_files_are_utf_8_whatever_the_locale(tmp_path, locale):
    row = {"prompt": "Say café 🙂: ", "completion": "ok 🙂"}
    path = tmp_path / "données.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "templates.jsonl").write_text('{"prompt": "ü {prompt}", "target": "{completion}"}', encoding="utf-8")
    code = (
        "import os, sys\n"
        "from rlhf_jax.data import sources, tokenizer\n"
        "for spec in (os.environ['ROWS'], 'template:' + os.environ['TEMPLATES'] + ':' + os.environ['ROWS']):\n"
        "    rows = sources.rows(spec, 'demonstrations', data_dir=os.environ['STORE'])\n"
        "    print(ascii(rows[0]['prompt']), ascii(rows[0]['completion']))\n"
        "tok = tokenizer.train([rows[0]['prompt']] * 3, 270, os.environ['STORE'] + '/tok')\n"
        "print(ascii(tokenizer.decode(tok, tokenizer.render_prompt(tok, rows[0]['prompt']))))\n"
    )
    environment = {
        **os.environ, **locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "",
        "ROWS": str(path), "TEMPLATES": str(tmp_path / "templates.jsonl"), "STORE": str(tmp_path / "store"),
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == ascii(row["prompt"]) + " " + ascii(row["completion"])
    assert second == ascii("ü " + row["prompt"]) + " " + ascii(row["completion"]) and third == ascii(
        "ü " + row["prompt"]
    )


def test_held_out_rows(tmp_path):
    texts = lambda rows: [row["text"] for row in rows]
    held_out = functools.partial(sources.held_out, kind="text", data_dir=tmp_path / "store")
    world = functools.partial(sources.rows, kind="text", data_dir=tmp_path / "store", split="held_out")
    default = texts(held_out(None, "world:rows=9,seed=3[:5]"))
    assert len(default) == sources.HELD_OUT and default == texts(world("world:seed=3,rows=256"))
    file = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    assert texts(held_out("world:rows=4[:3]", file)) == texts(world("world:rows=4"))[:3]
    assert held_out(None, file) is None
    assert texts(held_out(f"{file}[50%:]", "world")) == ["b"]
