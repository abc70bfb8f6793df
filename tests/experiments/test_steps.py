"""Process rewards from labels of steps to policies."""

import dataclasses

import pytest

from experiments import grpo, ppo
from experiments.studies import steps
from rlhf_jax.algorithms import rewards
from rlhf_jax.rollouts import scores
from tests.quickstart import metrics_of, paths, refused


def test_policies_learn_from_rewards_of_steps(done, tmp_path):
    quick, _ = done
    default = steps.Config()
    sizes = {"prompt_length": 60, "max_new_tokens": 12, "batch": 16, "steps": 1, "warmup": 0}
    few = {"minibatches": 1}
    found = steps.main(
        dataclasses.replace(
            default,
            **paths(quick, tmp_path, "init", "out"),
            solutions=32,
            labelled=16,
            held_out=8,
            sft=dataclasses.replace(default.sft, batch=8, length=90),
            process_reward=dataclasses.replace(default.process_reward, batch=8, length=90),
            ppo=dataclasses.replace(default.ppo, **sizes, algorithm=dataclasses.replace(default.ppo.algorithm, **few)),
            grpo=dataclasses.replace(
                default.grpo, **sizes, algorithm=dataclasses.replace(default.grpo.algorithm, **few)
            ),
        )
    )
    assert [*found] == ["process_reward", "sft", "ppo", "grpo"] and 0 <= found["process_reward"]["step/accuracy"] <= 1
    assert abs(found["sft"]["kl"]) < 1e-4 and all(
        0 <= found[name]["held_out/right_answer"] <= 1 for name in ("ppo", "grpo")
    )
    for name in ("ppo", "grpo"):
        (row,) = metrics_of(tmp_path / name)
        assert row["reward/score"] < 0  # logarithms, and what unfinished answers cost


@pytest.mark.parametrize(
    ("main", "config", "flags", "said"),
    [
        (ppo.main, ppo.Config, ["--algorithm.rewards.clip", 1], "only length_penalty goes with process rewards"),
        (grpo.main, grpo.Config, ["--algorithm.rewards.normalize"], "only length_penalty goes with process rewards"),
        (grpo.main, grpo.Config, ["--process.model", "nowhere"], "nowhere is not a model directory"),
    ],
)
def test_what_does_not_go_with_process_rewards(tmp_path, capsys, main, config, flags, said):
    default = config(out=tmp_path / "run", process=scores.Process(model=tmp_path))
    assert said in refused(capsys, main, default, *flags)


def test_a_length_penalty_goes_with_process_rewards():
    rewards.Config(length_penalty=0.1).check_process()
