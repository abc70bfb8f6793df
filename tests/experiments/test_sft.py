"""Fine-tuning."""

import dataclasses

from experiments import (
    sft,
)
from rlhf_jax import models
from rlhf_jax.runs import checkpoint
from tests.quickstart import ADAPTERS, check_adapted, paths


def test_fine_tuning_by_adapters(done, tmp_path):
    cfg, _ = done
    state = sft.main(
        dataclasses.replace(
            cfg.sft, **paths(cfg, tmp_path, "init", "out"), lora=ADAPTERS, saves=checkpoint.Config(every=1)
        )
    )
    last = int(state.step)
    assert checkpoint.steps(tmp_path / "checkpoints") == [last - 1, last]
    check_adapted(cfg, models.load(tmp_path / "model").params, state.params)
    checkpoint.restore(tmp_path / "checkpoints", state)  # raises if it holds anything else
