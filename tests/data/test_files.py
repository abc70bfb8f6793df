"""Tests of rlhf_jax.data.files: each ending, patterns, and files that are broken."""

import ast
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from rlhf_jax.data import files, sources
from rlhf_jax.types import InputError

ROWS = [{"prompt": "one\n", "completion": 'say "a, b"'}, {"prompt": "zwö", "completion": "c\td"}]


def table(path, rows):
    """A Parquet file with a row a row group."""
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)


def stream(path, rows):
    whole = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole)


def text(path, content):
    """A file of text, compressed as its name tells."""
    data = content.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COMMAS = 'prompt,completion\n"one\n","say ""a, b"""\n\nzwö,c\td\n'
TABS = 'completion\tprompt\n"say ""a, b"""\t"one\n"\n"c\td"\tzwö\n'
WRITERS = {
    **{f".jsonl{more}": lambda path: text(path, LINES) for more in ("", ".gz", ".zst")},
    ".json": lambda path: text(path, LINES),
    ".json.zst": lambda path: text(path, json.dumps(ROWS)),
    ".csv": lambda path: text(path, "\ufeff" + COMMAS),
    ".csv.gz": lambda path: text(path, COMMAS.replace("\n", "\r\n").replace("one\r", "one")),
    ".tsv.zst": lambda path: text(path, TABS),
    ".parquet": lambda path: table(path, ROWS),
    ".arrow": lambda path: stream(path, ROWS),
    ".feather": lambda path: feather.write_feather(pa.Table.from_pylist(ROWS), str(path)),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_each_ending(tmp_path, ending):
    path = tmp_path / f"data{ending}"
    WRITERS[ending](path)
    assert files.is_named(str(path)) and [row for _, row in files.values(path)] == ROWS
    assert next(files.values(path))[0].startswith(f"{path}, ")


def test_rows_are_found_with_slices_and_places(tmp_path, capsys):
    table(tmp_path / "data.parquet", ROWS)
    rows = sources.rows(f"{tmp_path}/data.parquet[1:]", "demonstrations", data_dir=tmp_path / "store")
    assert list(rows) == ROWS[1:] and rows.where(0) == f"{tmp_path}/data.parquet, row 2"
    text(tmp_path / "dolly.csv", "instruction,context,response\nGo.,,Gone.\n")
    asked = sources.rows(f"dolly:{tmp_path}/dolly.csv", "prompts", data_dir=tmp_path / "store")
    assert list(asked) == [{"prompt": [{"role": "user", "content": "Go."}]}]
    assert capsys.readouterr() == ("", "")


def test_what_a_table_has_and_json_has_not(tmp_path):
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])
    whole = pa.table(
        {
            "prompt": pa.array([[{"role": "user", "content": "p"}]], pa.list_(message)),
            "completion": pa.array([b"bytes"]),
            "ratings": pa.array([None], pa.string()),
            "when": pa.array([0], pa.timestamp("s")),
            "image": pa.array([b"\xff"]),
        }
    )
    parquet.write_table(whole, tmp_path / "a.parquet")
    load = lambda kind: list(sources.rows(str(tmp_path / "a.parquet"), kind, data_dir=tmp_path / "store"))
    assert load("demonstrations") == [{"prompt": [{"role": "user", "content": "p"}], "completion": "bytes"}]
    with pytest.raises(InputError, match=r"a\.parquet, row 1: expected what JSON can hold.*bytes"):
        load("records")
    with pytest.raises(InputError, match=r"a\.parquet, row 1, field chosen: missing|row 1, field responses: missing"):
        load("rankings")


@pytest.mark.parametrize("value", ["18446744073709551616", '"\\ud800"'])
def test_records_that_cannot_be_stored(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"fine": [1, null, 0.5]}}\n{{"x": {value}}}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected what JSON can hold, with integers of at most"):
        sources.rows(str(tmp_path / "a.jsonl"), "records", data_dir=tmp_path / "store")


def test_parquet_is_read_by_row_groups(tmp_path, monkeypatch):
    table(tmp_path / "a.parquet", ROWS * 3)
    asked, read = [], parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, row_groups, **options: asked.append(row_groups) or read(self, *args, row_groups=row_groups),
    )
    values = files.values(tmp_path / "a.parquet")
    next(values), next(values)
    assert asked == [[0], [1]]


def test_patterns(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        text(tmp_path / name / "x.jsonl", json.dumps({"text": name}) + "\n")
    load = lambda spec: sources.rows(f"{tmp_path}/{spec}", "text", data_dir=tmp_path / "store")
    rows = load("*/x.jsonl")
    assert [row["text"] for row in rows] == ["a", "b"] == [row["text"] for row in load("**/*.jsonl")]
    assert rows.where(1) == f"data '{tmp_path}/*/x.jsonl', {tmp_path}/b/x.jsonl, line 1"
    assert [row["text"] for row in load("[b-c]/*.jsonl[:1]")] == ["b"]
    text(tmp_path / "b" / "x.jsonl", json.dumps({"text": "c"}) + "\n")
    assert [row["text"] for row in load("*/x.jsonl")] == ["a", "c"]  # prepared anew
    text(tmp_path / "a" / "[x].jsonl", json.dumps({"text": "named so"}) + "\n")
    assert load("a/[x].jsonl")[0] == {"text": "named so"}
    text(tmp_path / "b" / "y.jsonl", json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(InputError, match=rf"^{tmp_path}/b/y\.jsonl, line 1, field text: missing; the row has"):
        load("b/*.jsonl")
    with pytest.raises(InputError, match=r"/none\*\.csv': no file has such a name"):
        load("none*.csv")


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".arrow"])
def test_tables_of_one_pattern_have_the_same_columns(tmp_path, ending):
    write = {".parquet": table, ".arrow": stream, ".csv": lambda path, rows: text(path, ",".join(rows[0]) + "\nx,y\n")}
    write[ending](tmp_path / f"1{ending}", [{"prompt": "p", "completion": "c"}])
    write[ending](tmp_path / f"2{ending}", [{"prompt": "p", "answer": "c"}])
    with pytest.raises(InputError) as error:
        list(sources.rows(f"{tmp_path}/*{ending}", "prompts", data_dir=tmp_path / "store"))
    assert str(error.value) == (
        f"{tmp_path}/2{ending}: expected the columns of {tmp_path}/1{ending}, ['prompt', 'completion'], as in all files"
        " of one pattern; got ['prompt', 'answer'], which differ in ['answer', 'completion']"
    )


def test_broken_files(tmp_path):
    table(tmp_path / "good.parquet", ROWS)
    stream(tmp_path / "good.arrow", ROWS)
    text(tmp_path / "good.jsonl.zst", LINES * 99)
    broken = [
        ("cut.parquet", (tmp_path / "good.parquet").read_bytes()[:-20], "cannot be read"),
        ("cut.arrow", (tmp_path / "good.arrow").read_bytes()[:300], "cannot be read"),
        ("cut.jsonl.zst", (tmp_path / "good.jsonl.zst").read_bytes()[:-9], "line 1: cannot be read .Truncated"),
        ("no.jsonl.zst", b"plain", "line 1: cannot be read"),
        ("no.csv.gz", b"plain", "cannot be read"),
        ("empty.parquet", b"", "cannot be read"),
        ("empty.arrow", b"", "cannot be read"),
        ("empty.csv", b"", "expected rows of text, got an empty file"),
        ("only.csv", b"text\n", "expected rows of text, got an empty file"),
        ("twice.csv", b"text,text\na,b\n", r"line 1: expected columns of different names, got \['text'\]"),
        ("short.csv", b"text,n\na,1\nb\n", "line 3: expected 2 fields, as in the first line, got 1"),
        ("open.csv", b'text,n\na,1\n"b,2\n', "line 3: expected a row of a table, quoted as in RFC 4180"),
        ("latin.tsv", b"text\n\xe9\n", "line 2: expected UTF-8, got byte 0xe9"),
        ("column.tsv", b"txt\na\n", r"line 2, field text: missing; the row has \['txt'\]"),
        ("a.parquet.gz", b"", "neither world nor a known TFDS name|expected world"),
    ]
    for name, content, message in broken:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            sources.rows(f"{tmp_path}/{name}", "text", data_dir=tmp_path / "store")
        assert "\n" not in str(error.value) and name in str(error.value)
    data = bytearray((tmp_path / "good.parquet").read_bytes())
    data[8:60] = b"\xff" * 52  # of the first page
    (tmp_path / "page.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"page\.parquet, from row 1 on: cannot be read"):
        list(files.values(tmp_path / "page.parquet"))


def test_what_takes_long_to_import_is_not_imported_above():
    for path in Path(files.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [one.name for one in getattr(statement, "names", ())] + [getattr(statement, "module", None) or ""]
            assert not {"pyarrow", "datasets", "pandas"} & {name.partition(".")[0] for name in names}, path
