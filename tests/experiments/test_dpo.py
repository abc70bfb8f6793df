"""DPO."""

import math

import pytest

from experiments import (
    dpo,
)
from rlhf_jax import models
from rlhf_jax.runs import checkpoint
from tests.quickstart import metrics_of, paths


def test_dpo_learns_from_rankings(done, tmp_path):
    cfg, _ = done
    data = str(cfg.out / "rank" / "train.jsonl")
    dpo.main(
        dpo.Config(
            data=data, length=64, batch=8, saves=checkpoint.Config(every=1), **paths(cfg, tmp_path, "init", "out")
        )
    )
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference agree
    assert rows[0]["reward/margin"] == pytest.approx(0, abs=1e-4)
    assert models.load(tmp_path / "model").config == models.load(cfg.out / "sft" / "model").config
