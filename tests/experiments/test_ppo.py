"""PPO and its forks."""

import dataclasses
import gc
import math
import traceback
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import (
    evaluate,
    grpo,
    ppo,
    ppo_gold,
)
from experiments.papers import ppo_instructgpt, presets
from rlhf_jax import models, runs
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.data import tokenizer
from rlhf_jax.devices import parallel
from rlhf_jax.models import lora
from rlhf_jax.runs import checkpoint, cli, log
from rlhf_jax.types import InputError
from tests import tiny
from tests.quickstart import ADAPTERS, LENGTHS, check_adapted, metrics_of, paths, refused


def test_ppo_shows_what_it_samples(done):
    cfg, _ = done
    rows = log.read(cfg.out / "ppo", "samples.jsonl")
    assert {row["step"] for row in rows} == {1, 2}
    assert set(rows[0]) == {"step", "prompt", "response", "score", "kl"}
    assert "| prompt | response | score | kl |" in (cfg.out / "ppo" / "samples.md").read_text()
    assert metrics_of(cfg.out / "ppo")[0]["ratio/first_error"] < 1e-4


def test_a_fork_runs_and_ppo_runs_without_pretraining_text(done, tmp_path):
    cfg, _ = done
    # What a fork is: the main of another, new defaults.
    fork = dataclasses.replace(
        cfg.ppo, text=None, lr=1e-3, steps=4, samples_every=2, samples=3, saves=checkpoint.Config(every=2)
    )
    data = [
        "--init",
        cfg.out / "sft" / "model",
        "--reward",
        cfg.out / "reward" / "model",
        "--data-dir",
        cfg.out / "data",
    ]
    state = cli.run(ppo.main, fork, [*map(str, data), "--out", str(tmp_path / "fork")])
    rows = metrics_of(tmp_path / "fork")
    assert int(state.step) == len(rows) == 4
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "loss/ptx" not in rows[0]
    assert [row["step"] for row in log.read(tmp_path / "fork", "samples.jsonl")] == [1] * 3 + [3] * 3 + [4] * 3
    assert checkpoint.steps(tmp_path / "fork" / "checkpoints") == [2, 4]
    tiny.assert_close(state.params["policy"], models.load(tmp_path / "fork" / "model").params, atol=0)


def test_from_main_to_the_loss_are_seven_frames(done, tmp_path, monkeypatch):
    cfg, _ = done
    root, names = Path(ppo.__file__).parents[1], []

    class Reached(Exception):
        pass

    def policy_loss(*args, **settings):
        for frame in traceback.extract_stack():
            if any(Path(frame.filename).is_relative_to(root / ours) for ours in ("experiments", "rlhf_jax")):
                names.append(frame.name)
        raise Reached

    monkeypatch.setattr(ppo_lib, "policy_loss", policy_loss)
    with pytest.raises(Reached):
        ppo.main(dataclasses.replace(cfg.ppo, **paths(cfg, tmp_path / "run", "init", "rewards")))
    assert names == ["main", "_step_on_base", "train_step", "apply", "update", "loss"]  # and policy_loss, the seventh


def test_the_published_settings_run_and_save_the_averaged_policy(done, tmp_path):
    cfg, _ = done
    small = {name: getattr(cfg.ppo, name) for name in ("data", "prompt_length", "max_new_tokens", "batch", "steps")}
    fork = dataclasses.replace(
        ppo_instructgpt.CONFIG,
        **small,
        text="world:rows=200",
        text_batch=8,
        init=cfg.out / "sft" / "model",
        reward=(cfg.out / "reward" / "model",),
        data_dir=cfg.out / "data",
        out=tmp_path / "fork",
        algorithm=dataclasses.replace(presets.instructgpt.algorithm, minibatches=2),
    )
    state = ppo.main(fork)
    saved = models.load(tmp_path / "fork" / "model").params
    tiny.assert_close(state.opt_state["ema"], saved, atol=0)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(np.subtract(a, b)))), state.params["policy"], saved)
    assert max(jax.tree.leaves(moved)) > 0


def test_ppo_against_a_function_of_the_text_whose_critic_learns_first(done, tmp_path, capsys):
    cfg, _ = done
    algorithm = dataclasses.replace(cfg.ppo.algorithm, critic_first=1)
    settings = vars(cfg.ppo) | {"text": None, "algorithm": algorithm} | paths(cfg, tmp_path, "init", "rewards", "out")
    state = ppo_gold.main(ppo_gold.Config(**settings))
    assert all(-1 <= row["score"] <= 1 for row in log.read(tmp_path, "samples.jsonl"))
    assert [row["kl/reference"] for row in metrics_of(tmp_path)] == pytest.approx([0, 0], abs=1e-5)  # before updates
    tuned = models.load(cfg.out / "sft" / "model").params
    assert (state.params["policy"]["embedding"] != tuned["embedding"]).any()  # by the last
    capsys.readouterr()
    said = refused(capsys, ppo.main, cfg.ppo, "--algorithm.critic-first", 2)
    assert "algorithm.critic_first=2: expected less than steps=2" in said


def test_several_reward_models_and_a_reference_of_its_own(done, tmp_path, capsys):
    cfg, _ = done
    judge = cfg.out / "reward" / "model"
    settings = {
        "text": None,
        "steps": 1,
        "reward": (judge, judge),
        "pessimism": 1.0,
        "reference": cfg.out / "pretrain" / "model",
        "compute": models.Compute(rollout="int8", cache="int8"),
    }
    ppo.main(dataclasses.replace(cfg.ppo, **paths(cfg, tmp_path, "init", "out"), **settings))
    row = metrics_of(tmp_path)[0]
    assert row["reward/disagreement"] == pytest.approx(0, abs=1e-5)  # a model agrees with itself
    assert abs(row["kl/reference"]) > 1e-4  # from the first step on
    assert 1e-4 < row["ratio/first_error"] < 1  # of answers that are sampled in int8
    assert abs(metrics_of(cfg.out / "ppo")[0]["kl/reference"]) < 1e-5
    capsys.readouterr()  # the progress of the run
    said = refused(capsys, ppo.main, cfg.ppo, "--pessimism", 1)
    assert "pessimism needs the disagreement of several reward models" in said


def test_ppo_by_adapters(done, tmp_path):
    cfg, _ = done
    settings = paths(cfg, tmp_path, "init", "rewards", "out") | {"text": None, "lora": ADAPTERS}
    state = ppo.main(dataclasses.replace(cfg.ppo, **settings))
    check_adapted(cfg, models.load(tmp_path / "model").params, state.params["policy"])
    assert set(state.params["critic"]) == {"trunk", "kernel", "bias"}
    first, last = metrics_of(tmp_path)
    assert max(first["ratio/first_error"], last["ratio/first_error"]) < 1e-4
    assert abs(first["kl/reference"]) < 1e-5 < abs(last["kl/reference"])  # the reference is the base


class Begun(Exception):
    """Raised in place of a run, with how many of the loaded parameters are still there."""


@pytest.mark.parametrize("experiment", [ppo, grpo])
def test_models_do_not_stay_as_they_were_loaded(experiment, done, tmp_path, monkeypatch):
    """Beside what is made of them: on a mesh they would lie on its devices for the whole run."""
    cfg, _ = done
    loaded = {}

    def watched(name, load):
        def again(*args, **kwargs):
            model = load(*args, **kwargs)
            loaded[name] = [weakref.ref(x) for x in jax.tree.leaves(model.params)]
            return model

        return again

    def begin(*args, **kwargs):
        gc.collect()
        raise Begun({name: sum(kept() is not None for kept in leaves) for name, leaves in loaded.items()})

    for name in ("load", "load_reward"):
        monkeypatch.setattr(models, name, watched(name, getattr(models, name)))
    monkeypatch.setattr(runs, "Run", begin)
    given = {"init": cfg.out / "sft/model", "reward": (cfg.out / "reward/model",), "data": "world:rows=100"}
    given |= {"out": tmp_path, "data_dir": cfg.out / "data", "compute": models.Compute(frozen="bfloat16")}
    given |= {"devices": parallel.Config(fsdp=8), "batch": 16, **LENGTHS}
    if experiment is ppo:  # the base is in bfloat16; the critic's head is trained
        with pytest.raises(Begun) as raised:
            ppo.main(ppo.Config(**given, lora=lora.Config(rank=2)))
        assert raised.value.args == ({"load": 0, "load_reward": 2},)
    else:  # the policy is trained
        with pytest.raises(Begun) as raised:
            grpo.main(grpo.Config(**given))
        assert raised.value.args == ({"load": len(loaded["load"]), "load_reward": 0},)


def test_a_minibatch_that_does_not_divide_over_the_devices(done, flags, capsys):
    cfg, _ = done
    default = dataclasses.replace(
        cfg.ppo, init=cfg.out / "sft" / "model", reward=(cfg.out / "reward" / "model",), text=None
    )
    said = refused(capsys, ppo.main, default, *flags, "--algorithm.minibatches", 4)
    assert "a minibatch of 4 rows does not divide over 8 devices: use fewer minibatches" in said


def test_models_that_do_not_read_the_same_tokens(done, flags, tmp_path, capsys):
    cfg, _ = done
    config = dataclasses.replace(tiny.GPT, vocab_size=77)
    other = models.Model(config, tiny.scalar(config), None, lambda: None)
    models.save(other, other.params, tmp_path / "other")
    init = cfg.out / "sft" / "model"
    said = refused(capsys, ppo.main, cfg.ppo, *flags, "--init", init, "--reward", tmp_path / "other")
    assert f"the vocabularies differ in size ({init} 512, {tmp_path / 'other'} 77): train the reward model from" in said
    said = refused(
        capsys,
        evaluate.main,
        cfg.evaluate,
        *flags,
        "--model",
        init,
        "--reference",
        init,
        "--reward",
        tmp_path / "other",
    )
    assert "the vocabularies differ" in said


def test_vocabularies_of_the_same_size_that_differ(done, tmp_path):
    cfg, _ = done
    path = cfg.out / "sft" / "model"
    model = models.load(path)
    other = tokenizer.train([f"word{n} zqx " * 9 for n in range(99)], 512, tmp_path / "tokenizer")
    assert len(other) < 512
    with pytest.raises(InputError, match="have the same size and differ"):
        models.check_vocabularies({path: model, tmp_path: dataclasses.replace(model, tokenizer=other)})


def test_text_longer_than_the_table_of_positions(done, tmp_path):
    cfg, _ = done
    config = dataclasses.replace(tiny.GPT, vocab_size=512)
    model = models.Model(config, {}, models.load(cfg.out / "sft" / "model").tokenizer, lambda: None)
    with pytest.raises(InputError, match="text_length=25 is more than the model's context"):
        evaluate.held_out_nll(evaluate.Config(text_length=25), model, None)
    models.save(model, tiny.policy(config), tmp_path / "model")
    short = dataclasses.replace(
        cfg.ppo,
        init=tmp_path / "model",
        reward=(),
        critic="policy",
        text_length=25,
        data_dir=cfg.out / "data",
        out=tmp_path / "run",
    )
    with pytest.raises(InputError, match="text_length=25 is more than the model's context"):
        ppo.main(short, lambda prompt, response: 0.0)
