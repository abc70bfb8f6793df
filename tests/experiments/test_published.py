"""The experiments on published data, each for two tiny steps, on rows in the shape of theirs that are made here."""

import dataclasses
import gzip
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

import experiments
from experiments import grpo, ppo
from experiments.published import (
    gsm8k_evaluate,
    gsm8k_grpo,
    gsm8k_ppo,
    gsm8k_sft,
    reward_finegrained,
    reward_hh,
    tinystories,
)
from rlhf_jax import models, runs
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.runs import log
from rlhf_jax.types import InputError
from tests.quickstart import metrics_of, refused

SUMS = [(a, b) for a in range(2) for b in range(2)]
SIZES = {"prompt_length": 40, "max_new_tokens": 12}


def problem(a: int, b: int) -> dict:
    return {"question": f"{a} and {b}?", "answer": f"#### {a + b}"}


@pytest.fixture
def sums(tmp_path):
    """Sums of single digits, as GSM8K has its problems."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(problem(*pair)) + "\n" for pair in SUMS * 32))
    return f"gsm8k:{path}"


def given(done, out, **settings) -> dict:
    """Where an experiment finds what the quickstart left."""
    cfg, _ = done
    return {"init": cfg.out / "sft" / "model", "data_dir": cfg.out / "data", "out": out} | settings


@pytest.mark.slow
def test_a_base_model_of_stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Once {n} birds sang to {n * n} frogs by a lake." for n in range(99)))
    sizes = {"vocab_size": 300, "length": 32, "batch": 8, "steps": 2, "warmup": 1}
    where = {"data": str(path), "data_dir": tmp_path / "data", "out": tmp_path / "run"}
    tinystories.main(dataclasses.replace(tinystories.CONFIG, **sizes, **where))
    assert len(metrics_of(tmp_path / "run")) == 2
    assert models.load(tmp_path / "run" / "model").config.max_length == 512


def test_rankings_of_four(done, tmp_path, capsys):
    answers = {f"prediction {k}": f"{k} pears" for k in (1, 2, 3, 4)}
    row = {"question": "how many?", "passages": [["Pears", "Some are green."]], **answers}
    preferences = [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2], [0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0]]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps([row | {"preference": some} for some in preferences * 8]))
    where = given(done, tmp_path / "run", data=f"finegrained:{path}[:80%]", held_out=f"finegrained:{path}[80%:]")
    result = reward_finegrained.main(dataclasses.replace(reward_finegrained.CONFIG, **where, length=100, batch=8))
    assert len(metrics_of(tmp_path / "run")) == 4
    found = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert (found["pairs"], found["ties"]) == (6 + 3 + 3 + 6 + 5 + 6 + 3 + 3, 0 + 3 + 3 + 0 + 1 + 0 + 3 + 3)
    said = capsys.readouterr().out
    assert (
        f"{100 * result['accuracy']:.1f} % of 35, where chance has 50 %; 13 more are ties: of all, at most 72.9" in said
    )


def test_rankings_of_dialogues(done, tmp_path, capsys):
    talk = "\n\nHuman: {}?\n\nAssistant: Yes.\n\nHuman: And {}?\n\nAssistant: {}"
    rows = [{"chosen": talk.format("x" * 60, n, "No."), "rejected": talk.format("x" * 60, n, "Bah")} for n in range(24)]
    path = tmp_path / "talks.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    where = given(done, tmp_path / "run", data=f"hh:{path}[:16]", held_out=f"hh:{path}[16:]")
    result = reward_hh.main(dataclasses.replace(reward_hh.CONFIG, **where, length=60, batch=8))
    assert len(metrics_of(tmp_path / "run")) == 2 and 0 <= result["accuracy"] <= 1
    said = capsys.readouterr().out
    assert "[:16]: 16 rows kept (16 of them truncated)" in said  # without their first turns
    assert "[16:]: 8 rows kept" in said and "% of 8, where chance has 50 %\n" in said


def test_problems_are_demonstrations(done, tmp_path, sums):
    config = dataclasses.replace(gsm8k_sft.CONFIG, **given(done, tmp_path / "run", data=f"{sums}[:40]"))
    state = gsm8k_sft.main(dataclasses.replace(config, length=64, epochs=1))
    assert int(state.step) == len(metrics_of(tmp_path / "run")) > 0


def test_a_check_of_the_answer_is_a_reward(done, tmp_path, sums, capsys):
    """PPO without any reward model."""
    where = given(done, tmp_path / "run", data=sums, batch=16, steps=2, samples_every=1, **SIZES)
    algorithm = ppo_lib.Config(minibatches=2)
    state = gsm8k_ppo.main(dataclasses.replace(gsm8k_ppo.CONFIG, **where, algorithm=algorithm))
    assert set(state.params["critic"]) == {"kernel", "bias"} and len(metrics_of(tmp_path / "run")) == 2
    assert {row["score"] for row in log.read(tmp_path / "run", "samples.jsonl")} <= {0.0, 1.0}
    capsys.readouterr()
    said = refused(capsys, gsm8k_ppo.main, gsm8k_ppo.CONFIG, "--critic", "reward")
    assert said.startswith("error: critic=reward starts from a reward model: name one by --reward")
    plain = given(done, tmp_path / "plain", data="world:rows=100", text=None, reward=(), **SIZES)
    said = refused(capsys, ppo.main, ppo.Config(critic="policy", **plain))
    assert said == "error: reward: expected at least one model directory"
    said = refused(capsys, gsm8k_grpo.main, gsm8k_grpo.CONFIG, "--data", sums, "--reward", tmp_path)
    assert said.startswith("error: reward and weights have no effect on scores that are not reward models'")
    said = refused(capsys, grpo.main, grpo.Config(**plain))
    assert said == "error: reward: expected at least one model directory"
    with pytest.raises(InputError, match="the prompts come without answers to check responses by"):
        gsm8k_grpo.main(dataclasses.replace(gsm8k_grpo.CONFIG, data="world:rows=20", data_dir=where["data_dir"]))


@pytest.mark.full  # the test before has its loop, by PPO
def test_grpo_raises_the_share_of_problems_solved(done, tmp_path, sums):
    tuned, better = tmp_path / "sft", tmp_path / "grpo"
    settings = {"length": 64, "lr": 1e-2, "epochs": 6, "batch": 8}
    gsm8k_sft.main(dataclasses.replace(gsm8k_sft.CONFIG, **given(done, tuned, data=sums), **settings))
    start = given(done, better, data=sums, init=tuned / "model", **SIZES)
    algorithm = grpo_lib.Config(group=8, kl_coef=0.0)
    settings = {"batch": 64, "steps": 20, "lr": 2e-3, "warmup": 1, "schedule": "constant", "algorithm": algorithm}
    gsm8k_grpo.main(dataclasses.replace(gsm8k_grpo.CONFIG, **start, **settings))
    score = [row["reward/score"] for row in metrics_of(better)]
    judge = gsm8k_evaluate.Config(
        data=sums, data_dir=start["data_dir"], temperature=1.0, **SIZES, out=tmp_path / "r.json"
    )
    before, after = (gsm8k_evaluate.main(dataclasses.replace(judge, model=out / "model")) for out in (tuned, better))
    assert after["accuracy"] > before["accuracy"] + 0.1 and sum(score[-5:]) > sum(score[:5])


def defaults_of(module):
    """The configurations that the module's command line starts from."""
    if hasattr(module, "STAGES"):
        return [config for _, config in module.STAGES.values()]
    return [module.CONFIG if hasattr(module, "CONFIG") else module.Config()] if hasattr(module, "main") else []


def paths_in(value):
    """Each text in a configuration as JSON has it, without the name of a format in front and a slice behind."""
    if isinstance(value, str):
        yield Path(value.partition("[")[0].rpartition(":")[2])
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from paths_in(one)


def test_no_default_is_outside_of_the_repository():
    names = [
        name for _, name, is_folder in pkgutil.walk_packages(experiments.__path__, "experiments.") if not is_folder
    ]
    defaults = {name: defaults_of(importlib.import_module(name)) for name in names}
    assert sum(map(bool, defaults.values())) >= 25
    for name, configs in defaults.items():
        for config in configs:
            for path in paths_in(runs.settings(config)):
                outside = path.is_absolute() or ".." in path.parts or "~" in path.parts
                assert not outside, f"{name}: {path}"


@pytest.mark.parametrize(
    ("experiment", "flag"),
    [
        (tinystories, '--data "PATH"'),
        (reward_hh, '--data "hh:PATH[:80%]"'),
        (reward_finegrained, '--data "finegrained:PATH[:80%]"'),
        (gsm8k_sft, '--data "gsm8k:PATH[:7000]"'),
        (gsm8k_grpo, '--data "gsm8k:PATH[:7000]"'),
        (gsm8k_ppo, '--data "gsm8k:PATH[:7000]"'),
        (gsm8k_evaluate, '--data "gsm8k:PATH[7000:]"'),
    ],
)
def test_data_are_required(experiment, flag, capsys, tmp_path):
    (default,) = defaults_of(experiment)
    said = refused(capsys, experiment.main, default, "--out", tmp_path / "run")
    assert said.startswith(f"error: --data is required: {flag}, where PATH is ")
    assert not (tmp_path / "run").exists()
    if "PATH" in str(getattr(default, "held_out", "")):
        said = refused(capsys, experiment.main, default, "--out", tmp_path / "run", "--data", tmp_path)
        assert said.startswith('error: --held-out is required: --held-out "')
