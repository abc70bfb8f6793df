"""On-policy distillation."""

from experiments import distill
from rlhf_jax import models
from tests.quickstart import LENGTHS, metrics_of, paths


def test_a_student_learns_on_its_own_answers(done, tmp_path):
    cfg, _ = done
    given = LENGTHS | paths(cfg, tmp_path, "init", "out")
    teacher = cfg.out / "pretrain" / "model"
    distill.main(distill.Config(data="world:rows=100", batch=16, steps=2, warmup=1, teacher=teacher, **given))
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and rows[0]["loss/distillation"] > 0 and rows[0]["grad_norm"] > 0
    assert models.load(tmp_path / "model").config == models.load(cfg.out / "sft" / "model").config
