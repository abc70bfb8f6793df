import contextlib
import gzip
import os
import sqlite3
import time

import pytest

from rlhf_jax.runs import contents


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with some files and folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "other.jsonl", "a b.txt", "we=ird,na:me.jsonl", "train.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}\n") if name.endswith("gz") else b"{}\n")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "world").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rows.jsonl", ["rows.jsonl"]),
        ("rows.jsonl[:90%]", ["rows.jsonl"]),
        ("alpaca:rows.jsonl", ["rows.jsonl"]),
        ("hh:train.jsonl.gz[90%:]", ["train.jsonl.gz"]),
        ("template:other.jsonl:rows.jsonl", ["other.jsonl", "rows.jsonl"]),
        ("alpaca:rows.jsonl[:50%]=0.7,other.jsonl=0.3,world:rows=100=1", ["rows.jsonl", "other.jsonl"]),
        ("we=ird,na:me.jsonl[:3]", ["we=ird,na:me.jsonl"]),
        ("p3:a b.txt", ["a b.txt"]),
        ("world:rows=100", []),  # a folder of that name is no folder of data
        ("./world", ["./world"]),
        ("tiny", []),
        ("base", ["base"]),
        ("float32", []),
        ("", []),
        ("/", []),
        (".", []),
        ("rows.jsonl\0", []),
        ("x" * 10_000, []),
        ("a, b: " * 10_000, []),
        ("gone.jsonl", []),
        ("hh:*.jsonl[:90%]=0.5,./ti?y/*.jsonl=0.5", ["*.jsonl"]),
        ("[or]*.jsonl,world", ["[or]*.jsonl"]),
        ("alpaca:rows.*", []),  # no file of rows is named so
        ("What is 2 * 3? [Say it.]", []),
    ],
)
def test_finds_paths_in_any_string(here, text, expected):
    assert contents.paths(text) == expected


def test_finds_paths_by_other_names(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    os.symlink(here / "rows.jsonl", here / "link.jsonl")
    same = contents.checksums(here / "rows.jsonl")
    for name in ("~/rows.jsonl", f"{here}/rows.jsonl", "./rows.jsonl", "link.jsonl", "base/../rows.jsonl"):
        assert contents.paths(f"alpaca:{name}[:90%]") == [name]
        assert contents.checksums(name) == same


def test_what_counts_in_a_model_directory(here):
    counted = {
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_templates/tool_use.jinja",
        "vocab.json",
        "merges.txt",
    }
    for name in counted | {"README.md", "trainer_state.json", "pytorch_model.bin", ".gitattributes"}:
        (here / "base" / name).parent.mkdir(exist_ok=True)
        (here / "base" / name).write_text(name)
    before = contents.checksums("base")
    assert before.keys() == counted
    for name in sorted(counted):
        (here / "base" / name).write_text(name + "x")
        assert contents.changes(before, contents.checksums("base")) == [name]
        (here / "base" / name).write_text(name)
    (here / "base" / "merges.txt").unlink()
    assert contents.changes(before, contents.checksums("base")) == ["merges.txt"]


def test_the_files_of_a_folder_of_data(here):
    (here / "tiny" / "part").mkdir()
    for name in ("1.jsonl", "part/2.jsonl", ".hidden"):
        (here / "tiny" / name).write_text(name)
    assert contents.checksums("./tiny").keys() == {"1.jsonl", "part/2.jsonl"}


def test_the_files_of_a_pattern(here):
    (here / "y=1").mkdir()
    (here / "y=1" / "a.csv").write_text("a")
    assert contents.paths("hh:y=1/*.csv[:5]=0.5,rows.jsonl=1") == ["y=1/*.csv", "rows.jsonl"]
    before = contents.checksums("y=1/*.csv")
    assert before.keys() == {"y=1/a.csv"}
    (here / "y=1" / "b.csv").write_text("b")
    assert contents.changes(before, contents.checksums("y=1/*.csv")) == ["y=1/b.csv"]


def test_the_records_of_a_prepared_data_set(here):
    folder = here / "data" / "glue" / "sst2" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("sst2-train.array_record-00000-of-00001", "dataset_info.json"):
        (folder / name).write_text("a")
    for text in ("glue/sst2", "glue/sst2[:90%]", "glue/sst2:sentence", "rows.jsonl=1,glue/sst2=0.3"):
        assert contents.prepared(text, here / "data") == {"glue/sst2": here / "data" / "glue" / "sst2"}
    assert contents.prepared("glue/sst2:1.0.0", here / "data") == {"glue/sst2:1.0.0": folder}
    assert contents.prepared("glue/mrpc", here / "data") == contents.prepared("glue/sst2", None) == {}
    (here / "data" / "hub" / "x" / "y@1?config=c").mkdir(parents=True)
    assert contents.prepared("nectar:hub:x/y@1?config=c[:5]=0.5,hub:x/z=2", here / "data") == {
        "hub:x/y@1?config=c": here / "data" / "hub" / "x" / "y@1?config=c"
    }
    assert contents.record_checksums(here / "data").keys() == {"glue/sst2/1.0.0/sst2-train.array_record-00000-of-00001"}


def test_every_byte_of_a_file_of_rows_counts(here):
    rows = bytearray(os.urandom(3 * 2**20))
    (here / "rows.jsonl").write_bytes(rows)
    before = contents.checksums("rows.jsonl")
    rows[len(rows) // 2 + 12345] ^= 1
    (here / "rows.jsonl").write_bytes(rows)
    assert contents.changes(before, contents.checksums("rows.jsonl")) == [""]


def test_large_weights_take_no_time(here):
    """A sparse file of 40 GiB, of which the ends, the size and stretches in between are read."""
    weights = here / "base" / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(40 * 2**30)
    start = time.monotonic()
    before = contents.checksums("base")
    assert time.monotonic() - start < 5
    offsets = list(contents._offsets(40 * 2**30, contents._WINDOWS))
    assert offsets[0] == 0 and offsets[-1] == 40 * 2**30 - contents._WIDTH
    for offset in (0, offsets[64] + 5, 40 * 2**30 - 1):
        with weights.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        after = contents.checksums("base")
        assert contents.changes(before, after) == ["model.safetensors"]
        before = after


def test_settings_are_compared_by_what_is_in_the_files(here):
    (here / "moved.jsonl").write_bytes(b"{}\n")
    one = {"rows.jsonl": contents.checksums("rows.jsonl")}
    two = {"moved.jsonl": contents.checksums("moved.jsonl")}
    assert contents.by_content("alpaca:rows.jsonl[:9]", one) == contents.by_content("alpaca:moved.jsonl[:9]", two)
    assert contents.by_content("alpaca:rows.jsonl[:9]", one) != contents.by_content("alpaca:moved.jsonl[:8]", two)
    assert contents.by_content(0.5, {}) == "0.5"


def test_a_database_has_no_checksum(here):
    """It changes while it is used, with every label; what is read of it is compared by itself."""
    with contextlib.closing(sqlite3.connect(here / "people.db")) as db:
        db.execute("CREATE TABLE labels (id)")
    assert contents.paths("people.db") == ["people.db"] and contents.checksums("people.db") == {}
