"""Pretraining: the loss on held-out text, of which training knows nothing."""

import dataclasses
import json

import pytest

from experiments import evaluate, pretrain, sft
from rlhf_jax import models
from rlhf_jax.devices import parallel
from tests.quickstart import metrics_of, refused


def without_held_out(rows):
    return [{name: value for name, value in row.items() if name != "loss/held_out"} for row in rows]


def test_the_held_out_loss_of_a_run(done, tmp_path):
    """It is of the parameters after the step, over all held-out rows; here as `evaluate` computes it."""
    quick, summary = done
    rows = metrics_of(quick.out / "pretrain")
    assert summary["pretrain"]["held_out_loss"] == rows[-1]["loss/held_out"] < rows[0]["loss/held_out"]
    cfg = dataclasses.replace(quick.evaluate, texts=256, data_dir=quick.out / "data")
    nll = evaluate.held_out_nll(cfg, models.load(quick.out / "pretrain" / "model"), parallel.PMAP)
    assert rows[-1]["loss/held_out"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("stage", [pretrain, sft], ids=["pretrain", "sft"])
def test_training_knows_nothing_of_the_held_out_loss(done, tmp_path, stage):
    quick, _ = done
    name = stage.__name__.split(".")[1]
    cfg = dataclasses.replace(getattr(quick, name), data_dir=quick.out / "data", out=tmp_path, held_out_every=0)
    if stage is sft:
        cfg = dataclasses.replace(cfg, init=quick.out / "pretrain" / "model")
    stage.main(cfg)
    assert metrics_of(tmp_path) == without_held_out(metrics_of(quick.out / name))
    weights, samples = "model/model.safetensors", "samples.jsonl"
    assert all((tmp_path / x).read_bytes() == (quick.out / name / x).read_bytes() for x in (weights, samples))


def test_how_often(done, tmp_path, capsys):
    quick, _ = done
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "What is it?"}\n' * 3)
    cfg = dataclasses.replace(quick.pretrain, steps=6, held_out=str(text), held_out_every=2, seed=quick.seed)
    cfg = dataclasses.replace(cfg, out=tmp_path / "run", data_dir=quick.out / "data")
    pretrain.main(cfg)
    assert [row["step"] for row in metrics_of(cfg.out) if "loss/held_out" in row] == [1, 3, 5, 6]
    assert "held out: 3 rows kept" in capsys.readouterr().out


UNUSABLE = {
    pretrain: ({"text": ""}, "bad.jsonl, line 1, field text: expected some text"),
    sft: ({"prompt": "", "completion": "a"}, "held-out demonstrations: none can be used; 0 rows kept"),
}


@pytest.mark.parametrize("stage", UNUSABLE, ids=["pretrain", "sft"])
def test_what_is_said_without_held_out_rows(done, tmp_path, capsys, stage):
    quick, _ = done
    tok = models.load(quick.out / "pretrain" / "model").tokenizer
    cfg = dataclasses.replace(stage.Config(), data=str(tmp_path / "rows.jsonl"), data_dir=tmp_path / "data")
    assert stage.read_held_out(cfg, tok) is None
    assert capsys.readouterr().out.startswith("no held-out ")
    assert stage.read_held_out(dataclasses.replace(cfg, held_out_every=0), tok) is None
    assert capsys.readouterr().out == ""
    row, message = UNUSABLE[stage]
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    flags = ["--out", tmp_path / "run", "--data-dir", quick.out / "data", "--held-out", tmp_path / "bad.jsonl"]
    default = dataclasses.replace(getattr(quick, stage.__name__.split(".")[1]), init=quick.out / "pretrain" / "model")
    assert message in refused(capsys, stage.main, default, *flags)
