"""Every loop, stopped and started again, ends where it would have; tests/runs/test_checkpoint.py has the parts."""

import dataclasses
import os
import shutil
import signal

import pytest

from experiments import assistant, dpo, ppo, pretrain, reward, sft
from rlhf_jax.devices import preemption
from rlhf_jax.runs import checkpoint, cli, log
from rlhf_jax.types import InputError
from scripts import survive
from tests.quickstart import metrics_of, refused

STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}


def as_in(quick, name, out):
    """The configuration of a stage of the quickstart, to run elsewhere."""
    tuned, judge = quick.out / "sft" / "model", quick.out / "reward" / "model"
    ranked = {"data": str(quick.out / "rank" / "train.jsonl"), "held_out": str(quick.out / "rank" / "held_out.jsonl")}
    given = {
        "pretrain": {},
        "sft": {"init": quick.out / "pretrain" / "model"},
        "reward": {"init": tuned, **ranked},
        "ppo": {"init": tuned, "reward": (judge,)},
    }[name]
    return dataclasses.replace(getattr(quick, name), out=out, data_dir=quick.out / "data", **given)


def same_outcome(out, expected):
    assert metrics_of(out) == metrics_of(expected)
    files = ["model/model.safetensors", "samples.jsonl"]
    assert [name for name in files if (out / name).read_bytes() != (expected / name).read_bytes()] == []


def ask_to_end(monkeypatch):
    """From now on SIGTERM comes while step 1 is recorded."""
    write = log.Records.write

    def interrupted(run, step, metrics):
        write(run, step, metrics)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.Records, "write", interrupted)


def status_of(main, config) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(main, config, [])
    return stop.value.code


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_was_asked_to_end_goes_on(done, tmp_path, name, monkeypatch, capsys):
    quick, _ = done
    ask_to_end(monkeypatch)
    main, config = STAGES[name].main, as_in(quick, name, tmp_path / "run")
    assert status_of(main, config) == preemption.EXIT
    assert checkpoint.steps(config.out / "checkpoints") == [1] and len(metrics_of(config.out)) == 1
    assert not (config.out / "model").exists()
    cli.run(main, config, [])  # step 1 does not come again, nor the signal
    same_outcome(config.out, quick.out / name)
    assert f"{config.out} goes on after step 1" in capsys.readouterr().out


def test_preferences_go_on(done, tmp_path, monkeypatch):
    quick, _ = done
    data = {"init": quick.out / "sft" / "model", "data": str(quick.out / "rank" / "train.jsonl"), "length": 64}
    alone = dpo.Config(**data, batch=8, data_dir=quick.out / "data", out=tmp_path / "alone")
    dpo.main(alone)
    ask_to_end(monkeypatch)
    config = dataclasses.replace(alone, out=tmp_path / "run")
    assert status_of(dpo.main, config) == preemption.EXIT
    cli.run(dpo.main, config, [])
    same_outcome(config.out, alone.out)


def test_a_run_that_is_done_is_not_trained_again(done, tmp_path, monkeypatch, capsys):
    quick, _ = done
    out = tmp_path / "run"
    shutil.copytree(quick.out / "sft", out)
    shutil.rmtree(out / "model")  # as by a kill before the export
    config = as_in(quick, "sft", out)
    monkeypatch.setattr(log.Records, "write", lambda *_: pytest.fail("trained"))
    sft.main(config)
    same_outcome(out, quick.out / "sft")
    assert "is trained: 2 steps" in capsys.readouterr().out
    said = refused(capsys, sft.main, config, "--lr", 0.5, "--dropout", 0.25)
    assert "(dropout: 0.1 there, 0.25 here; lr: 0.001 there, 0.5 here): --saves.resume changed goes on" in said


def test_started_over(done, tmp_path):
    quick, _ = done
    out = tmp_path / "run"
    shutil.copytree(quick.out / "sft", out)
    config = dataclasses.replace(as_in(quick, "sft", out), lr=0.5)
    sft.main(dataclasses.replace(config, saves=checkpoint.Config(resume="never")))
    first, last = metrics_of(out)
    before = metrics_of(quick.out / "sft")
    del first["loss/held_out"], before[0]["loss/held_out"]  # of the parameters after the step
    assert first == before[0] and last["loss/next_token"] != before[1]["loss/next_token"]


def test_a_quickstart_that_is_run_again_keeps_what_is_done(done, tmp_path, monkeypatch, capsys):
    quick, summary = done
    shutil.copytree(quick.out, tmp_path / "moved")
    moved = dataclasses.replace(quick, out=tmp_path / "moved")
    for stage in STAGES.values():
        monkeypatch.setattr(stage, "main", lambda _: pytest.fail("ran"))
    again = assistant.main(moved)
    assert [again[name] for name in ("reward", "ppo", "sft")] == [summary[name] for name in ("reward", "ppo", "sft")]
    assert f"{moved.out / 'reward'} is done" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"pretrain was made with other settings \(seed: 0 there, 1 here\)"):
        assistant.main(dataclasses.replace(moved, seed=1))


@pytest.mark.parametrize("stage", survive.STAGES)
def test_the_commands_that_are_killed_exist(stage, tmp_path):
    _, _, module, *flags = survive.command(stage, tmp_path / "run", tmp_path, tmp_path / "rankings.jsonl")
    assert module == f"experiments.{stage}"
    assert cli.parse(STAGES[stage].Config(), flags).batch == 8


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    """The short form of scripts/survive.py."""
    life = survive.undisturbed("pretrain", tmp_path / "pretrain", tmp_path, 600)
    at, differing = survive.torment("pretrain", signal.SIGKILL, 1, life, tmp_path, survive.Config(seed=1))
    assert at["signals"] == 1 and differing == []
    expected, out = tmp_path / "pretrain", tmp_path / "changed"
    shutil.copytree(expected, out)
    line = (out / "metrics.jsonl").read_text().splitlines()[-1]
    (out / "metrics.jsonl").write_text(line + "\n")
    shutil.rmtree(out / "checkpoints" / str(survive.STEPS))
    assert survive.differences(out, expected) == ["metrics.jsonl", "the last checkpoint"]
