"""Tests of scripts/targets.py on terminals and rows of all kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.data import tokenizer as tokenizer_lib


def show(tmp_path, *rows, template=None):
    """The finished process that shows these rows on a terminal that knows ASCII alone."""
    tokenizer = tokenizer_lib.train(["Say café: ok"] * 3, 270, tmp_path / "model")
    if template is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "données.jsonl").write_text(lines, encoding="utf-8")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_PLATFORMS": "cpu"}
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "données.jsonl", "--data-dir", tmp_path / "data"]
    return subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "scripts" / "targets.py", *flags],
        env=os.environ | ascii_alone | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.slow
def test_a_terminal_that_does_not_know_the_characters(tmp_path):
    done = show(tmp_path, {"prompt": "Say café 🙂: ", "completion": "ok 🙂"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("EOS <|endoftext|>") and "cafÃ©" in done.stdout


@pytest.mark.slow
def test_a_row_that_the_template_refuses_is_named(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    system = {"messages": [{"role": "system", "content": "s"}, *talk]}
    done = show(tmp_path, {"messages": talk}, system, template=strict)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "es.jsonl, line 2: the tokenizer's chat template refuses" in line
