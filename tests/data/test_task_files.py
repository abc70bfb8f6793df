"""Tasks out of files: what each kind of file is as a task, and which rows it learns from and is tested on."""

import json

import pytest

from rlhf_jax.data.tasks import files, in_words
from rlhf_jax.types import InputError


def test_a_file_of_rows(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "options": ["a", "b"], "answer": 0}) + "\n" for n in range(10))
    )
    task = files.task(str(path))
    assert (task.name, task.cluster, task.metric) == ("sums", "sums", "accuracy")
    train, held_out = (task.rows(split, data_dir=tmp_path) for split in (task.train, task.held_out))
    assert [row["question"] for row in held_out] == ["0?", "1?"] and len(train) == 8
    assert in_words(task.read(held_out[0]), task.templates[0])[0] == "0?\n\nOPTIONS:\n- a\n- b"


def test_published_files(tmp_path):
    task = files.task(f"gsm8k:{tmp_path}/maths.jsonl.gz")
    assert (task.name, task.cluster, task.metric) == ("maths", "maths", "number")
    assert files.task(f"sst:{tmp_path}/dev.csv").cluster == "sentiment"
    (tmp_path / "dates.cot.txt").write_text(
        "Note\n---\nInfer it.\n\nQ: When?\nA: Let's think step by step.\nNow. So the answer is (A)."
    )
    task = files.task(f"bbh:{tmp_path}/dates.json")
    assert (task.shots, task.held_out, task.preface) == ("shots", "held_out", "Infer it.")
    (tmp_path / "dates.cot.txt").unlink()
    assert files.task(f"bbh:{tmp_path}/dates.json").preface == ""
    assert files.is_file("cot:x.tsv") and files.is_file("x.jsonl") and not files.is_file("flan/rte")
    with pytest.raises(
        InputError, match=r"task 'x.csv': expected a .jsonl file, or cot:PATH, bbh:PATH, gsm8k:PATH, sst"
    ):
        files.task("x.csv")
