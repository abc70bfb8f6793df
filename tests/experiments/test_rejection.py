"""Rejection sampling."""

import dataclasses

import pytest

from experiments import (
    rejection,
    sft,
)
from rlhf_jax.runs import log
from rlhf_jax.types import InputError
from tests.quickstart import metrics_of, paths


def test_rejection_sampling_learns_the_best_answers(done, tmp_path):
    cfg, _ = done
    tune = dataclasses.replace(cfg.sft, text=None, data=sft.Config().data)
    settings = {"data": "world:rows=100", "prompts": 16, "best_of": 16, "batch": 64, "sft": tune}
    config = rejection.Config(**settings, **paths(cfg, tmp_path, "init", "reward", "out"), prompt_length=40)
    state = rejection.main(dataclasses.replace(config, max_new_tokens=60))
    rows = log.read(tmp_path, "best.jsonl")
    assert 8 <= len(rows) <= 16 and all(set(row) == {"prompt", "completion"} for row in rows)
    assert int(state.step) == len(metrics_of(tmp_path / "sft")) > 0
    with pytest.raises(InputError, match="max_new_tokens=1: no answer ends within it"):
        rejection.main(dataclasses.replace(config, max_new_tokens=1, best_of=2))
    with pytest.raises(InputError, match="best_of=1: expected at least 2"):
        rejection.Config(best_of=1)
