"""DPO."""

import math

import pytest

from experiments import dpo, orpo, simpo, slic
from rlhf_jax import models
from rlhf_jax.models import lora
from rlhf_jax.runs import checkpoint
from tests.quickstart import metrics_of, paths


def test_adapters_begin_as_the_reference(done, tmp_path):
    cfg, _ = done
    data = str(cfg.out / "rank" / "train.jsonl")
    dpo.main(dpo.Config(data=data, length=64, batch=8, lora=lora.Config(rank=2), **paths(cfg, tmp_path, "init", "out")))
    assert metrics_of(tmp_path)[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)


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


@pytest.mark.parametrize("fork", [simpo, orpo, slic], ids=["simpo", "orpo", "slic"])
def test_forks_learn_by_adapters(fork, done, tmp_path):
    cfg, _ = done
    data = str(cfg.out / "rank" / "train.jsonl")
    fork.main(
        fork.Config(data=data, length=64, batch=8, lora=lora.Config(rank=2), **paths(cfg, tmp_path, "init", "out"))
    )
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and rows[0]["grad_norm"] > 0
    before, after = (models.load(path / "model") for path in (cfg.out / "sft", tmp_path))
    changed = (
        before.params["blocks"]["attention"]["qkv"]["kernel"] != after.params["blocks"]["attention"]["qkv"]["kernel"]
    )
    assert changed.any() and (before.params["embedding"] == after.params["embedding"]).all()
