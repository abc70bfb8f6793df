import dataclasses
import functools
import gc
import json
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import (
    assistant,
    best_of_n,
    dpo,
    evaluate,
    grpo,
    ppo,
    ppo_gold,
    pretrain,
    rank,
    rejection,
    reward,
    rloo,
    rounds,
    sft,
)
from experiments.papers import ppo_instructgpt, presets
from experiments.studies import overoptimization, study
from rlhf_jax import models
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.analysis import calibration
from rlhf_jax.data import pipeline, sources, tokenizer
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads, lora
from rlhf_jax.runs import checkpoint, cli, log
from rlhf_jax.types import InputError
from tests import tiny
from tests.quickstart import LENGTHS, TINY, metrics_of, refused


@pytest.mark.parametrize(
    ("stage", "losses"),
    [
        ("pretrain", {"loss/next_token"}),
        ("sft", {"loss/next_token"}),
        ("reward", {"loss/bradley_terry"}),
        ("ppo", {"loss/policy", "loss/value", "loss/ptx"}),
    ],
)
def test_each_stage_leaves_its_records(done, stage, losses):
    cfg, _ = done
    out = cfg.out / stage
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == cfg.seed and config["batch"] == getattr(cfg, stage).batch
    rows = metrics_of(out)
    assert [row["step"] for row in rows] == [1, 2]
    assert {name for name in rows[0] if name.startswith("loss/")} == losses
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    assert checkpoint.steps(out / "checkpoints") == [2]
    samples = log.read(out, "samples.jsonl")
    assert len(samples) >= 8 and all(row["prompt"] and isinstance(row["response"], str) for row in samples)


def test_a_mesh_learns_and_says_what_replicas_do(done, tmp_path, monkeypatch):
    """Its reference and reward models wait on the host meanwhile."""
    cfg, _ = done
    frozen, waiting = parallel.Mesh.frozen, []
    monkeypatch.setattr(parallel.Mesh, "frozen", lambda self, tree: waiting.append(frozen(self, tree)) or waiting[-1])
    mesh = parallel.Config(fsdp=4, tensor=2, offload=True)
    assistant.main(dataclasses.replace(cfg, out=tmp_path, data_dir=cfg.out / "data", devices=mesh))
    assert any("embedding" in one for one in waiting) and any("trunk" in one for one in waiting)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(waiting)} == {"pinned_host"}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        for here, there in zip(metrics_of(tmp_path / stage), metrics_of(cfg.out / stage), strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-4)
    said = [[row["response"] for row in log.read(out / "ppo", "samples.jsonl")] for out in (cfg.out, tmp_path)]
    assert said[0] == said[1]


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

    def train(*args, **kwargs):
        gc.collect()
        return {name: sum(kept() is not None for kept in leaves) for name, leaves in loaded.items()}

    for name in ("load", "load_reward"):
        monkeypatch.setattr(models, name, watched(name, getattr(models, name)))
    monkeypatch.setattr(ppo, "train", train)
    given = {"init": cfg.out / "sft/model", "reward": (cfg.out / "reward/model",), "data": "world:rows=100"}
    given |= {"out": tmp_path, "data_dir": cfg.out / "data", "compute": models.Compute(frozen="bfloat16")}
    given |= {"devices": parallel.Config(fsdp=8), "batch": 16, **LENGTHS}
    if experiment is ppo:  # the base is in bfloat16; the critic's head is trained
        assert ppo.main(ppo.Config(**given, lora=lora.Config(rank=2))) == {"load": 0, "load_reward": 2}
    else:  # the policy is trained
        assert grpo.main(grpo.Config(**given)) == {"load": len(loaded["load"]), "load_reward": 0}


def test_the_reward_model_shows_how_it_orders(done):
    cfg, _ = done
    rows = log.read(cfg.out / "reward", "samples.jsonl")
    ranked = log.read(cfg.out / "rank", "held_out.jsonl")[:4]
    assert [row["response"] for row in rows] == [text for row in ranked for text in row["responses"]]
    assert [row["rank"] for row in rows] == [rank for row in ranked for rank in row["ranks"]]
    assert len({row["score"] for row in rows}) > 1
    calibration = json.loads((cfg.out / "reward" / "calibration.json").read_text())
    assert 0 <= calibration["expected_calibration_error"] <= 1 and calibration["pairs"] > 0
    assert all(sum(one["pairs"] for one in bins) == calibration["pairs"] for bins in list(calibration.values())[4:])
    every = sum(
        len(row["ranks"]) * (len(row["ranks"]) - 1) // 2 for row in log.read(cfg.out / "rank", "held_out.jsonl")
    )
    assert calibration["pairs"] + calibration["ties"] == every
    assert (cfg.out / "reward" / "calibration.png").is_file()


def test_the_record_tells_accuracy_by_margin_and_by_length(tmp_path):
    pairs = calibration.Pairs(margin=np.array([2.0, -1.0]), longer=np.array([-3, 4]))
    assert reward.record(tmp_path, pairs, ties=0) == 0.5
    by = list(json.loads((tmp_path / "calibration.json").read_text()).items())[-2:]
    assert by == [
        ("accuracy by margin of scores", [{"at": 1, "accuracy": 0, "pairs": 1}, {"at": 2, "accuracy": 1, "pairs": 1}]),
        (
            "accuracy by length, preferred less other (tokens)",
            [{"at": -3, "accuracy": 1, "pairs": 1}, {"at": 4, "accuracy": 0, "pairs": 1}],
        ),
    ]


def test_scores_of_the_training_answers_are_normalized(done):
    cfg, _ = done
    judge = models.load_reward(cfg.out / "reward" / "model")
    rows = sources.rows(str(cfg.out / "rank" / "train.jsonl"), "rankings", data_dir=cfg.out / "data")
    (batch,) = pipeline.rankings(rows, tokenizer=judge.tokenizer, length=64, batch=16, seed=0, epochs=1)
    apply_fn = models.bind(heads.ScalarModel(judge.config))
    score = jax.jit(functools.partial(reward_lib.scores, apply_fn=apply_fn))(judge.params, batch)
    said = np.asarray(score)[batch.rank >= 0]
    np.testing.assert_allclose((said.mean(), said.std()), (0, 1), atol=1e-3)


def test_ppo_shows_what_it_samples(done):
    cfg, _ = done
    rows = log.read(cfg.out / "ppo", "samples.jsonl")
    assert {row["step"] for row in rows} == {1, 2}
    assert set(rows[0]) == {"step", "prompt", "response", "score", "kl"}
    assert "| prompt | response | score | kl |" in (cfg.out / "ppo" / "samples.md").read_text()
    assert metrics_of(cfg.out / "ppo")[0]["ratio/first_error"] < 1e-4


def test_the_summary_has_what_it_should(done):
    cfg, summary = done
    assert json.loads((cfg.out / "summary.json").read_text()) == summary
    assert {name: set(x) if isinstance(x, dict) else () for name, x in summary.items()} == {
        "seed": (),
        "seconds": (),
        "peak_memory_gib": (),
        "pretrain": {"gold", "nll"},
        "sft": {"gold", "reward", "nll"},
        "reward": {"accuracy", "labeler_agreement"},
        "best_of_n": {"n", "gold", "kl", "reward"},
        "ppo": {"gold", "reward", "kl", "nll"},
    }
    numbers = [x for stage in summary.values() for x in (stage.values() if isinstance(stage, dict) else [stage])]
    assert all(math.isfinite(x) for x in numbers)
    assert summary["best_of_n"]["n"] == cfg.best_of
    assert (cfg.out / "stages.png").read_bytes().startswith(b"\x89PNG")
    answers = (cfg.out / "answers.md").read_text().splitlines()
    assert answers[0] == "| prompt | base | SFT | PPO |" and len(answers) == 2 + cfg.evaluate.prompts


def test_rankings_are_rows_that_the_reward_model_reads(done):
    cfg, _ = done
    rows = log.read(cfg.out / "rank", "train.jsonl")
    assert len(rows) == cfg.rank.prompts
    assert all(4 <= len(row["responses"]) == len(row["ranks"]) <= 9 for row in rows)
    assert len(log.read(cfg.out / "rank", "held_out.jsonl")) == cfg.rank.held_out * cfg.rank.people


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_the_checkpoint_holds_the_model_that_was_saved(done, stage):
    cfg, _ = done
    load = models.load_reward if stage == "reward" else models.load
    model = load(cfg.out / stage / "model")
    tx = optim.adamw(optim.cosine(1.0, 2))
    like = jax.eval_shape(lambda: optim.init(model.params, tx, jax.random.key(0)))
    state, extra = checkpoint.restore(cfg.out / stage / "checkpoints", like)
    assert int(state.step) == 2 and "data" in extra
    if stage == "reward":  # the saved head is normalised afterwards
        tiny.assert_close(state.params["trunk"], model.params["trunk"], atol=0)
    else:
        tiny.assert_close(state.params, model.params, atol=0)


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
        ppo=dataclasses.replace(presets.instructgpt.ppo, minibatches=2),
    )
    state = ppo.main(fork)
    saved = models.load(tmp_path / "fork" / "model").params
    tiny.assert_close(state.opt_state["ema"], saved, atol=0)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.params["policy"], saved)
    assert max(jax.tree.leaves(moved)) > 0


class Loaded(Exception):
    """Raised instead of loading a model, to see how."""


@pytest.mark.parametrize("module", [pretrain, sft, rank, reward, ppo, grpo, rloo, dpo, rejection, evaluate])
def test_how_a_model_is_computed_is_a_setting_of_each_stage(done, tmp_path, monkeypatch, module):
    cfg, _ = done

    def load(path, compute=None, place=None):
        raise Loaded(compute)

    monkeypatch.setattr(models, "load", load)
    config = getattr(cfg, module.__name__.split(".")[1], None) or module.Config()
    bfloat16 = models.Compute("bfloat16", remat="full")
    given = {"out": tmp_path, "data_dir": cfg.out / "data", "compute": bfloat16}
    if module is not evaluate:
        given |= {"init": cfg.out / "sft" / "model"}
    with pytest.raises(Loaded) as raised:
        module.main(dataclasses.replace(config, **given))
    assert raised.value.args == (bfloat16,)


def test_records_say_where_the_time_of_a_step_goes(done):
    cfg, _ = done
    for row in log.read(cfg.out / "ppo"):
        seconds = {part: row[f"seconds/{part}"] for part in ("generate", "score", "update", "host")}
        assert all(x >= 0 for x in seconds.values()) and sum(seconds.values()) < 60
        new, tokens = row["response/tokens"], row["response/tokens"] + row["prompt/tokens"]
        counts = {"generate": cfg.ppo.batch * new, "score": cfg.ppo.batch * tokens}
        for part, count in counts.items():
            assert row[f"tokens_per_s/{part}"] == pytest.approx(count / seconds[part], rel=1e-3)
            assert 0 < row[f"mfu/{part}"] < 1 and row[f"tflops/{part}"] > 0
        # A backward pass takes twice a forward pass; the reference is not learnt from, and text is.
        done_in_update = row["tflops/update"] * seconds["update"]
        assert done_in_update > 1.5 * row["tflops/generate"] * seconds["generate"]
    assert "seconds/compile" in log.read(cfg.out / "ppo")[0]


@pytest.mark.slow
def test_the_seed_reproduces_a_run_exactly(done, tmp_path):
    cfg, summary = done
    again = dataclasses.replace(cfg, out=tmp_path)
    repeated = assistant.main(again)
    for name in ("seconds", "peak_memory_gib"):
        repeated[name] = summary[name]
    assert repeated == summary
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert metrics_of(tmp_path / stage) == metrics_of(cfg.out / stage)
    for record in ("rank/train.jsonl", "ppo/samples.jsonl", "ppo/model/model.safetensors", "answers.md"):
        assert (tmp_path / record).read_bytes() == (cfg.out / record).read_bytes()


# Beside the recipe ----------------------------------------------------------------------------------------------------


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
    dpo.main(
        dpo.Config(
            data=data, length=64, batch=8, saves=checkpoint.Config(every=1), **given(cfg, tmp_path, "init", "out")
        )
    )
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
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


ADAPTERS = lora.Config(rank=2)


def check_adapted(cfg, trunk, trained):
    """That a saved trunk is the fine-tuned model with other kernels, and that adapters alone were trained for it."""
    before, after = flatten_dict(models.load(cfg.out / "sft" / "model").params), flatten_dict(trunk)
    kernels = {path for path in before if path[-1] == "kernel"}
    assert {path for path in before if not np.array_equal(before[path], after[path])} == kernels
    assert set(flatten_dict(trained)) == {(*path[:-1], f"kernel_{x}") for path in kernels for x in "ab"}


def test_fine_tuning_by_adapters(done, tmp_path):
    cfg, _ = done
    state = sft.main(
        dataclasses.replace(
            cfg.sft, **given(cfg, tmp_path, "init", "out"), lora=ADAPTERS, saves=checkpoint.Config(every=1)
        )
    )
    last = int(state.step)
    assert checkpoint.steps(tmp_path / "checkpoints") == [last - 1, last]
    check_adapted(cfg, models.load(tmp_path / "model").params, state.params)
    checkpoint.restore(tmp_path / "checkpoints", state)  # raises if it holds anything else


def test_a_reward_model_by_adapters(done, tmp_path):
    cfg, _ = done
    ranked = {"data": str(cfg.out / "rank" / "train.jsonl"), "held_out": str(cfg.out / "rank" / "held_out.jsonl")}
    result = reward.main(
        dataclasses.replace(
            cfg.reward, **given(cfg, tmp_path, "init", "out"), **ranked, lora=ADAPTERS, saves=checkpoint.Config(every=1)
        )
    )
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
    params = models.load_reward(tmp_path / "model").params
    trained, _ = lora.split(params, ADAPTERS, jax.random.key(0))
    like = jax.eval_shape(lambda: optim.init(trained, optim.adamw(optim.cosine(1.0, 2)), jax.random.key(0)))
    state, _ = checkpoint.restore(tmp_path / "checkpoints", like)
    check_adapted(cfg, params["trunk"], state.params["trunk"])
    assert not np.allclose(state.params["kernel"], params["kernel"]) and 0 <= result["accuracy"] <= 1


def test_ppo_by_adapters(done, tmp_path):
    cfg, _ = done
    settings = given(cfg, tmp_path, "init", "rewards", "out") | {"text": None, "lora": ADAPTERS}
    state = ppo.main(dataclasses.replace(cfg.ppo, **settings))
    check_adapted(cfg, models.load(tmp_path / "model").params, state.params["policy"])
    assert set(state.params["critic"]) == {"trunk", "kernel", "bias"}
    first, last = metrics_of(tmp_path)
    assert max(first["ratio/first_error"], last["ratio/first_error"]) < 1e-4
    assert abs(first["kl/reference"]) < 1e-5 < abs(last["kl/reference"])  # the reference is the base


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


# What a user can get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [pretrain.main, sft.main])
def test_a_batch_that_does_not_divide_over_the_devices(done, flags, capsys, main):
    cfg, _ = done
    default = cfg.sft if main is sft.main else cfg.pretrain
    default = dataclasses.replace(default, init=cfg.out / "pretrain" / "model")
    said = refused(capsys, main, default, *flags, "--batch", 4)
    assert "does not divide over 8 devices: use a multiple of 8" in said


def test_a_minibatch_that_does_not_divide_over_the_devices(done, flags, capsys):
    cfg, _ = done
    default = dataclasses.replace(
        cfg.ppo, init=cfg.out / "sft" / "model", reward=(cfg.out / "reward" / "model",), text=None
    )
    said = refused(capsys, ppo.main, default, *flags, "--ppo.minibatches", 4)
    assert "a minibatch of 4 rows does not divide over 8 devices: use fewer minibatches" in said


def test_directories_that_are_not_models(done, flags, tmp_path, capsys):
    cfg, _ = done
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "nowhere")
    assert said.endswith("nowhere is not a model directory: it has no config.json; run the experiment that writes it")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "bert")
    assert said.endswith(
        "model_type 'bert' is not supported: expected one of gpt2, llama, mistral, qwen2, qwen3, gemma2"
    )
    said = refused(
        capsys, ppo.main, cfg.ppo, *flags, "--init", cfg.out / "sft" / "model", "--reward", cfg.out / "sft" / "model"
    )
    assert said.endswith("has no score head (score.weight): it is not a reward model")


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


def test_rankings_without_an_order(done, flags, tmp_path, capsys):
    cfg, _ = done
    path = tmp_path / "ties.jsonl"
    path.write_text((json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0]}) + "\n") * 8)
    given = [*flags, "--init", cfg.out / "sft" / "model", "--data", path, "--held-out", path]
    assert "rankings: no row has two responses of different rank" in refused(capsys, reward.main, cfg.reward, *given)


def test_the_world_is_a_setting(done, tmp_path):
    cfg, _ = done
    given = {"init": cfg.out / "sft" / "model", "data_dir": cfg.out / "data", "world": 1, "prompts": 8}
    rank.main(dataclasses.replace(cfg.rank, **given, out=tmp_path))
    people = [
        {row["prompt"][0]["content"] for row in log.read(out, "train.jsonl")} for out in (tmp_path, cfg.out / "rank")
    ]
    assert not people[0] <= people[1]


def test_a_tokenizer_with_ids_that_the_model_does_not_have(done, flags, tmp_path, capsys):
    cfg, _ = done
    config = dataclasses.replace(tiny.GPT, vocab_size=300)
    tok = models.load(cfg.out / "sft" / "model").tokenizer
    models.save(models.Model(config, {}, tok, lambda: None), tiny.policy(config), tmp_path / "small")
    said = refused(capsys, sft.main, cfg.sft, *flags, "--init", tmp_path / "small")
    assert "small: the tokenizer has ids up to 511 but the model's vocabulary is 300: use the model's own" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "responses": ["a"], "ranks": [0]},
            "field responses: expected a list of at least 2, got ['a']",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "field ranks: expected 2 integers from 0 up"),
        ({"prompt": 3, "responses": ["a", "b"], "ranks": [0, 1]}, "field prompt: expected text or a list of messages"),
    ],
)
def test_a_malformed_row(done, flags, tmp_path, capsys, row, message):
    cfg, _ = done
    path = tmp_path / "rankings.jsonl"
    good = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    said = refused(capsys, reward.main, cfg.reward, *flags, "--init", cfg.out / "sft" / "model", "--data", path)
    assert f"{path}, line 2, {message}" in said


def test_fewer_than_two_answers_cannot_be_ranked(done, flags, capsys):
    cfg, _ = done
    said = refused(capsys, rank.main, cfg.rank, *flags, "--init", cfg.out / "sft" / "model", "--least", 1)
    assert said == "error: least=1, most=9: expected 2 <= least <= most answers to rank"


def test_an_unknown_flag_of_a_stage(capsys):
    assert refused(capsys, assistant.main, TINY, "--ppo.stepz", 4) == (
        "error: unknown flag --ppo.stepz; did you mean --ppo.steps? see --help"
    )


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (assistant.main, ["--best-of", 1], "best_of=1: expected at least 2 answers to pick from"),
        (assistant.main, ["--sft.seed", 3], "--sft.seed has no effect here, where other flags decide it: leave it out"),
        (assistant.main, ["--rank.temperature", 2], "--rank.temperature has no effect here, where other flags decide"),
        (evaluate.main, ["--best-of", 0], "best_of=0: expected more than 0"),
        (ppo.main, ["--samples-every", 0], "samples_every=0: expected more than 0"),
        (assistant.main, ["--reward.saves.every", 0], "every=0: expected more than 0"),
        (ppo.main, ["--ppo.kl-in", "loss"], "kl_in=loss with kl_kind=k1 has no effect"),
        (ppo.main, ["--lora.alpha", 4], "lora: alpha and kernels have no effect without a rank"),
    ],
)
def test_flags_that_cannot_be(capsys, main, flags, message):
    default = {assistant.main: TINY, evaluate.main: TINY.evaluate, ppo.main: TINY.ppo}[main]
    assert message in refused(capsys, main, default, *flags)


@pytest.mark.parametrize("main", [pretrain.main, sft.main, reward.main, dpo.main])
def test_rows_longer_than_the_table_of_positions(capsys, tmp_path, main):
    models.save(models.Model(tiny.GPT, {}, None, lambda: None), tiny.policy(), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "t"}')
    default = {pretrain.main: pretrain, sft.main: sft, reward.main: reward, dpo.main: dpo}[main].Config()
    flags = ["--init", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--length", 25]
    said = refused(capsys, main, default, *flags, "--out", tmp_path / "run", "--data-dir", tmp_path / "data")
    assert said.startswith("error: length=25 is more than the model's context of 24 tokens")


def test_text_longer_than_the_table_of_positions(tmp_path):
    model = models.Model(tiny.GPT, {}, tokenizer.train(["a few words"], 300, tmp_path), lambda: None)
    with pytest.raises(InputError, match="text_length=25 is more than the model's context"):
        evaluate.held_out_nll(evaluate.Config(text_length=25), model, None)
    with pytest.raises(InputError, match="text_length=25 is more than the model's context"):
        ppo.train(ppo.Config(text_length=25), ppo.Config().ppo, model, *[None] * 6, rows=None, prompts=[])


def test_evaluation_refuses_models_that_do_not_go_together(done, flags, capsys, tmp_path):
    cfg, _ = done
    init, config = cfg.out / "sft" / "model", dataclasses.replace(tiny.GPT, vocab_size=512)
    tok = models.load(init).tokenizer
    models.save(models.Model(config, {}, tok, lambda: None), tiny.policy(config), tmp_path / "other")
    flags = [*flags, "--model", init]
    said = refused(capsys, evaluate.main, cfg.evaluate, *flags, "--reference", tmp_path / "other")
    assert said.endswith(f"other is not of the architecture of {init}: take the model that it came from")
    said = refused(capsys, evaluate.main, cfg.evaluate, *flags, "--reference", init, "--best-of", 2)
    assert said == "error: best_of=2 needs a reward model to pick by: name one by --reward"


def test_a_loss_that_is_not_finite_stops_the_run(done, flags, monkeypatch, capsys, tmp_path):
    cfg, _ = done

    def train_step(state, batch, **_):
        metrics = {"loss/next_token": jnp.where(state.step == 2, jnp.nan, 1.0)}
        return state.replace(step=state.step + 1), metrics

    monkeypatch.setattr(sft_lib, "train_step", train_step)
    default = dataclasses.replace(
        cfg.pretrain, init=cfg.out / "pretrain" / "model", steps=9, saves=checkpoint.Config(every=2)
    )
    with pytest.raises(SystemExit) as stop:
        cli.run(pretrain.main, default, [str(flag) for flag in flags])
    assert stop.value.code == cli.FAILURE
    last = capsys.readouterr().err.splitlines()[-1]
    good = tmp_path / "run" / "checkpoints" / "2"
    assert last == f"error: step 3: loss/next_token is nan; the last good checkpoint is {good}"
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    assert not (tmp_path / "run" / "model").exists()


def test_a_study_makes_what_is_missing_and_renews_its_page(done, tmp_path, monkeypatch, capsys):
    quick, summary = done
    monkeypatch.setattr(study, "tuned", lambda *_: quick.out / "sft" / "model")
    judge = {"model": quick.out / "reward" / "model", "accuracy": summary["reward"]["accuracy"]}
    monkeypatch.setattr(study, "judge", lambda *_, **__: judge)
    docs = tmp_path / "overoptimization.md"
    docs.write_text(f"# Mine\n\n{study.BEGIN}\nearlier\n{study.END}\n\nFindings.\n")
    cfg = overoptimization.Config(
        out=tmp_path / "studies",
        docs=tmp_path,
        seeds=1,
        prompts=16,
        ppo=dataclasses.replace(TINY.ppo, samples=16, text=None),
        labels=(),
        epochs=(),
        sizes=(),
        answers=2,
        answered=8,
    )
    results = overoptimization.main(cfg)
    alone, best = results["best_of_n"][0]["16 prompts"]
    assert alone["kl"] == 0 and best["kl"] > 0 and best["proxy"] > alone["proxy"]
    assert len(results["ppo"][0]["16 prompts"]) == 1 + cfg.ppo.steps
    assert "\n| 16 prompts |" in docs.read_text() and "earlier" not in docs.read_text()
    assert (tmp_path / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert overoptimization.main(cfg) == results
    assert "step/s" not in capsys.readouterr().err  # everything was found
