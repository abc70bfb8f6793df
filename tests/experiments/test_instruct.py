"""Instruction tuning: what it learns from and is tested on, how it goes on, and what it refuses."""

import dataclasses
import json
import shutil

import pytest

from experiments import instruct, pretrain
from experiments.studies import instruct as study_of_instruct
from experiments.studies import study
from rlhf_jax import models
from rlhf_jax.data import tokenizer
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import InputError
from tests import tiny
from tests.quickstart import ADAPTERS, metrics_of, refused


def write_base(home):
    """A configuration with a model directory and two clusters, in files of a folder."""
    tok = tokenizer.train(["Question: Is it even, odd, or neither?\nAnswer: yes\nno 0123456789"] * 9, 290, home / "tok")
    config = dataclasses.replace(tiny.LLAMA, vocab_size=len(tok), max_length=96)
    models.save(models.Model(config, None, tok, lambda: None), tiny.policy(config), home / "model")
    for name, first in (("even", 10), ("odd", 50)):
        rows = [
            {"question": f"Is {n} {name}?", "options": ["yes", "no"], "answer": (n + first // 50) % 2}
            for n in range(first, first + 40)
        ]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return instruct.Config(
        init=home / "model",
        out=home / "run",
        data_dir=home / "data",
        tasks=tuple(str(home / f"{name}.jsonl") for name in ("even", "odd")),
        held_out=("odd",),
        held_out_every=2,
        length=96,
        batch=8,
        steps=3,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("instruct"))


@pytest.mark.slow
def test_it_is_tested_as_it_learns_and_goes_on_where_it_was(base, capsys):
    cfg = dataclasses.replace(base, lora=ADAPTERS, saves=checkpoint.Config(every=2))
    rows = instruct.main(cfg)["tasks"]
    assert json.loads((cfg.out / "results.json").read_text())["tasks"] == rows
    assert [(row["task"], row["unseen"], row["questions"], row["chance"]) for row in rows] == [
        ("odd", True, 8, 0.5),
        ("even", False, 8, 0.5),
    ]
    said = capsys.readouterr().out
    assert "mixture: 1 tasks of 1 clusters (even), 32 rows" in said and "rows learnt" in said
    recorded = metrics_of(cfg.out)
    assert [row["step"] for row in recorded if "accuracy/unseen" in row] == [2, 3]
    assert recorded[-1]["unseen/odd"] == recorded[-1]["accuracy/unseen"] == rows[0]["after"]
    assert (cfg.out / "curves.png").is_file() and models.load(cfg.out / "model").tokenizer is not None
    whole = dataclasses.replace(cfg, out=base.out.parent / "whole", saves=checkpoint.Config(every=9))
    assert instruct.main(whole)["tasks"] == rows
    shutil.rmtree(cfg.out / "checkpoints" / "3")  # as if the first run had ended after its second step
    assert instruct.main(cfg)["tasks"] == rows
    again = metrics_of(cfg.out)
    assert [row["loss/next_token"] for row in again] == [row["loss/next_token"] for row in recorded]


def test_wrong_input_is_refused(base, capsys):
    said = lambda *flags: refused(capsys, instruct.main, dataclasses.replace(base, out=base.out.parent / "x"), *flags)
    assert "held out: no task is of cluster 'evn'; there are even, odd" in said("--held-out", "evn")
    assert "without even, odd and what is like them no task is left" in said("--held-out", "even", "odd")
    assert "no task 'worlds'; did you mean world?" in said("--tasks", "worlds")
    assert "32 rows are fewer than a batch of 64" in said("--batch", "64")
    assert "forms: all weights are 0" in said("--mixture.forms.zero-shot", "0")


@pytest.mark.slow
@pytest.mark.full  # tests/experiments/test_study_pages.py has the same of another study
def test_the_study_makes_each_run_once_and_renews_its_page(base, tmp_path, capsys):
    (tmp_path / "instruct.md").write_text(f"# Mine\n\n{study.BEGIN}\nearlier\n{study.END}\n")
    preset = pretrain.Config(data="world:rows=200", preset="llama-micro", vocab_size=300, batch=8, steps=1)
    cfg = study_of_instruct.Config(
        out=tmp_path / "studies",
        docs=tmp_path,
        seeds=2,
        clusters=(1,),
        templates=(1,),
        presets=("llama-tiny",),
        pretrain=preset,
        instruct=dataclasses.replace(
            instruct.Config(),
            tasks=("arithmetic", "counting", "more"),
            held_out=("comparison",),
            questions=2,
            batch=8,
            steps=1,
        ),
    )
    results = study_of_instruct.main(cfg)
    assert list(results) == ["all", "1-clusters", "1-templates", "llama-tiny"]
    assert all(
        set(found) == set(results["all"][0]) and len(seeds) == 2 for seeds in results.values() for found in seeds
    )
    one = json.loads((cfg.out / "seed0" / "instruct-1-clusters" / "results.json").read_text())["tasks"]
    assert len({row["cluster"] for row in one if not row["unseen"]}) == 1
    assert "| all: 2 clusters, 10 templates, llama-micro |" in (tmp_path / "instruct.md").read_text()
    assert (tmp_path / "instruct.png").is_file()
    capsys.readouterr()
    assert study_of_instruct.main(cfg) == results
    assert "step/s" not in capsys.readouterr().err  # everything was found
    with pytest.raises(InputError, match="clusters=2: expected fewer than all 2"):
        study_of_instruct.main(dataclasses.replace(cfg, clusters=(2,)))
