"""KTO."""

import json

import pytest

from experiments import kto
from rlhf_jax import models
from rlhf_jax.models import lora
from tests.quickstart import metrics_of, paths


def test_kto_learns_from_thumbs(done, tmp_path):
    cfg, _ = done
    rows = [
        {"prompt": f"Is it {n}?", "completion": "yes" if n % 2 else "no, no", "label": n % 2 == 1} for n in range(16)
    ]
    data = tmp_path / "thumbs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = paths(cfg, tmp_path, "init", "out")
    kto.main(kto.Config(data=str(data), length=64, batch=8, warmup=1, lora=lora.Config(rank=2), **given))
    metrics = metrics_of(tmp_path)
    assert len(metrics) == 2 and metrics[0]["loss/kto"] == pytest.approx(0.5, abs=1e-4)  # policy and reference agree
    assert metrics[0]["reward/good"] == pytest.approx(0, abs=1e-4) and metrics[0]["grad_norm"] > 0
    assert models.load(tmp_path / "model").config == models.load(cfg.out / "sft" / "model").config
