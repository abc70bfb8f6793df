"""The experiments beside the recipe, two tiny steps of each: what they write, and what they refuse."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import best_of_n, dpo, evaluate, grpo, ppo, ppo_gold, rank, rejection, reward, rloo, rounds, sft
from rlhf_jax import grpo as grpo_lib
from rlhf_jax import log, models
from rlhf_jax import rloo as rloo_lib
from rlhf_jax.types import InputError
from tests.quickstart import LENGTHS, metrics_of, refused

pytestmark = [pytest.mark.usefixtures("quick_compiling"), pytest.mark.xdist_group("quickstart")]


def given(cfg, out, *names) -> dict:
    """Where an experiment finds what the quickstart left."""
    tuned, judge = cfg.out / "sft" / "model", cfg.out / "reward" / "model"
    paths = {"init": tuned, "model": tuned, "reference": tuned, "reward": judge, "rewards": (judge,), "out": out}
    return {name.removesuffix("s") if name == "rewards" else name: paths[name] for name in names} | {
        "data_dir": cfg.out / "data"
    }


GROUPS = {
    "grpo": (grpo.main, grpo.Config, grpo_lib.Config(minibatches=2, group=4)),
    "rloo": (rloo.main, rloo.Config, rloo_lib.Config(minibatches=2, group=4)),
}
SIZES = {"data": "world:rows=100", "text": "world:rows=200", "batch": 16, "steps": 2, "warmup": 1, "samples_every": 1}


@pytest.mark.parametrize("name", GROUPS)
def test_answers_come_in_groups(done, tmp_path, name):
    cfg, _ = done
    main, make, algorithm = GROUPS[name]
    state = main(make(**SIZES, **LENGTHS, **given(cfg, tmp_path, "init", "rewards", "out"), algorithm=algorithm))
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert "loss/ptx" in rows[0] and rows[0]["ratio/first_error"] < 1e-4
    samples = log.read(tmp_path, "samples.jsonl")[:8]
    assert len({row["prompt"] for row in samples[:4]}) == len({row["prompt"] for row in samples[4:]}) == 1
    assert samples[0]["prompt"] != samples[4]["prompt"]
    saved = models.load(tmp_path / "model").params
    np.testing.assert_array_equal(saved["embedding"], state.params["policy"]["embedding"])
    assert set(state.params) == {"policy"}


def test_a_batch_of_groups_that_are_not_whole(capsys):
    default = grpo.Config(algorithm=grpo_lib.Config(group=4))
    assert "batch=18: expected a multiple of the group of 4" in refused(capsys, grpo.main, default, "--batch", 18)


def test_dpo_learns_from_rankings(done, tmp_path):
    cfg, _ = done
    data = str(cfg.out / "rank" / "train.jsonl")
    dpo.main(dpo.Config(data=data, length=64, batch=8, **given(cfg, tmp_path, "init", "out")))
    rows = metrics_of(tmp_path)
    assert len(rows) == 2 and rows[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference agree
    assert rows[0]["reward/margin"] == pytest.approx(0, abs=1e-4)
    assert models.load(tmp_path / "model").config == models.load(cfg.out / "sft" / "model").config


def test_rejection_sampling_learns_the_best_answers(done, tmp_path):
    cfg, _ = done
    tune = dataclasses.replace(cfg.sft, text=None, data=sft.Config().data)
    settings = {"data": "world:rows=100", "prompts": 16, "best_of": 16, "batch": 64, "sft": tune}
    config = rejection.Config(**settings, **given(cfg, tmp_path, "init", "reward", "out"), prompt_length=40)
    state = rejection.main(dataclasses.replace(config, max_new_tokens=60))
    rows = log.read(tmp_path, "best.jsonl")
    assert 8 <= len(rows) <= 16 and all(set(row) == {"prompt", "completion"} for row in rows)
    assert int(state.step) == len(metrics_of(tmp_path / "sft")) > 0
    with pytest.raises(InputError, match="max_new_tokens=1: no answer ends within it"):
        rejection.main(dataclasses.replace(config, max_new_tokens=1, best_of=2))
    with pytest.raises(InputError, match="best_of=1: expected at least 2"):
        rejection.Config(best_of=1)


def test_best_of_n_is_an_evaluation(done, tmp_path):
    cfg, _ = done
    settings = {"best_of": 3, "prompts": 16, "texts": 60, "batch": 16, **LENGTHS, "out": tmp_path / "result.json"}
    fork = dataclasses.replace(best_of_n.CONFIG, **settings, **given(cfg, None, "model", "reference", "reward"))
    result = best_of_n.main(dataclasses.replace(fork, out=tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["n"] == 3 and result["kl"] == pytest.approx(math.log(3) - 2 / 3)
    single = best_of_n.main(dataclasses.replace(fork, best_of=1, out=None))
    assert result["reward"] > single["reward"]


def test_ppo_against_a_function_of_the_text(done, tmp_path):
    cfg, _ = done
    settings = vars(cfg.ppo) | {"text": None} | given(cfg, tmp_path, "init", "rewards", "out")
    ppo_gold.main(ppo_gold.Config(**settings))
    assert all(-1 <= row["score"] <= 1 for row in log.read(tmp_path, "samples.jsonl"))


def test_several_reward_models_and_a_reference_of_its_own(done, tmp_path, capsys):
    cfg, _ = done
    judge = cfg.out / "reward" / "model"
    settings = {
        "text": None,
        "steps": 1,
        "reward": (judge, judge),
        "pessimism": 1.0,
        "reference": cfg.out / "pretrain" / "model",
    }
    ppo.main(dataclasses.replace(cfg.ppo, **given(cfg, tmp_path, "init", "out"), **settings))
    row = metrics_of(tmp_path)[0]
    assert row["reward/disagreement"] == pytest.approx(0, abs=1e-5)  # a model agrees with itself
    assert abs(row["kl/reference"]) > 1e-4  # from the first step on
    assert abs(metrics_of(cfg.out / "ppo")[0]["kl/reference"]) < 1e-5
    capsys.readouterr()  # the progress of the run
    said = refused(capsys, ppo.main, cfg.ppo, "--pessimism", 1)
    assert "pessimism needs the disagreement of several reward models" in said


def test_rounds_of_labels(done, tmp_path, monkeypatch, capsys):
    """What each stage of each round is given, without running them."""
    cfg, _ = done
    ran = []

    def stage(name):
        def main(config):
            ran.append((name, config))
            if name == "rank":
                config.out.mkdir(parents=True)
                (config.out / "train.jsonl").write_text(f"{config.init} {config.skip}\n")
            return {"gold": 0.5, "reward": 0.25, "kl": 1.0, "nll": 2.0}

        return main

    for name, module in {"rank": rank, "reward": reward, "ppo": ppo, "evaluate": evaluate}.items():
        monkeypatch.setattr(module, "main", stage(name))
    tuned = cfg.out / "sft" / "model"
    config = rounds.Config(rounds=2, rank=rank.Config(prompts=8), **given(cfg, tmp_path, "init", "out"))
    result = rounds.main(config)
    assert json.loads((tmp_path / "rounds.json").read_text()) == result
    assert [len(rows) for rows in result.values()] == [2, 2] and (tmp_path / "rounds.png").is_file()
    first = tmp_path / "online" / "round1" / "ppo" / "model"
    for arm, answering in {"online": first, "offline": tuned}.items():
        assert (tmp_path / arm / "labels.jsonl").read_text() == f"{tuned} 0\n{answering} 8\n"
        here = [(name, config) for name, config in ran if config.out.is_relative_to(tmp_path / arm)]
        assert [name for name, _ in here] == ["rank", "reward", "ppo", "evaluate"] * 2
        learn, improve, judge = (config for _, config in here[5:])
        assert learn.data == str(tmp_path / arm / "labels.jsonl") and learn.init == tuned
        assert improve.init == tmp_path / arm / "round1" / "ppo" / "model" and improve.reference == tuned
        assert improve.reward == (learn.out / "model",) == (judge.reward,)
        assert judge.model == improve.out / "model" and judge.reference == tuned
        assert improve.seed != here[2][1].seed  # no two rollouts share noise
    said = refused(capsys, rounds.main, config, "--ppo.init", "elsewhere")
    assert "--ppo.init has no effect here, where other flags decide it" in said
