"""The quickstart: what it leaves, on one device, eight and a mesh, and that its seed reproduces it."""

import dataclasses
import json
import math

import jax
import pytest

from experiments import (
    assistant,
)
from rlhf_jax import models
from rlhf_jax.algorithms import optim
from rlhf_jax.devices import parallel
from rlhf_jax.runs import checkpoint, log
from tests import tiny
from tests.quickstart import TINY, metrics_of, refused


@pytest.mark.parametrize(
    ("stage", "losses"),
    [
        ("pretrain", {"loss/next_token", "loss/held_out"}),
        ("sft", {"loss/next_token", "loss/held_out"}),
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


@pytest.mark.full  # tests/devices/test_parallel.py has each step
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


def test_the_summary_has_what_it_should(done):
    cfg, summary = done
    assert json.loads((cfg.out / "summary.json").read_text()) == summary
    assert {name: set(x) if isinstance(x, dict) else () for name, x in summary.items()} == {
        "seed": (),
        "seconds": (),
        "peak_memory_gib": (),
        "pretrain": {"gold", "nll", "held_out_loss"},
        "sft": {"gold", "reward", "nll", "held_out_loss"},
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


def test_an_unknown_flag_of_a_stage(capsys):
    assert refused(capsys, assistant.main, TINY, "--ppo.stepz", 4) == (
        "error: unknown flag --ppo.stepz; did you mean --ppo.steps? see --help"
    )
