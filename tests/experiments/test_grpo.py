"""GRPO, RLOO and online DPO."""

import math

import numpy as np
import pytest

from experiments import grpo, online_dpo, rloo
from rlhf_jax import models
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import online_dpo as online_dpo_lib
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.models import lora
from rlhf_jax.runs import log
from tests.quickstart import LENGTHS, metrics_of, paths, refused

GROUPS = {
    "grpo": (grpo.main, grpo.Config, grpo_lib.Config(minibatches=2, group=4)),
    "rloo": (rloo.main, rloo.Config, rloo_lib.Config(minibatches=2, group=4)),
    "online_dpo": (online_dpo.main, online_dpo.Config, online_dpo_lib.Config(group=4)),
}


SIZES = {"data": "world:rows=100", "text": "world:rows=200", "batch": 16, "steps": 2, "warmup": 1, "samples_every": 1}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name == "rloo" else ()) for name in GROUPS]
)
def test_answers_come_in_groups(done, tmp_path, name):
    cfg, _ = done
    main, make, algorithm = GROUPS[name]
    given = SIZES | LENGTHS | paths(cfg, tmp_path, "init", "rewards", "out")
    adapted = {"resample": 1, "lora": lora.Config(rank=2)} if name == "rloo" else {}
    if name == "online_dpo":  # eight groups, one to each device, and the base, the reference and the judge in int8
        given["batch"], adapted = 32, {"lora": lora.Config(rank=2), "compute": models.Compute(frozen="int8")}
    state = main(make(**given, algorithm=algorithm, **adapted))
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert "loss/ptx" in rows[0] and rows[0]["ratio/first_error"] < 1e-4
    samples = log.read(tmp_path, "samples.jsonl")[:8]
    assert len({row["prompt"] for row in samples[:4]}) == len({row["prompt"] for row in samples[4:]}) == 1
    assert samples[0]["prompt"] != samples[4]["prompt"]
    saved = models.load(tmp_path / "model").params
    if adapted:
        before = models.load(cfg.out / "sft" / "model").params
        rounded = 2**-8 if name == "online_dpo" else 0
        np.testing.assert_allclose(saved["embedding"], before["embedding"], rtol=rounded, atol=0)
        assert (saved["blocks"]["mlp"]["up"]["kernel"] != before["blocks"]["mlp"]["up"]["kernel"]).any()
    else:
        np.testing.assert_array_equal(saved["embedding"], state.params["policy"]["embedding"])
    assert set(state.params) == {"policy"}


def test_a_batch_of_groups_that_are_not_whole(capsys):
    default = grpo.Config(algorithm=grpo_lib.Config(group=4))
    assert "batch=18: expected a multiple of the group of 4" in refused(capsys, grpo.main, default, "--batch", 18)


def test_resampling_and_rewards_are_not_combined(capsys):
    flags = "--resample", 1, "--algorithm.rewards.clip", 1
    assert "resample compares scores before algorithm.rewards" in refused(capsys, grpo.main, grpo.Config(), *flags)
