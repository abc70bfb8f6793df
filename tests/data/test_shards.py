"""Tests of rlhf_jax.data.shards: text beyond one part loses nothing, and preparing it can be interrupted anywhere."""

import errno
import functools
import itertools
import json
import os
import re
import tracemalloc
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from rlhf_jax.data import builders, pipeline, recipes, records, shards, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import hosts, progress
from rlhf_jax.types import InputError
from tests.data.examples import WORDS

LENGTH = 24
TEXTS = [f"{n}: " + " ".join(WORDS[(n + k) % len(WORDS)] for k in range(1 + n * n % 29)) for n in range(200)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return sources.rows(str(path), "text", data_dir=tmp_path / "data")


def prepare(rows, tokenizer, length=LENGTH):
    return shards.prepare(rows, recipes.text(tokenizer, length), tokenizer, length)


def pieces_of(tokenizer):
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(TEXTS)["input_ids"]]
    return [np.array(ids[at : at + LENGTH]) for ids in documents for at in range(0, len(ids), LENGTH)]


def every(prepared):
    return [[ids.tolist() for ids in row.ids] for row in prepared.read(np.arange(prepared.rows))]


@pytest.mark.parametrize("seed", [None, 3])
def test_text_of_one_part_is_packed_and_shuffled_as_in_memory(tokenizer, rows, seed):
    pieces = pieces_of(tokenizer)
    plan = shards.pack([len(ids) for ids in pieces], LENGTH)
    numbers = grain.MapDataset.range(len(plan))
    numbers = numbers if seed is None else numbers.seed(seed).shuffle()
    pad = tokenizer_lib.pad_id(tokenizer)
    data = pipeline.text(rows, tokenizer, length=LENGTH, batch=4, seed=seed, epochs=2)
    for n, (batch, left, right) in enumerate(zip(data, data.part(0, 2), data.part(1, 2), strict=True)):
        here = [numbers.repeat(2)[k] for k in range(4 * n, min(4 * n + 4, 2 * len(plan)))]
        expected = pipeline.lay_out(
            [[(pieces[p], np.ones(len(pieces[p]), bool)) for p in plan[row]] for row in here] + [[]] * (4 - len(here)),
            LENGTH,
            pad,
        )
        for name in ("tokens", "segment", "target"):
            whole = getattr(batch, name)
            assert np.array_equal(whole, getattr(expected, name)) and whole.dtype == getattr(expected, name).dtype
            assert np.array_equal(whole, np.concatenate([getattr(left, name), getattr(right, name)]))
    assert n + 1 == data.steps == -(-2 * len(plan) // 4)


def test_text_of_several_parts_loses_no_document_and_no_token(tokenizer, rows, monkeypatch):
    monkeypatch.setattr(shards, "PART", 1500)
    monkeypatch.setattr(shards, "BATCH", 400)
    monkeypatch.setattr(records, "OPEN", 2)
    prepared = prepare(rows, tokenizer)
    assert len(list(prepared.folder.glob("*.array_record"))) > 5
    assert prepared.counts == pipeline.Counts(len(TEXTS))
    found = every(prepared)
    assert all(sum(map(len, row)) <= LENGTH for row in found)
    expected = [ids.tolist() for ids in pieces_of(tokenizer)]
    assert sorted(itertools.chain(*found)) == sorted(expected)
    assert prepared.tokens == sum(map(len, expected))
    order = np.random.default_rng(0).permutation(len(found))  # rows of all shards at once
    assert [[ids.tolist() for ids in row.ids] for row in prepared.read(order)] == [found[n] for n in order]
    again = prepare(rows, tokenizer)
    assert every(again) == found and again.counts == prepared.counts


def test_an_interrupted_preparation_goes_on_where_it_was(tokenizer, rows, monkeypatch):
    monkeypatch.setattr(shards, "PART", 1500)
    monkeypatch.setattr(shards, "BATCH", 400)
    expected = every(prepare(rows, tokenizer))
    write, taken = shards._write, []

    def dies(*given):
        if given[3].name == "00003.array_record":
            given[3].with_suffix(".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(*given)

    def take(indices):
        taken.extend(indices)
        return type(rows).take(rows, indices)

    other = sources.rows("world:rows=3", "text", data_dir=rows.folder.parent / "elsewhere")
    other.folder, other._records, other._to_row = rows.folder / "b", rows._records, rows._to_row
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(other, tokenizer)
    (folder,) = other.folder.iterdir()
    assert not (folder / "complete.json").exists() and len(list(folder.glob("*.array_record"))) == 3
    done = sum(part.source for part in shards._first_parts(folder))
    monkeypatch.setattr(other, "take", take)
    assert every(prepare(other, tokenizer)) == expected
    assert taken == list(range(done, len(TEXTS)))
    assert not list(folder.glob("*.partial"))


def test_a_full_disk_is_named(tokenizer, rows):
    folder = prepare(rows, tokenizer).folder
    for file in folder.iterdir():
        file.unlink()
    (folder / "00000.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        prepare(rows, tokenizer)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder))
    assert not list(folder.glob("*.array_record")) and not list(folder.glob("*.json"))


def test_where_nothing_can_be_kept_a_temporary_folder_serves(tokenizer, rows, capsys):
    expected = every(prepare(rows, tokenizer))
    rows.folder = rows.folder / "some.txt" / "no folder"
    rows.folder.parent.write_text("a file")
    prepared = prepare(rows, tokenizer)
    assert every(prepared) == expected
    folder = prepared.folder
    assert folder.is_dir() and "Not a directory: tokens are not kept for the next start" in capsys.readouterr().err
    del prepared
    assert not folder.exists()


def test_other_processes_wait_for_the_first(tokenizer, rows, monkeypatch):
    met = []
    monkeypatch.setattr(hosts, "meet", lambda where: met.append(len(list(rows.folder.glob("*/complete.json")))))
    prepare(rows, tokenizer)
    monkeypatch.setattr(hosts, "first", lambda: False)
    prepare(rows, tokenizer)
    assert met == [1, 1]


LONG = "a cat on a mat, " * 60
LARGE = {  # a row of a kilobyte
    "text": {"text": LONG},
    "rankings": {"prompt": LONG[:320], "responses": [LONG[:320], LONG[:300]], "ranks": [0, 1]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_memory_does_not_grow_with_the_data(tokenizer, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "PART", 20_000)
    monkeypatch.setattr(shards, "BATCH", 10_000)
    monkeypatch.setattr(builders, "SHARD", 50_000)
    peaks = []
    for megabytes in (0.1, 0.3):
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_text((json.dumps(LARGE[kind]) + "\n") * int(megabytes * 1000))
        tracemalloc.start()
        made = sources.rows(str(path), kind, data_dir=tmp_path / "data")
        data = getattr(pipeline, kind)(made, tokenizer, length=512, batch=4, seed=0)
        next(iter(data))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks
    assert len(list(Path(made.folder).parents[1].glob("*.array_record*"))) > 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, where Linux says how much is resident")
def test_stored_rows_do_not_stay_in_memory(tmp_path, monkeypatch):
    """Neither in Python's nor in that of the libraries which write them, which `tracemalloc` does not see."""
    resident = []

    def large(self):
        for n in range(1000):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
            yield f"row {n}", {"text": f"{n} " + "x" * 2**16}

    monkeypatch.setattr(sources.PlainRows, "rows", large)
    monkeypatch.setattr(builders, "SHARD", 2**23)
    (tmp_path / "some.jsonl").write_text('{"text": "in its place"}')
    assert len(sources.rows(str(tmp_path / "some.jsonl"), "text", data_dir=tmp_path / "data")) == 1000
    assert resident[-1] - resident[200] < 2**24, (resident[200], resident[-1])


def test_progress_tells_rows_and_tokens_a_second(tokenizer, rows, monkeypatch, capsys):
    bar = progress.bar
    monkeypatch.setattr(
        progress, "bar", lambda total, done, what, unit, delay: bar(total, done=done, what=what, unit=unit)
    )
    prepare(rows, tokenizer)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"tokenising: 100% 200/200 \[.*<.*, .* row/s, [\d,]+ tokens/s\]", last)
    with bar(None, what="reading", unit="row") as shown:
        shown.update(3)
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 3 row [")


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_comes_back(dtype, masked):
    ids = [np.array([np.iinfo(dtype).max, 0, 7], dtype), np.array([1], dtype), np.arange(9).astype(dtype)]
    targets = [np.arange(len(one)) % 3 == 1 for one in ids] if masked else None
    found = shards._item(shards._record(shards.Item(ids, targets, (2**31 - 1, -1)), np.dtype(dtype)), np.dtype(dtype))
    assert [one.tolist() for one in found.ids] == [one.tolist() for one in ids]
    expected = targets if masked else [np.ones(len(one), bool) for one in ids]
    assert all(np.array_equal(mask, other) for (_, mask), other in zip(found.segments, expected, strict=True))
    assert found.numbers == [2**31 - 1, -1]


def test_the_smallest_type_is_taken(tokenizer, rows):
    prepared = prepare(rows, tokenizer)
    assert max(tokenizer.get_vocab().values()) > 255 and prepared._dtype == np.dtype("<u2")


DEMONSTRATIONS = [
    {"prompt": f"{n}: " + TEXTS[n][: 5 + n], "completion": TEXTS[-n][: 20 + n]}
    if n % 3
    else {"prompt": "", "completion": "a"}
    for n in range(60)
] + [
    {"messages": [{"role": "user", "content": TEXTS[n]}, {"role": "assistant", "content": "a", "weight": n % 2}] * 2}
    for n in range(2, 20)
]
DEMONSTRATIONS.append({"prompt": "z" * 100, "completion": "a"})


@pytest.mark.parametrize("options", [{}, {"pack": False}, {"completion_only": False}])
def test_demonstrations_of_several_parts_are_those_of_one(tokenizer, tmp_path, monkeypatch, options):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    loaded = sources.rows(str(path), "demonstrations", data_dir=tmp_path / "data")

    def found(rows):
        data = pipeline.demonstrations(rows, tokenizer, length=64, batch=4, seed=0, epochs=1, **options)
        segments = [
            (batch.tokens[b][batch.segment[b] == n].tolist(), batch.target[b][batch.segment[b] == n].tolist())
            for batch in data
            for b in range(4)
            for n in range(1, batch.segment[b].max() + 1)
        ]
        return sorted(segments), data.counts

    expected = found(DEMONSTRATIONS)
    assert expected[1].empty == 29 and expected[1].too_long and expected[1].truncated
    monkeypatch.setattr(shards, "PART", 500)
    monkeypatch.setattr(shards, "BATCH", 150)
    assert found(loaded) == expected
    monkeypatch.setattr(tokenizer_lib, "encode", None)
    assert found(loaded) == expected  # kept


def test_the_row_that_is_refused_is_named_in_a_later_batch(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 20)
    path = tmp_path / "some.jsonl"
    good = {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "user", "content": "say", "weight": 0}, {"role": "assistant", "content": "a"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [good] * 9 + [bad]))
    rows = sources.rows(str(path), "demonstrations", data_dir=tmp_path / "data")
    with pytest.raises(InputError, match=f"{path}, line 10: field weight"):
        pipeline.demonstrations(rows, tokenizer, length=64, batch=1, seed=0, completion_only=False)


SEVERAL = {
    "rankings": [
        {
            "prompt": TEXTS[n][: n % 40],
            "responses": [TEXTS[n + k][: 9 + n % 7 * k] for k in range(2 + n % 8)],
            "ranks": [k * n % 3 for k in range(2 + n % 8)],
            "ratings": [{"harmless": 1 + (n + k) % 7} for k in range(2 + n % 8)],
        }
        for n in range(60)
    ],
    "thumbs": [{"prompt": TEXTS[n][: n % 40], "completion": TEXTS[-n][:20], "label": n % 3 > 0} for n in range(60)],
    "steps": [
        {"prompt": TEXTS[n][: n % 40], "steps": TEXTS[n].split()[: 1 + n % 4], "labels": [n % 3 - 1] * (1 + n % 4)}
        for n in range(10, 58)
    ],
    "prompts": [{"prompt": TEXTS[n][: n % 40]} for n in range(60)],
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("rankings", {"shares": lambda *sizes: True}),
        ("rankings", {"virtue": "harmless"}),
        ("thumbs", {}),
        ("steps", {}),
        ("prompts", {"widths": 4}),
    ],
)
def test_batches_of_several_parts_are_those_of_one(tokenizer, tmp_path, monkeypatch, kind, options):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEVERAL[kind]))
    stored = sources.rows(str(path), kind, data_dir=tmp_path / "data")
    read = functools.partial(
        getattr(pipeline, kind), tokenizer=tokenizer, length=64, batch=4, seed=0, epochs=1, **options
    )
    whole = read(SEVERAL[kind])
    assert whole.counts.empty and whole.rows == whole.counts.kept > 30
    monkeypatch.setattr(shards, "PART", 200)
    monkeypatch.setattr(shards, "BATCH", 60)
    data = read(stored)
    (folder,) = stored.folder.iterdir()
    assert len(list(folder.glob("*.array_record"))) > 4
    monkeypatch.setattr(tokenizer_lib, "encode", None)
    again = iter(read(stored))  # finds them
    ahead = iter(data)
    for _ in range(7):
        next(ahead)
    again.set_state(json.loads(json.dumps(ahead.get_state())))  # a run that resumes
    assert data.counts == whole.counts
    for n, (expected, found, *parts) in enumerate(zip(whole, data, data.part(0, 2), data.part(1, 2), strict=True)):
        assert same(found, expected) and same(jax.tree.map(lambda *x: np.concatenate(x), *parts), expected)
        assert n < 7 or same(next(again), expected)
        if kind == "prompts":
            texts = [stored[row]["prompt"] for row in found.index.tolist() if row >= 0]
            assert texts == [tokenizer.decode(x[on]) for x, on, row in zip(*leaves(found), strict=True) if row >= 0]


def leaves(batch):
    return jax.tree.leaves(batch)


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(map(np.array_equal, leaves(one), leaves(other)))


def test_a_row_without_a_rating_is_named_in_a_later_batch(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 20)
    path = tmp_path / "some.jsonl"
    good = {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "ratings": [{"honest": 1}, {"honest": 2}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [good] * 9 + [good | {"ratings": [{}, {}]}]))
    rows = sources.rows(str(path), "rankings", data_dir=tmp_path / "data")
    with pytest.raises(InputError, match=f"{path}, line 10, field ratings: expected a rating of honest"):
        pipeline.rankings(rows, tokenizer, length=64, batch=1, seed=0, virtue="honest")


def test_packing_fits_and_leaves_out_nothing():
    lengths = np.random.default_rng(0).integers(1, 17, 500).tolist()
    rows = shards.pack(lengths, 32)
    assert sorted(itertools.chain(*rows)) == list(range(500))
    used = [sum(lengths[n] for n in row) for row in rows]
    assert max(used) <= 32 and sum(used) > 0.98 * 32 * len(rows)
    assert shards.pack([7, 5, 3, 1], 8) == [[0, 3], [1, 2]]
    assert shards.pack([], 8) == []
